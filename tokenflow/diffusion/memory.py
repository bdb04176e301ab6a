"""Bounded memory: few images at a time in a network, and batch sizes by the free GPU memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.models import StableDiffusion
from tokenflow.diffusion.vae import decode_latents

log = logging.getLogger("tokenflow")

ON_CPU = 8  # larger batches cost memory and are no faster
MOST = 32  # larger batches are no faster on any GPU
MOST_VAE = 8  # 32 frames of 512x512 have 2^31 values in its decoder: too many for some kernels
SHARE = 0.8  # of the free memory: cuDNN's workspaces and fragmentation need the rest

# Modules that compute image by image and whose inner activations are several times their input.
PER_IMAGE = (
    ResnetBlock2D, Downsample2D, Upsample2D, FeedForward, ControlNetConditioningEmbedding,
)  # fmt: skip


@contextmanager
def chunked_forward(
    model: nn.Module, images_at_once: int, skip: Collection[str] = ()
) -> Iterator[None]:
    """Lets a model's `PER_IMAGE` modules compute at most `images_at_once` images at a time.

    Extended attention needs all keyframes at the same layer at the same time, so their batch goes
    through the UNet as one. With this, only hidden states, keys and values grow with that batch.
    Results do not change. Each module's forward is wrapped, and restored on leaving.

    Args:
        model: UNet or ControlNet, changed in place.
        skip: names of modules that keep their forward.
    """
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, PER_IMAGE) and name not in skip
    ]
    with ExitStack() as undo:
        for module in modules:
            if "forward" in module.__dict__:  # accelerate wraps it in the same way
                undo.callback(setattr, module, "forward", module.forward)
            else:
                undo.callback(delattr, module, "forward")
            module.forward = _chunked(module.forward, images_at_once)
        yield


def _chunked(whole: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: object) -> Tensor:
        n = len(hidden)
        if n <= size:
            return whole(hidden, *args)
        chunks = []
        for start in range(0, n, size):
            images = slice(start, start + size)
            per_image = (isinstance(x, Tensor) and x.shape[:1] == (n,) for x in args)
            some = (x[images] if split else x for x, split in zip(args, per_image, strict=True))
            chunks.append(whole(hidden[images], *some))
        return torch.cat(chunks)

    return forward


def unet_batch_size(
    batch_size: int | None, denoiser: Denoiser, size: tuple[int, int], most: int = MOST
) -> int:
    """The UNet's batch size; on CUDA, two trial forwards measure the memory that images take.

    Args:
        batch_size: the user's choice, which is returned; None to choose.
        denoiser: the clip's; at least one frame.
        size: (H, W) of the frames.
        most: upper bound of the choice.
    """
    t = denoiser.models.schedule.timesteps(1)[0]

    def evaluate(latents: Tensor) -> None:
        denoiser(latents, t, torch.zeros(len(latents), dtype=torch.long))

    return _chosen(batch_size, evaluate, denoiser.models, size, most)


def vae_batch_size(batch_size: int | None, models: StableDiffusion, size: tuple[int, int]) -> int:
    """The VAE's batch size; its activations are far larger. Args: see `unet_batch_size`."""

    def decode(latents: Tensor) -> None:
        decode_latents(models, latents, len(latents))

    return _chosen(batch_size, decode, models, size, MOST_VAE)


def fitting_batch_size(one: int, two: int, free: int) -> int:
    """The number of images that fit in SHARE of the free memory, from 1 to MOST.

    Memory is assumed to grow linearly with the number of images.

    Args:
        one, two: peak bytes of one image and of two images in a batch.
        free: free bytes.
    """
    each = max(two - one, 1)
    constant = max(one - each, 0)  # independent of the number of images
    return min(max(int((SHARE * free - constant) // each), 1), MOST)


@torch.inference_mode()
def _chosen(
    batch_size: int | None,
    forward: Callable[[Tensor], None],
    models: StableDiffusion,
    size: tuple[int, int],
    most: int,
) -> int:
    device, taken = models.device, []
    if batch_size is not None:
        return batch_size
    if device.type != "cuda":
        return min(ON_CPU, most)
    grid = (side // models.vae_factor for side in size)
    images = torch.zeros(2, models.vae.config.latent_channels, *grid)
    for m in (1, 2):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            forward(images[:m])
        except torch.OutOfMemoryError:
            if m == 1:
                raise
            return 1
        taken.append(torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    found = min(fitting_batch_size(*taken, torch.cuda.mem_get_info(device)[0]), most)
    log.info("%s: %d images at once", forward.__name__, found)
    return found
