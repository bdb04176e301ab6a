"""How many images a model is given at once where the user does not say: as many as memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.models import StableDiffusion
from tokenflow.diffusion.vae import decode_latents

log = logging.getLogger("tokenflow")

ON_CPU = 8  # a processor is busy with one image already; what more of them cost is memory
MOST = 32  # more at once make no GPU faster
MOST_VAE = 8  # 32 frames of 512x512 have 2^31 numbers in its decoder: too many for some kernels
SHARE = 0.8  # of the free memory: cuDNN's workspaces and fragments need some beside


def unet_batch_size(
    batch_size: int | None, denoiser: Denoiser, size: tuple[int, int], most: int = MOST
) -> int:
    """Images at once for the UNet; on CUDA, where no number is given, by a look at what they take.

    Args:
        batch_size: what the user asks for; None to choose.
        denoiser: of the clip, at least one frame.
        size: (H, W) of the frames.
        most: the largest choice.
    """
    models = denoiser.models
    t = models.schedule.timesteps(1)[0]

    def evaluate(m: int) -> None:
        denoiser(_blank(models, size, m), t, torch.zeros(m, dtype=torch.long))

    return _chosen(batch_size, evaluate, models.device, most)


def vae_batch_size(batch_size: int | None, models: StableDiffusion, size: tuple[int, int]) -> int:
    """Images at once for the VAE, whose activations are far larger. Args: as above."""

    def decode(m: int) -> None:
        decode_latents(models, _blank(models, size, m), m)

    return _chosen(batch_size, decode, models.device, MOST_VAE)


def _blank(models: StableDiffusion, size: tuple[int, int], m: int) -> Tensor:
    grid = (side // models.vae_factor for side in size)
    return torch.zeros(m, models.vae.config.latent_channels, *grid)


def _chosen(
    batch_size: int | None, forward: Callable[[int], None], device: torch.device, most: int
) -> int:
    if batch_size is not None:
        return batch_size
    if device.type != "cuda":
        return min(ON_CPU, most)
    found = min(_measured(forward, device), most)
    log.info("%s: %d images at once", forward.__name__, found)
    return found


def fitting_batch_size(one: int, two: int, free: int) -> int:
    """The images that fit in SHARE of the free memory, from 1 to MOST.

    What m images take is drawn on a straight line through what one and two take.

    Args:
        one, two: bytes that one image and two images at once take at their peak.
        free: bytes.
    """
    each = max(two - one, 1)
    beside = max(one - each, 0)  # taken however many images there are
    return min(max(int((SHARE * free - beside) // each), 1), MOST)


@torch.inference_mode()
def _measured(forward: Callable[[int], None], device: torch.device) -> int:
    """`fitting_batch_size` of a forward of m images, run for one and for two.

    One that does not fit twice is run singly.
    """
    taken = []
    for m in (1, 2):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            forward(m)
        except torch.OutOfMemoryError:
            if m == 1:
                raise
            return 1
        taken.append(torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return fitting_batch_size(*taken, free)
