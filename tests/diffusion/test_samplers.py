"""DPM-Solver++ (2M) on DDIM's timesteps, against a loop-written reference."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from tests.diffusion.test_ddim import SD_SCHEDULER
from tests.helpers import randn
from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule
from tokenflow.diffusion.samplers import SAMPLERS, DPMSolverSampler


def make_schedule(**changes):
    return NoiseSchedule(DDIMScheduler(**SD_SCHEDULER | changes))


def bent(x, t):
    """A model whose noise depends on all of a latent, and on t."""
    return torch.tanh(0.3 * x.flip(-1) + t / 1000)


def sample(name, schedule, timesteps, x, model=bent):
    sampler = SAMPLERS[name](schedule, timesteps)
    for i, t in enumerate(timesteps):
        x = sampler.step(x, model(x, t), i)
    return x


def reference(schedule, timesteps, x):
    """Algorithm 2 of Lu et al. 2022 in float64, number by number where it can be."""
    x, before = x.double(), None
    for t, t_next in zip(timesteps, [*timesteps[1:], CLEAN], strict=True):
        (alpha, sigma), (alpha_next, sigma_next) = map(schedule.alpha_sigma, (t, t_next))
        x0 = (x - sigma * bent(x, t)) / alpha
        level = math.log(alpha / sigma)
        last = t_next == CLEAN
        h = math.inf if sigma_next == 0 else math.log(alpha_next / sigma_next) - level
        d = x0
        if before is not None and not last:
            ratio = (level - before[1]) / h
            d = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before[0]
        x = (sigma_next / sigma) * x - alpha_next * (math.exp(-h) - 1) * d
        before = x0, level
    return x


@pytest.mark.parametrize("n_steps", [1, 2, 7, 20, 1000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"set_alpha_to_one": True}, {"prediction_type": "v_prediction"}, {"steps_offset": 0}],
)
def test_dpmpp_2m_is_the_paper_s(changes, n_steps):
    """Also of a model that predicts v, whose Denoiser returns eps, and from the middle."""
    schedule, x = make_schedule(**changes), randn(3, 4, 5, 7)
    timesteps = schedule.timesteps(n_steps)
    for taken in (timesteps, timesteps[n_steps // 3 :]):
        found, expected = sample("dpmpp_2m", schedule, taken, x), reference(schedule, taken, x)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, atol=1e-4)


def test_it_is_nearer_to_the_ode_s_solution_than_ddim():
    schedule, x = make_schedule(), randn(2, 4, 5, 7)
    coarse = schedule.timesteps(10)
    exact = sample("ddim", schedule, list(range(coarse[0], 0, -1)), x)
    errors = {name: (sample(name, schedule, coarse, x) - exact).norm() for name in SAMPLERS}
    assert errors["dpmpp_2m"] < 0.5 * errors["ddim"]


@pytest.mark.parametrize("done", range(8))
def test_sampling_resumes_bit_equal(done):
    schedule, x = make_schedule(), randn(2, 4, 5, 7)
    timesteps = schedule.timesteps(7)
    expected = sample("dpmpp_2m", schedule, timesteps, x)
    first = DPMSolverSampler(schedule, timesteps)
    for i in range(done):
        x = first.step(x, bent(x, timesteps[i]), i)
    saved = {"latents": x, **(first.state() if done else {})}
    second = DPMSolverSampler(schedule, timesteps)
    second.resume(done, saved)
    for i in range(done, 7):
        x = second.step(x, bent(x, timesteps[i]), i)
    assert torch.equal(x, expected)
