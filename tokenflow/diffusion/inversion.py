"""DDIM inversion of a clip, frame by frame, and its reconstruction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule, ddim_inversion_step, ddim_step
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.ops.progress import Progress
from util import UserError


@dataclass(frozen=True)
class InversionTimesteps:
    """The timesteps of an inversion (cleanest first) and of what follows it (noisiest first)."""

    inversion: list[int]
    reconstruction: list[int]
    sampling: list[int]  # of edits
    saved: list[int]  # whose latents are written: `sampling` and the noisiest


def inversion_timesteps(
    schedule: NoiseSchedule, steps: int, save_steps: int, recon_steps: int
) -> InversionTimesteps:
    """Computes the timesteps for the given numbers of steps.

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
    if schedule.alpha_sigma(inversion[0])[0] == 0.0:
        raise UserError(
            f"--steps: {steps} reaches timestep {inversion[0]}, where this model's schedule is "
            "pure noise (zero terminal SNR) and cannot be inverted"
        )
    saved = sorted({*sampling, inversion[0]}, reverse=True)
    return InversionTimesteps(inversion[::-1], reconstruction, sampling, saved)


@torch.inference_mode()
def invert(
    denoiser: Denoiser,
    latents: Tensor,
    timesteps: Sequence[int],
    iterations: int,
    tolerance: float,
    batch_size: int,
    t: int = CLEAN,
    past: list[tuple[int, Tensor]] | None = None,
    frames: Tensor | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Inverts every frame independently by DDIM.

    With a tolerance, each step starts from the noise extrapolated from the previous steps, and
    stops for a frame as soon as its residual is below the tolerance (`ddim_inversion_step`).

    Args:
        denoiser: the model under the inversion prompt, without guidance.
        latents: (n, 4, h, w) float32 latents at timestep t, on the CPU; n may be 0.
        timesteps: ascending; those up to t are skipped.
        iterations: maximum number of noise evaluations per frame and step.
        tolerance: relative residual at which a frame's step stops; 0 uses all evaluations and
            starts from plain DDIM's estimate.
        batch_size: frames evaluated at once.
        t: the timestep of `latents`: CLEAN, or the last one of an interrupted inversion.
        past: (timestep, noise) of the last two steps, updated in place; with a tolerance, a
            resumed inversion needs it to give the same result.
        frames: the frames' indices in the clip; 0..n-1 by default.
        progress: of the run that this is a stage of, in evaluations of a frame.

    Yields:
        (timestep, latents), the latents (n, 4, h, w) on the CPU.
    """
    schedule, x = denoiser.models.schedule, latents
    past = past if past is not None else []
    frames = torch.arange(len(x)) if frames is None else frames
    noise = torch.empty_like(x)  # of each frame's last evaluation

    def eps_model(latents: Tensor, t: int, rows: Tensor) -> Tensor:
        noise[rows] = predicted_noise(denoiser, latents, t, frames[rows], batch_size)
        return noise[rows]

    steps = list(zip([CLEAN, *timesteps[:-1]], timesteps, strict=True))
    done = sum(t_to <= t for t_to in timesteps)
    progress = progress or Progress(shown=False)
    for t_from, t_to in progress.over(steps[done:], "invert", iterations * len(x), done):
        start = None
        if tolerance and past:
            start = ddim_step(x, expected_noise(past, t_to), schedule, t_from, t_to)
        x = ddim_inversion_step(eps_model, x, schedule, t_from, t_to, iterations, tolerance, start)
        past[:] = [*past[-1:], (t_to, noise.clone())]
        yield t_to, x


def predicted_noise(
    denoiser: Denoiser, x: Tensor, t: int, frames: Tensor, batch_size: int
) -> Tensor:
    """A denoiser's noise at timestep t without guidance, on the CPU, computed in batches."""
    eps = torch.empty_like(x)
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        eps[part] = denoiser(x[part], t, frames[part])[0].cpu()
    return eps


def expected_noise(past: Sequence[tuple[int, Tensor]], t: int) -> Tensor:
    """Extrapolates the noise linearly to timestep t.

    Args:
        past: one or two (timestep, noise) pairs; a single noise is returned as it is.
    """
    (t_last, last), (t_before, before) = past[-1], past[0]
    if t_last == t_before:
        return last
    return last + (t - t_last) / (t_last - t_before) * (last - before)


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    noisy: Tensor,
    timesteps: Sequence[int],
    batch_size: int,
    t: int | None = None,
    frames: Tensor | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """DDIM sampling from inverted latents under the inversion prompt, without guidance.

    Args:
        noisy: (n, 4, h, w) latents at timestep t, on the CPU; n may be 0.
        timesteps: descending; those above t are skipped.
        t: the timestep of `noisy`, by default the first.
        frames, progress: see `invert`.

    Yields:
        (timestep, latents) after each step, CLEAN last; the latents (n, 4, h, w) on the CPU.
    """
    schedule, x = denoiser.models.schedule, noisy
    frames = torch.arange(len(x)) if frames is None else frames
    steps = list(zip(timesteps, [*timesteps[1:], CLEAN], strict=True))
    done = 0 if t is None else timesteps.index(t)
    progress = progress or Progress(shown=False)
    for t_from, t_to in progress.over(steps[done:], "reconstruct", len(x), done):
        eps = predicted_noise(denoiser, x, t_from, frames, batch_size)
        x = ddim_step(x, eps, schedule, t_from, t_to)
        yield t_to, x


def reconstruct(
    denoiser: Denoiser, noisy: Tensor, timesteps: Sequence[int], batch_size: int
) -> Tensor:
    """The clean latents (n, 4, h, w) at the end of `sample`."""
    *_, (_, latents) = sample(denoiser, noisy, timesteps, batch_size)
    return latents
