"""Trains the VAE of the small model, and encodes the training pictures with it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from scripts.shapes.pictures import SIZE, held_out_pictures, save_sheet, to_pixels
from scripts.tiny_model.model_files import make_vae, save_weights
from scripts.tiny_model.settings import Training
from scripts.tiny_model.trainer import train
from tokenflow.diffusion.vae import to_frames
from util import load_tensors, save_tensors

log = logging.getLogger("tokenflow")

LATENT_NOISE = 0.05  # std that the VAE's decoder learns to live with
CROP = 128  # side of the pieces of pictures that it is trained on


def train_vae(training: Training) -> None:
    """Train Stable Diffusion's VAE in small: factor 8, 4 channels, no attention.

    The posterior is the mean with a fixed, small noise: its log variance is a constant.
    """
    pictures = training.pictures()
    count = training.budget.recipes["vae"].batch_size
    examples, _ = held_out_pictures(16)
    sources = to_pixels(examples).to(training.device)

    def loss(vae: nn.Module, generator: torch.Generator) -> Tensor:
        numbers = torch.randint(len(pictures), (count,), generator=generator)
        corners = torch.randint(SIZE - CROP + 1, (count, 2), generator=generator)
        cut = [
            pictures[number][top : top + CROP, left : left + CROP]
            for number, (top, left) in zip(numbers.tolist(), corners.tolist(), strict=True)
        ]
        pixels = to_pixels(np.stack(cut)).to(training.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        mean = vae.encode(pixels).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(training.device)
        error = vae.decode(mean + LATENT_NOISE * noise).sample.float() - pixels
        return error.abs().mean() + error.square().mean() + 1e-4 * mean.float().square().mean()

    @torch.inference_mode()
    def sheet(vae: AutoencoderKL, path: Path) -> None:
        decoded = vae.decode(vae.encode(sources).latent_dist.mean).sample
        error = (decoded.clamp(-1, 1) - sources).square().mean()
        log.info("vae: %.2f dB on held-out pictures", 10 * torch.log10(4 / error))
        save_sheet(path, np.concatenate([examples[:8], to_frames(decoded)[:8]]))

    torch.manual_seed(training.seed)
    if training.start:
        model = AutoencoderKL.from_pretrained(training.start / "vae").float()
    else:
        model = make_vae("trained")
        with torch.no_grad():
            model.quant_conv.weight[4:] = 0
            model.quant_conv.bias[4:] = 2 * np.log(LATENT_NOISE)
    model = model.to(training.device, memory_format=torch.channels_last)
    vae = train(training, "vae", model, loss, sheet, training.hashes())
    latents = _encode(vae, pictures[:1024], training)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    save_weights(training.model / "vae", vae, torch.float16)
    log.info("vae: latents have std %.3f before scaling", latents.std())


@torch.inference_mode()
def _encode(vae: AutoencoderKL, pictures: np.ndarray, training: Training) -> Tensor:
    """Unscaled latents of pictures, (n, 4, h, w) float32 on the CPU."""
    latents = []
    for first in tqdm(range(0, len(pictures), 16), f"latents at {pictures.shape[1]}"):
        pixels = to_pixels(np.array(pictures[first : first + 16]))
        with training.autocast:
            pixels = pixels.to(training.device, memory_format=torch.channels_last)
            latents.append(vae.encode(pixels).latent_dist.mean.float().cpu())
    return torch.cat(latents)


def load_vae(training: Training) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(training.trained("vae").parent).float().eval()
    return vae.to(training.device, memory_format=torch.channels_last)


def picture_latents(training: Training, size: int) -> Tensor:
    """Scaled latents of all pictures, (n, 4, h, w) float16; kept under what they come from."""
    versions = "_".join(filter(None, training.hashes("vae").values()))
    path = training.work / f"latents_{size}_{training.budget.pictures}_{versions}.safetensors"
    if not path.exists():
        vae = load_vae(training)
        latents = _encode(vae, training.pictures(size), training) * vae.config.scaling_factor
        save_tensors(path, {"latents": latents.half()})
    return load_tensors(path)["latents"]
