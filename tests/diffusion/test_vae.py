"""Frames to latents and back; PSNR."""

import numpy as np
import pytest
import torch

from tokenflow.diffusion import vae
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.diffusion.vae import decode_latents, encode_frames, psnr


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_frames_to_latents_and_back(models, batch_size):
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    latents = encode_frames(models, frames, batch_size)
    assert latents.shape == (3, 4, 6, 10)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, encode_frames(models, frames, 3), atol=1e-5)
    decoded = decode_latents(models, latents, batch_size)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8


def test_psnr_of_a_known_error():
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(frames + 5, frames) == pytest.approx(20 * np.log10(255 / 5))


def test_psnr_summed_in_pieces_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8) for _ in range(2))
    expected = 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
    assert psnr(a, b) == pytest.approx(expected, rel=1e-12)
    assert psnr(a, b, np.ones((3, 40, 50), bool)) == psnr(a, b)
    error = vae.SquaredError()
    for part in (slice(0, 1), slice(1, None)):
        error.add(a[part], b[part])
    assert error.psnr == psnr(a, b)


def test_the_vae_s_memory_layout_changes_rounding_only(tiny_model):
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    weight = models.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)

    def both_ways():
        latents = encode_frames(models, frames)
        with torch.inference_mode():
            return latents, models.vae.decode(latents, return_dict=False)[0]

    laid_out = both_ways()
    models.vae.to(memory_format=torch.contiguous_format)
    assert weight.is_contiguous()
    for found, plain in zip(laid_out, both_ways(), strict=True):
        assert float((found - plain).norm() / plain.norm()) < 1e-5
