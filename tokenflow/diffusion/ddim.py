"""DDIM (Song et al. 2021) in both directions: noise schedule, sampling step, inversion step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from util import UserError

CLEAN = -1  # the "timestep" of a clean latent, one step below the last sampling timestep


class NoiseSchedule:
    """The noise levels alpha_t, sigma_t of a checkpoint, and its sampling timesteps.

    x_t = alpha_t * x_0 + sigma_t * eps, with alpha_t^2 + sigma_t^2 = 1. A UserError refuses a model
    that predicts neither eps nor v.
    """

    def __init__(self, scheduler: DDIMScheduler) -> None:
        self.config = dict(scheduler.config)
        self.alphas_cumprod = scheduler.alphas_cumprod.double().tolist()  # alpha_t^2
        self.final_alpha_cumprod = float(scheduler.final_alpha_cumprod)  # alpha^2 at CLEAN
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"this checkpoint's scheduler has prediction_type {self.prediction_type}; "
                "only epsilon and v_prediction models can be inverted here"
            )

    @classmethod
    def of_checkpoint(cls, folder: Path) -> NoiseSchedule:
        """Reads the schedule of a checkpoint's folder."""
        return cls(DDIMScheduler.from_pretrained(folder, subfolder="scheduler"))

    def timesteps(self, n_steps: int) -> list[int]:
        """The n_steps sampling timesteps, noisiest first, spaced as the checkpoint configures.

        With as many steps as the model was trained with, the checkpoint's offset (1 for Stable
        Diffusion) would pass the last timestep, and is left out.

        Raises:
            UserError: if the model was trained with fewer timesteps.
        """
        if n_steps > len(self.alphas_cumprod):
            raise UserError(
                f"{n_steps} steps are more than the model's {len(self.alphas_cumprod)} timesteps"
            )
        scheduler = DDIMScheduler.from_config(self.config)
        scheduler.set_timesteps(n_steps)
        timesteps = scheduler.timesteps.tolist()
        beyond = max(0, timesteps[0] - (len(self.alphas_cumprod) - 1))
        return [t - beyond for t in timesteps]

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """(alpha_t, sigma_t); t may be CLEAN."""
        alpha_squared = self.final_alpha_cumprod if t == CLEAN else self.alphas_cumprod[t]
        return alpha_squared**0.5, (1.0 - alpha_squared) ** 0.5

    def add_noise(self, clean: Tensor, eps: Tensor, t: int) -> Tensor:
        """x_t of a clean latent and a noise of the same shape."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * clean + sigma * eps

    def predict_clean(self, x: Tensor, eps: Tensor, t: int) -> Tensor:
        """x_0 of a latent at timestep t and its noise."""
        alpha, sigma = self.alpha_sigma(t)
        return (x - sigma * eps) / alpha

    def predict_noise(self, x: Tensor, clean: Tensor, t: int) -> Tensor:
        """The noise of a latent at timestep t and its x_0."""
        alpha, sigma = self.alpha_sigma(t)
        return (x - alpha * clean) / sigma


def ddim_step(x: Tensor, eps: Tensor, schedule: NoiseSchedule, t_from: int, t_to: int) -> Tensor:
    """Moves x along the predicted noise from one timestep to another, up or down.

    Args:
        x, eps: a latent at t_from and its predicted noise, of one shape.

    Source: DDIM, Eq. 12 with sigma = 0.
    """
    return schedule.add_noise(schedule.predict_clean(x, eps, t_from), eps, t_to)


def ddim_inversion_step(
    eps_model: Callable[[Tensor, int, Tensor], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    t_from: int,
    t_to: int,
    iterations: int = 1,
    tolerance: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """One DDIM step towards noise: the x' from which sampling's step t_to -> t_from returns to x.

    Sampling evaluates the noise at x', which is not known yet. Plain DDIM inversion
    (iterations = 1) evaluates it at x; each further iteration evaluates it at the last estimate of
    x', a fixed-point iteration whose limit inverts the sampling step exactly. It diverges where an
    iteration flips the error's sign without shrinking it. From the third iteration on, each is
    therefore mixed with the previous one (Anderson acceleration of depth 1, per frame): with g the
    result of an iteration and r = g - estimate, the next estimate is g - c (g - g_before), where
    c = <r, r - r_before> / |r - r_before|^2, and 0 < c < 1 in such a direction.

    A frame is finished, and not evaluated again, once |r| < tolerance * |g|. With a good first
    estimate (`start`) one evaluation can suffice.

    Args:
        eps_model: eps(x, t, rows), the predicted noise at timestep t of the latents with indices
            `rows` in the batch, each independent of the others.
        x: latents at t_from, (m, c, h, w).
        iterations: maximum number of evaluations per latent, at least 1.
        tolerance: relative residual of a finished frame; 0 runs all iterations for every frame.
        start: the first estimate of x', (m, c, h, w); x by default.

    Source: Pan et al. 2023, "Accelerated Iterative Diffusion Inversion", which mixes in this way.
    """
    estimate = x.clone() if start is None else start.clone()
    rows = torch.arange(len(x), device=x.device)  # unfinished frames
    last_found = last_residual = estimate
    for iteration in range(iterations):
        eps = eps_model(estimate[rows], t_to, rows)
        found = ddim_step(x[rows], eps, schedule, t_from, t_to)
        residual = found - estimate[rows]
        if iteration < 2:
            estimate[rows] = found
        else:
            mixing = _least_squares(residual, residual - last_residual)
            estimate[rows] = found - mixing * (found - last_found)
        unfinished = _norms(residual) >= tolerance * _norms(found)
        if not unfinished.any():
            break
        rows, last_found, last_residual = rows[unfinished], found[unfinished], residual[unfinished]
    return estimate


def _norms(x: Tensor) -> Tensor:
    """The norm of each frame, (m,)."""
    return x.flatten(1).norm(dim=1)


def _least_squares(x: Tensor, direction: Tensor) -> Tensor:
    """The c of each frame that minimises |x - c direction|, (m, 1, 1, 1); 0 for no direction."""
    frame = tuple(range(1, x.ndim))
    length = direction.square().sum(frame, keepdim=True)
    return (x * direction).sum(frame, keepdim=True) / length.where(length > 0, torch.inf)
