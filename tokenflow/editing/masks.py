"""Masked edits: what lies outside of the mask stays the source's.

After each sampling step the latents outside of the mask are set to the source's at that timestep,
as in blended diffusion (Avrahami et al. 2022), here from the inversion. The decoder changes the
source's pixels too, so that `composite` puts them back at the end.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATHER = 2  # pixels: the edit's weight is 1 on the mask, 1/2 on the pixels next to it, then 0


def edited_cells(masks: np.ndarray, factor: int) -> Tensor:
    """The cells of the latents that hold a pixel of the mask, (n, 1, h, w) bool.

    Args:
        masks: (n, H, W) bool, H and W multiples of `factor`.
        factor: pixels a cell.
    """
    return F.max_pool2d(torch.from_numpy(masks)[:, None].float(), factor) > 0


def composite(edited: np.ndarray, source: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Lays the edited frames over the source's inside of the mask, with a feathered border.

    The edit's weight is 1 on the mask and falls linearly to 0 at FEATHER pixels (Euclidean
    distance) from it. Beyond, the source's pixels are kept exactly.

    Args:
        edited, source: (n, H, W, 3) uint8.
        masks: (n, H, W) bool; a frame whose mask is empty is the source's.
    """
    frames = source.copy()
    for i in np.flatnonzero(masks.any(axis=(1, 2))):
        outside = (~masks[i]).astype(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        weight = np.clip(1 - distance / FEATHER, 0, 1)[..., None]
        frames[i] = np.rint(weight * edited[i] + (1 - weight) * source[i])
    return frames
