"""Deflickering: each edited frame is averaged with its neighbours along the source's motion.

It smooths what the warp error measures, so results that went through it say so in their names.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from tokenflow.diffusion.optical_flow import FlowModel, consistent, warp
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup

RADIUS = 3  # neighbours on each side
SCALE = 0.01  # mean squared difference of colours in [0, 1] at which a weight is 1/e


def deflicker(
    frames: np.ndarray,
    source: np.ndarray,
    model: FlowModel,
    radius: int = RADIUS,
    scale: float = SCALE,
    group: ProcessGroup = SINGLE_PROCESS,
) -> np.ndarray:
    """Averages frames along the optical flow of the clip that they were edited from.

    y_i = (e_i + sum_j w_ij e_j(x + f_ij)) / (1 + sum_j w_ij) over 0 < |j - i| <= radius, with f_ij
    the source's flow from frame i to j, and w_ij = exp(-d^2 / scale) where the flow there and back
    agrees (`consistent`), else 0; d^2 is the mean over the colours of (e_i - e_j(x + f_ij))^2. So
    shimmer is averaged away, and what changed on purpose is not. Frames are looked up bicubically:
    bilinearly they lose more of their sharpness.

    Args:
        frames, source: the edit and its clip, (n, H, W, 3) uint8 RGB.
        group: each of its processes calls this with all frames and averages its shard.

    Returns:
        (n, H, W, 3) uint8.
    """
    n, shard = len(frames), group.shard(len(frames))
    known: dict[tuple[int, int], Tensor] = {}
    averaged = []
    for i in range(n)[shard.local]:
        own = frames[i].astype(np.float32)
        total, weights = own.copy(), np.ones((*own.shape[:2], 1), np.float32)
        for j in range(max(0, i - radius), min(n, i + radius + 1)):
            if j == i:
                continue
            for pair in ((i, j), (j, i)):
                if pair not in known:
                    known[pair] = model(*(source[k] for k in pair))
            there = warp(frames[j], known[i, j], cv2.INTER_CUBIC)
            distance = np.square((own - there) / 255).mean(axis=-1, keepdims=True)
            visible = consistent(known[i, j], known[j, i]).numpy()[..., None]
            weight = np.exp(-distance / scale) * visible
            total += weight * there
            weights += weight
        averaged.append((total / weights).clip(0, 255).round().astype(np.uint8))
        known = {pair: flow for pair, flow in known.items() if min(pair) > i - radius}
    own = np.stack(averaged) if averaged else frames[:0]
    return shard.gather(torch.from_numpy(own)).numpy()
