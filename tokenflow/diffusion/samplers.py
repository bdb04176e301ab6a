"""Samplers: how the predicted noise moves latents from one sampling timestep to the next.

All of them solve the ODE that DDIM inversion solves, on the timesteps whose latents the source
cache holds. So each may start from the cache's latents at any of these timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule, ddim_step


class DDIMSampler:
    """DDIM (`ddim_step`): first order, each step on its own.

    Args:
        timesteps: of the steps to take, noisiest first; the last step leads to clean latents.

    Attributes:
        levels: `timesteps`, and CLEAN: step i leads from levels[i] to levels[i + 1].
    """

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
        self.schedule, self.levels = schedule, [*timesteps, CLEAN]

    def step(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        """Takes step i, after step i - 1.

        Args:
            x, eps: latents at timesteps[i] and their predicted noise, float32 of one shape.

        Returns:
            the latents at the next timestep, of that shape.
        """
        return ddim_step(x, eps, self.schedule, self.levels[i], self.levels[i + 1])

    def state(self) -> dict[str, Tensor]:
        """What the next step takes from those before it, for a checkpoint."""
        return {}

    def resume(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Restores the `state` after `done` steps; `tensors` may hold others too."""


class DPMSolverSampler(DDIMSampler):
    """DPM-Solver++ (2M) by diffusers: second order, from the x0 of this step and the last.

    The first step and the last are of first order, which is DDIM.

    Source: Lu et al. 2022, "DPM-Solver++", Algorithm 2, for noise levels that are not uniform.
    """

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
        super().__init__(schedule, timesteps)
        ends_at_zero = schedule.final_alpha_cumprod == 1.0  # set_alpha_to_one of DDIM's scheduler
        self.scheduler = DPMSolverMultistepScheduler.from_config(
            schedule.config,
            prediction_type="epsilon",  # which a Denoiser returns for every model
            algorithm_type="dpmsolver++",
            solver_order=2,
            euler_at_final=True,
            final_sigmas_type="zero" if ends_at_zero else "sigma_min",
            thresholding=False,
        )
        self.resume(0, {})

    def step(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        return self.scheduler.step(eps, self.levels[i], x).prev_sample

    def state(self) -> dict[str, Tensor]:
        return {"sampler.x0": self.scheduler.model_outputs[-1]}

    def resume(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        scheduler = self.scheduler
        scheduler.set_timesteps(timesteps=self.levels[:-1])
        scheduler.set_begin_index(done)
        if done:
            scheduler.model_outputs[-1] = tensors["sampler.x0"]
            scheduler.lower_order_nums = 1  # the number of x0 that the next step may use


SAMPLERS = {"ddim": DDIMSampler, "dpmpp_2m": DPMSolverSampler}
