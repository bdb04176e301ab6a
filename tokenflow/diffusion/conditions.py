"""Edges and depth of a clip, and the ControlNet that is conditioned on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, DPTImageProcessor

from tokenflow.diffusion.checkpoints import depth_estimator_folders, for_inference, load_model
from tokenflow.diffusion.model_names import ControlSettings
from tokenflow.diffusion.models import StableDiffusion

METRIC_DEPTH = ("glpn", "zoedepth")  # kinds of models that predict depth in metres


@dataclass(frozen=True)
class Control:
    """A ControlNet, its condition images and its scale."""

    controlnet: ControlNetModel
    images: Tensor  # (n, 1, H, W) in [0, 1], repeated for the model's three channels
    scale: float = 1.0


def draw_control(
    models: StableDiffusion, settings: ControlSettings, frames: np.ndarray, depth: Tensor | None
) -> Control:
    """Loads a ControlNet and computes its condition images from a clip.

    Args:
        frames: (n, H, W, 3) uint8 RGB.
        depth: (n, 1, H, W) of `estimate_depth`; needed if the settings' kind is depth.
    """
    is_canny = settings.kind == "canny"
    images = canny_edges(frames, settings.low, settings.high) if is_canny else depth
    return Control(models.controlnet(settings.key), images, settings.scale)


def canny_edges(frames: np.ndarray, low: int, high: int) -> Tensor:
    """Canny edges of a clip, (n, 1, H, W) uint8, 0 or 1.

    Args:
        frames: (n, H, W, 3) uint8 RGB.
        low, high: the two thresholds of the hysteresis, 0-255.
    """
    edges = np.stack([cv2.Canny(frame, low, high) for frame in frames])
    return torch.from_numpy(edges // 255)[:, None]


@torch.inference_mode()
def estimate_depth(
    frames: np.ndarray,
    key: str,
    checkpoint: Path,
    device: torch.device,
    batch_size: int = 8,
    allow_pickle: bool = False,
) -> Tensor:
    """Inverse depth of a clip, normalised over the clip.

    Normalised per frame, the depth of a still background would jump whenever something near
    enters or leaves the picture, and the edit would flicker.

    Args:
        frames: (n, H, W, 3) uint8 RGB.
        key, checkpoint: a depth estimator of transformers; see `depth_estimator_folders`.
        allow_pickle: see `checkpoint_folder`, for errors too.

    Returns:
        (n, 1, H, W) float32 in [0, 1]; 1 is nearest.
    """
    folder, processor_folder = depth_estimator_folders(key, checkpoint, allow_pickle)
    options = {"torch_dtype": torch.float32, "trust_remote_code": False}
    model = load_model(AutoModelForDepthEstimation, folder, allow_pickle, **options)
    model = for_inference(model, device)
    is_dpt = model.config.model_type == "dpt"
    metric = getattr(model.config, "depth_estimation_type", None) == "metric"
    metric = metric or model.config.model_type in METRIC_DEPTH
    processor = (DPTImageProcessor if is_dpt else AutoImageProcessor).from_pretrained(
        processor_folder, trust_remote_code=False
    )
    if model.config.model_type == "zoedepth":
        processor.do_pad = False  # the prediction would be of the padded frame
    depth = []
    for start in range(0, len(frames), batch_size):
        inputs = processor(images=list(frames[start : start + batch_size]), return_tensors="pt")
        predicted = model(inputs.pixel_values.to(device)).predicted_depth[:, None].float()
        if metric:
            predicted = 1 / predicted.clamp_min(1e-3)
        resized = F.interpolate(predicted, frames.shape[1:3], mode="bicubic", align_corners=False)
        depth.append(resized.cpu())
    depth = torch.cat(depth)
    return (depth - depth.min()) / (depth.max() - depth.min()).clamp_min(1e-8)


def depth_latents(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """The depth model's fifth latent channel: (n, 1, H, W) in [0, 1] to (n, 1, h, w) in [-1, 1]."""
    resized = F.interpolate(depth, grid, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0.0, 1.0) * 2.0 - 1.0
