"""How many images a model is given at once where the user does not say: as many as memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusion import Denoiser, StableDiffusion, decode_latents

log = logging.getLogger("tokenflow")

ON_CPU = 8  # a processor is busy with one image already; what more of them cost is memory
MOST = 32  # more at once make no GPU faster
SHARE = 0.8  # of the free memory: cuDNN's workspaces and fragments need some beside


@dataclass(frozen=True)
class BatchSizes:
    """Images at once for the UNet, and for the VAE, whose activations are far larger."""

    unet: int
    vae: int


def choose_batch_sizes(
    batch_size: int | None, models: StableDiffusion, denoiser: Denoiser, size: tuple[int, int]
) -> BatchSizes:
    """The batch sizes for a clip; on CUDA, where none is given, by a look at what images take.

    Args:
        batch_size: what the user asks for; None to choose.
        denoiser: of the clip, at least one frame.
        size: (H, W) of the frames.
    """
    if batch_size is not None:
        return BatchSizes(batch_size, batch_size)
    if models.device.type != "cuda":
        return BatchSizes(ON_CPU, ON_CPU)
    grid = tuple(side // models.vae_factor for side in size)
    channels = models.vae.config.latent_channels
    t = models.schedule.timesteps(1)[0]

    def evaluate(m: int) -> None:
        denoiser(torch.zeros(m, channels, *grid), t, torch.zeros(m, dtype=torch.long))

    def decode(m: int) -> None:
        decode_latents(models, torch.zeros(m, channels, *grid), m)

    sizes = BatchSizes(_measured(evaluate, models.device), _measured(decode, models.device))
    log.info("batches: %d images in the UNet, %d in the VAE", sizes.unet, sizes.vae)
    return sizes


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
