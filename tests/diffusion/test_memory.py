"""Forwards that compute few images at a time, and batch sizes by memory, decided without a GPU."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import forward
from tokenflow.cache.source_pass import INJECTED_BLOCK
from tokenflow.diffusion import memory
from tokenflow.diffusion.memory import (
    MOST,
    MOST_VAE,
    ON_CPU,
    SHARE,
    chunked_forward,
    fitting_batch_size,
    unet_batch_size,
    vae_batch_size,
)
from tokenflow_utils import Pass, TokenFlowContext, tokenflow_patch

MIB = 2**20


@pytest.fixture
def unet(tiny_model):
    return UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()


@pytest.mark.parametrize("inject", [False, True])
def test_chunks_of_images_give_the_same(unet, inject):
    def edited(images_at_once):
        context = TokenFlowContext(inject_features=inject)
        bounded = chunked_forward(unet, images_at_once, skip=(INJECTED_BLOCK,))
        with tokenflow_patch(unet, context), bounded:
            forward(unet, frames=5)
            context.mode = Pass.EXTENDED
            return forward(unet, frames=5, seed=9)

    whole = edited(100)
    for images_at_once in (1, 2, 7):
        assert torch.allclose(edited(images_at_once), whole, atol=1e-5)


def test_a_forward_that_a_module_had_of_its_own_comes_back(unet):
    block = unet.mid_block.resnets[0]
    block.forward = own = block.forward
    with chunked_forward(unet, 1):
        assert block.forward is not own
    assert block.forward is own


@pytest.mark.parametrize(
    ("one", "two", "free", "expected"),
    [
        (100, 200, 1000, 8),  # 80 % of the memory
        (100, 150, 1000, 15),  # 50 are taken however many images there are
        (100, 200, 10**9, MOST),
        (1000, 2000, 500, 1),  # not even one fits: the attempt will say so
        (100, 200, 0, 1),
        (100, 100, 1000, MOST),  # a second image takes no more
        (300, 200, 1000, MOST),  # what no allocator should report
    ],
)
def test_as_many_as_fit(one, two, free, expected):
    assert fitting_batch_size(one, two, free) == expected


def test_the_chosen_number_fits_and_one_more_does_not():
    one, two, free = 700, 1100, 9000
    m = fitting_batch_size(one, two, free)
    assert one + (m - 1) * (two - one) <= SHARE * free < one + m * (two - one)


def test_a_number_is_taken_as_it_is_and_a_cpu_is_not_measured():
    denoiser = fake_denoiser("cpu")
    size = (64, 64)
    assert unet_batch_size(3, denoiser, size) == vae_batch_size(3, denoiser.models, size) == 3
    assert unet_batch_size(None, denoiser, size) == ON_CPU
    assert unet_batch_size(None, denoiser, size, most=2) == 2
    assert vae_batch_size(None, denoiser.models, size) == ON_CPU


def test_a_gpu_is_measured_by_one_image_and_by_two(monkeypatch):
    """With a CUDA whose allocator is played: images take 100 MiB each in the UNet."""
    seen, denoiser = [], fake_denoiser("cuda")

    def forward(x, t, frames):
        assert (x.shape[1:], t, frames.tolist()) == ((4, 8, 8), 981, [0] * len(x))
        seen.append(len(x))

    denoiser.side_effect = forward
    fakes = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 50 * MIB,
        "max_memory_allocated": lambda device: (50 + 100 * seen[-1]) * MIB,
        "mem_get_info": lambda device: (1000 * MIB, 4000 * MIB),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert unet_batch_size(None, denoiser, (64, 64)) == 8  # 80 % of 1000 MiB
    assert seen == [1, 2]
    assert unet_batch_size(None, denoiser, (64, 64), most=5) == 5

    def decode(models, latents, batch_size):
        seen.append(len(latents))

    monkeypatch.setattr(memory, "decode_latents", decode)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    assert vae_batch_size(None, denoiser.models, (64, 64)) == MOST_VAE

    def too_large_for_two(x, t, frames):
        seen.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError

    denoiser.side_effect = too_large_for_two
    assert unet_batch_size(None, denoiser, (64, 64)) == 1


def fake_denoiser(device):
    models = SimpleNamespace(
        device=torch.device(device),
        vae_factor=8,
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)),
        schedule=SimpleNamespace(timesteps=lambda n: [981]),
    )
    return Mock(models=models)
