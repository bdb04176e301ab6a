"""How a clip moves: backward optical flow between its frames, estimated or read from disk.

The flow says where each pixel of a frame was in the frame before it, so that a frame is predicted
by looking up the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from tokenflow.diffusion.optical_flow import FlowModel, consistent
from tokenflow.storage.video import clip_name
from util import MissingFileError, UserError, load_tensors, save_tensors


@dataclass(frozen=True)
class Motion:
    """How each frame of a clip came from the one before it.

    flow: (n-1, 2, H, W) float32; flow[p] says where each pixel of frame p+1 was in frame p:
        (dx, dy) in pixels, right and down.
    visible: (n-1, H, W) bool; False where the pixel was hidden or outside of frame p: not counted.
    """

    flow: Tensor
    visible: Tensor


# ---------------------------------------------------------------------------------------------
# Estimates


def motion_by(model: FlowModel, frames: np.ndarray) -> Motion:
    """Optical flow from each frame to the one before it, and what forward-backward flow hides.

    Args:
        frames: (n, H, W, 3) uint8 RGB, n >= 1.
    """
    n, height, width, _ = frames.shape
    flow = torch.zeros(n - 1, 2, height, width)
    visible = torch.zeros(n - 1, height, width, dtype=torch.bool)
    for p in tqdm(range(n - 1), desc="flow", unit="pair", leave=False):
        flow[p] = model(frames[p + 1], frames[p])
        visible[p] = consistent(flow[p], model(frames[p], frames[p + 1]))
    return Motion(flow, visible)


# ---------------------------------------------------------------------------------------------
# Ground truth on disk


def truth_file(clip: str | Path, truth: Path | None = None) -> Path:
    """Where a clip's true motion is stored: next to the clip, or in the file or folder `truth`."""
    name = f"{clip_name(clip)}.flow.safetensors"
    if truth is None:
        return Path(clip).with_name(name)
    return truth / name if truth.is_dir() else truth


def save_motion(path: str | Path, motion: Motion) -> None:
    """Write a clip's motion as safetensors: `flow`, and `visible` as 0 and 1."""
    save_tensors(path, {"flow": motion.flow, "visible": motion.visible.to(torch.uint8)})


def load_motion(path: str | Path) -> Motion:
    """Read what `save_motion` wrote.

    Raises:
        UserError: there is no such file, or it does not hold a clip's motion.
    """
    tensors = load_tensors(path)
    for name in {"flow", "visible"} - set(tensors):
        raise UserError(f"{path}: not a clip's motion: {name} missing")
    flow, visible = tensors["flow"].float(), tensors["visible"].bool()
    if flow.ndim != 4 or flow.shape[1] != 2 or visible.shape != (len(flow), *flow.shape[2:]):
        raise UserError(
            f"{path}: flow is {tuple(flow.shape)} and visible {tuple(visible.shape)}; "
            "expected (n-1, 2, H, W) and (n-1, H, W)"
        )
    if not flow[visible[:, None].expand_as(flow)].isfinite().all():
        raise UserError(f"{path}: the flow of visible pixels is not all finite")
    return Motion(flow.nan_to_num(0.0, 0.0, 0.0), visible)


def resize_motion(motion: Motion, size: tuple[int, int]) -> Motion:
    """The same motion for frames stretched to (height, width): each pixel takes the nearest one's.

    Between two objects there is no motion in between.
    """
    old = motion.flow.shape[2:]
    scale = torch.tensor([size[1] / old[1], size[0] / old[0]])[:, None, None]
    flow = F.interpolate(motion.flow, size, mode="nearest-exact") * scale
    visible = F.interpolate(motion.visible[:, None].float(), size, mode="nearest-exact")
    return Motion(flow, visible[:, 0] > 0)


def truth_shape(path: Path) -> tuple[int, int, int]:
    """Frame pairs, height and width of a saved motion, read from the file's header.

    Raises:
        UserError: there is no such file, or it does not hold a clip's motion.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such file of a clip's true motion; name one by --truth FILE, or estimate "
            "the motion: --flow raft, --flow dis"
        )
    try:
        with safe_open(path, framework="pt") as file:
            pairs, _, height, width = file.get_slice("flow").get_shape()
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a clip's motion ({error})") from error
    return pairs, height, width
