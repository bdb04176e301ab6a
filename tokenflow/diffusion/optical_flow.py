"""Optical flow between two frames, what it hides, and warping by it.

A flow says where each pixel of one frame lies in another; `warp` looks the other frame up there, so
that every pixel of the first gets exactly one value.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

from tokenflow.diffusion.checkpoints import for_inference
from util import MissingFileError, UserError, load_tensors, sha256_file

ALPHA1, ALPHA2 = 0.01, 0.5  # of the occlusion test; Sundaram et al. 2010
RAFT_WEIGHTS = Raft_Large_Weights.C_T_SKHT_V2
RAFT_UPDATES = 20  # as many as RAFT's published demo makes
RAFT_LEAST_SIDE = 128  # its correlation pyramid has no fewer cells
DIS_LEAST_SIDE = 16
OFFLINE = (
    "without them: flow_model: dis in an edit; --flow dis, --flow truth or --flow_weights FILE "
    "(safetensors) of evaluate.py"
)

# A flow model: (H, W, 3) uint8 source and target frames -> (2, H, W) float32, how far right and
# down each source pixel moves.
FlowModel = Callable[[np.ndarray, np.ndarray], Tensor]


# ---------------------------------------------------------------------------------------------
# Warping and occlusion


def warp(image: np.ndarray, flow: Tensor, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Look an image up where a backward flow points to: out(x) = image(x + flow(x)).

    The border's pixels are repeated beyond it. OpenCV's remap, not grid_sample: it takes pixels, so
    that a flow of whole pixels gives the very values.

    Args:
        image: (H, W, c), of any number type.
        flow: (2, H, W), pixels right and down.
        interpolation: OpenCV's, bilinear by default; a cubic one may pass the image's extremes.

    Returns:
        (H, W, c) float32, on the image's own scale.
    """
    rows, columns = np.mgrid[: flow.shape[1], : flow.shape[2]].astype(np.float32)
    dx, dy = flow.float().numpy()
    image = np.ascontiguousarray(image, np.float32)
    border = cv2.BORDER_REPLICATE
    return cv2.remap(image, columns + dx, rows + dy, interpolation, borderMode=border)


def consistent(there: Tensor, back: Tensor) -> Tensor:
    """Which pixels are seen in the other frame too: following the flow there and back returns.

    |f + b(x + f)|^2 < ALPHA1 (|f|^2 + |b(x + f)|^2) + ALPHA2, and x + f within the frame, whose
    edges are half a pixel beyond the outermost pixels' centres.

    Args:
        there, back: f, from this frame to the other, and b, from the other to this one, (2, H, W)
            in pixels.

    Returns:
        (H, W) bool.

    Source: Sundaram, Brox, Keutzer, ECCV 2010.
    """
    height, width = there.shape[1:]
    returning = torch.from_numpy(warp(back.permute(1, 2, 0).numpy(), there)).permute(2, 0, 1)
    lengths = there.square().sum(0) + returning.square().sum(0)
    returns = (there + returning).square().sum(0) < ALPHA1 * lengths + ALPHA2
    x = torch.arange(width) + there[0]
    y = torch.arange(height)[:, None] + there[1]
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    return returns & inside


# ---------------------------------------------------------------------------------------------
# Models


def dis_flow(source: np.ndarray, target: np.ndarray) -> Tensor:
    """Dense optical flow by OpenCV's DIS (Kroeger et al. 2016) on the CPU, a FlowModel.

    Raises:
        UserError: the frames are too small.
    """
    if min(source.shape[:2]) < DIS_LEAST_SIDE:
        size = "x".join(map(str, source.shape[:2]))
        raise UserError(f"optical flow: frames of {size} (HxW); DIS needs {DIS_LEAST_SIDE} a side")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (source, target)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return torch.from_numpy(dis.calc(*grey, None)).permute(2, 0, 1)


class Raft:
    """torchvision's RAFT-large (Teed and Deng 2020) in float32, a FlowModel.

    Raises:
        UserError: the weights, of `find_raft_weights`, are damaged or another model's.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        if weights.suffix == ".safetensors":
            tensors = load_tensors(weights)
        else:
            # The one file of another kind: torchvision publishes these weights as nothing else.
            # Its checksum was compared, and weights_only builds tensors, no objects.
            tensors = torch.load(weights, map_location="cpu", weights_only=True)
        model = raft_large(weights=None)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()[:120]
            message = f"{weights}: not weights of torchvision's RAFT-large: {reason}"
            raise UserError(message) from error
        self.model, self.device = for_inference(model, device), device

    @torch.inference_mode()
    def __call__(self, source: np.ndarray, target: np.ndarray) -> Tensor:
        height, width = source.shape[:2]
        pair = torch.from_numpy(np.stack([source, target])).permute(0, 3, 1, 2)
        pair = pair.to(self.device).float() / 127.5 - 1.0  # (2, 3, H, W) in [-1, 1]
        (top, bottom), (left, right) = _padding(height), _padding(width)
        pair = F.pad(pair, (left, right, top, bottom), mode="replicate")
        flow = self.model(pair[:1], pair[1:], num_flow_updates=RAFT_UPDATES)[-1][0]
        return flow[:, top : top + height, left : left + width].cpu()


def _padding(side: int) -> tuple[int, int]:
    """What to add before and after for a side that RAFT takes: a multiple of 8, and not small."""
    missing = max(-(-side // 8) * 8, RAFT_LEAST_SIDE) - side
    return missing // 2, missing - missing // 2


def find_raft_weights(weights: str | Path | None) -> Path:
    """The file of RAFT's weights; loads nothing.

    Args:
        weights: a safetensors file of torchvision's raft_large, or None for torchvision's own
            weights in torch's hub cache, fetched where they are not there.

    Raises:
        UserError: there is no such file, it cannot be fetched, is no safetensors file, or not the
            one that torchvision published.
    """
    if weights is not None:
        weights = Path(weights)
        if not weights.is_file():
            raise MissingFileError(f"--flow_weights: {weights}: no such file")
        if weights.suffix != ".safetensors":
            raise UserError(
                f"--flow_weights: {weights}: expected a .safetensors file, pickles are not loaded; "
                "docs/evaluation.md says how to convert one"
            )
        return weights
    cached = cached_raft_weights()
    digest = cached.stem.rpartition("-")[2]
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(RAFT_WEIGHTS.url, str(cached), digest)
        except (OSError, RuntimeError) as error:
            raise MissingFileError(
                f"RAFT's weights are not at {cached} and cannot be fetched from "
                f"{RAFT_WEIGHTS.url} ({error}); {OFFLINE}"
            ) from error
    if not sha256_file(cached).startswith(digest):
        raise UserError(
            f"{cached}: damaged, its checksum does not begin with {digest}; remove it to have it "
            f"fetched again; {OFFLINE}"
        )
    return cached


def cached_raft_weights() -> Path:
    """Where torch's hub keeps torchvision's weights of RAFT, fetched or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / RAFT_WEIGHTS.url.rpartition("/")[2]


def raft_weights_name(weights: Path) -> str:
    """What to call weights in a protocol: the same for the same bytes, wherever they lie."""
    return f"{weights.name} (sha256 {sha256_file(weights)[:8]})"


def flow_model(weights: Path | None, device: torch.device) -> FlowModel:
    """RAFT with these weights, or DIS without any."""
    return Raft(weights, device) if weights else dis_flow
