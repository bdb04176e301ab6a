"""Frames to VAE latents and back, and PSNR between clips."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenflow.diffusion.models import BETTER_DTYPE, StableDiffusion
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from util import UserError


@torch.inference_mode()
def encode_frames(models: StableDiffusion, frames: np.ndarray, batch_size: int = 8) -> Tensor:
    """VAE latents of a clip: the posterior's mean, times the VAE's scaling factor.

    Args:
        frames: (n, H, W, 3) uint8 RGB; H and W multiples of `models.vae_factor`.

    Returns:
        (n, 4, h, w) float32 on the CPU.
    """
    n, height, width, _ = frames.shape
    channels, factor = models.vae.config.latent_channels, models.vae_factor
    latents = torch.empty(n, channels, height // factor, width // factor)
    for numbers in _pieces(n, batch_size):
        pixels = torch.from_numpy(frames[numbers]).permute(0, 3, 1, 2)
        pixels = pixels.to(models.device, models.dtype) / 127.5 - 1.0  # [-1, 1]
        mean = models.vae.encode(pixels).latent_dist.mean
        latents[numbers] = (mean.float() * models.vae.config.scaling_factor).cpu()
    return latents


@torch.inference_mode()
def decode_latents(
    models: StableDiffusion,
    latents: Tensor,
    batch_size: int = 8,
    group: ProcessGroup = SINGLE_PROCESS,
) -> np.ndarray:
    """The inverse of `encode_frames`: (n, 4, h, w) latents to (n, H, W, 3) uint8 RGB.

    Args:
        group: each of its processes calls this with all latents and decodes its shard.

    Raises:
        UserError: if the decoded pixels are not finite.
    """
    shard = group.shard(len(latents))
    latents = shard.take(latents)
    (n, _, h, w), factor = latents.shape, models.vae_factor
    frames = np.empty((n, h * factor, w * factor, 3), np.uint8)
    for numbers in _pieces(n, batch_size):
        scaled = latents[numbers].to(models.device, torch.float32)
        scaled = scaled / models.vae.config.scaling_factor
        pixels = models.vae.decode(scaled.to(models.dtype), return_dict=False)[0].float()
        check_decoded(pixels, "VAE", models)
        frames[numbers] = to_frames(pixels)
    return shard.gather(torch.from_numpy(frames)).numpy()


def check_decoded(pixels: Tensor, decoder: str, models: StableDiffusion) -> None:
    """Raises a UserError that names the decoder if its pixels are not finite."""
    if not torch.isfinite(pixels).all():
        raise UserError(
            f"the {decoder}'s frames are not finite in {models.dtype_name}; try {BETTER_DTYPE}"
        )


def to_frames(pixels: Tensor) -> np.ndarray:
    """(n, 3, H, W) colours in [-1, 1], which are clamped, to (n, H, W, 3) uint8."""
    pixels = ((pixels + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _pieces(n: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover 0..n-1."""
    return [slice(start, start + size) for start in range(0, n, size)]


class SquaredError:
    """The squared error of uint8 frames, summed exactly."""

    def __init__(self) -> None:
        self.total = self.count = 0

    def add(self, frames: np.ndarray, reference: np.ndarray) -> None:
        """Adds two uint8 arrays of one shape, frame by frame to bound memory."""
        for frame, other in zip(frames, reference, strict=True):
            self.total += int(np.square(frame.astype(np.int32) - other).sum(dtype=np.int64))
        self.count += frames.size

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; 148 where nothing differs."""
        return float(10 * np.log10(255.0**2 / max(self.total / self.count, 1e-10)))


def psnr(frames: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> float | None:
    """Peak signal-to-noise ratio in dB between two clips; None if the mask is empty.

    Args:
        frames, reference: uint8, of one shape.
        mask: bool, the pixels that count, (n, H, W); by default all.
    """
    error = SquaredError()
    for i in range(len(frames)):
        where = slice(None) if mask is None else mask[i]
        error.add(frames[i][where][None], reference[i][where][None])
    return error.psnr if error.count else None
