"""DDIM inversion of a clip, frame by frame, and its reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import CLEAN, Denoiser, NoiseSchedule, ddim_inversion_step, ddim_step
from util import UserError


@dataclass(frozen=True)
class InversionTimesteps:
    """The timesteps of an inversion.

    Attributes:
        inversion: of the inversion's steps, cleanest first.
        reconstruction: of the reconstruction, noisiest first.
        saved: whose latents are written, noisiest first: the sampling timesteps and the noisiest.
    """

    inversion: list[int]
    reconstruction: list[int]
    saved: list[int]


def inversion_timesteps(
    schedule: NoiseSchedule, steps: int, save_steps: int, recon_steps: int
) -> InversionTimesteps:
    """The timesteps of an inversion with these numbers of steps.

    Raises:
        UserError: if the sampling timesteps are not among the inversion's, or a timestep has no
            signal left to invert from.
    """
    inversion = schedule.timesteps(steps)
    sampling, reconstruction = schedule.timesteps(save_steps), schedule.timesteps(recon_steps)
    for name, wanted in (("save_steps", sampling), ("recon_steps", reconstruction)):
        if not set(wanted) <= set(inversion):
            raise UserError(
                f"--{name}: {len(wanted)}: its timesteps are not among those of --steps {steps}; "
                f"choose --steps so that it divides {len(schedule.alphas_cumprod)}"
            )
    if schedule.level(inversion[0])[0] == 0.0:
        raise UserError(
            f"--steps: {steps} reaches timestep {inversion[0]}, where this model's schedule is "
            "pure noise (zero terminal SNR) and cannot be inverted"
        )
    saved = sorted({*sampling, inversion[0]}, reverse=True)
    return InversionTimesteps(inversion[::-1], reconstruction, saved)


@torch.inference_mode()
def invert(
    denoiser: Denoiser,
    clean: Tensor,
    timesteps: Sequence[int],
    iterations: int,
    batch_size: int,
    keep: set[int],
) -> dict[int, Tensor]:
    """DDIM inversion of every frame on its own.

    Args:
        denoiser: the model under the inversion prompt, without guidance.
        clean: (n, 4, h, w) float32 latents.
        timesteps: ascending.
        iterations: noise evaluations per step, see `ddim_inversion_step`.
        batch_size: frames evaluated at once.
        keep: timesteps whose latents are returned.

    Returns:
        the latents (n, 4, h, w) at each timestep to keep, on the CPU.
    """
    schedule, x, kept = denoiser.models.schedule, clean, {}
    chunks = torch.arange(len(clean)).split(batch_size)
    steps = list(zip([CLEAN, *timesteps[:-1]], timesteps, strict=True))
    for t_from, t_to in tqdm(steps, desc="invert", unit="step"):
        x = torch.cat([
            ddim_inversion_step(
                lambda latents, t, frames=frames: denoiser(latents, t, frames)[0],
                x[frames].to(denoiser.models.device),
                schedule,
                t_from,
                t_to,
                iterations,
            ).cpu()
            for frames in chunks
        ])  # fmt: skip
        if t_to in keep:
            kept[t_to] = x
    return kept


@torch.inference_mode()
def reconstruct(
    denoiser: Denoiser, noisy: Tensor, timesteps: Sequence[int], batch_size: int
) -> Tensor:
    """DDIM sampling from inverted latents under the inversion prompt, without guidance.

    Args:
        noisy: (n, 4, h, w) latents at timesteps[0].
        timesteps: descending.

    Returns:
        (n, 4, h, w) clean latents on the CPU.
    """
    schedule, x = denoiser.models.schedule, noisy
    chunks = torch.arange(len(noisy)).split(batch_size)
    steps = list(zip(timesteps, [*timesteps[1:], CLEAN], strict=True))
    for t, t_next in tqdm(steps, desc="reconstruct", unit="step"):
        eps = torch.cat([denoiser(x[frames], t, frames)[0].cpu() for frames in chunks])
        x = ddim_step(x, eps, schedule.level(t), schedule.level(t_next))
    return x
