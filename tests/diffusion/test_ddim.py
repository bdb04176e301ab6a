"""DDIM in both directions."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from tests.helpers import randn
from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule, ddim_inversion_step, ddim_step
from util import UserError

SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(DDIMScheduler(**SD_SCHEDULER))


def alike(eps_model):
    """A model that treats every row of a batch alike, as `ddim_inversion_step` calls one."""
    return lambda x, t, rows: eps_model(x, t)


def invert(eps_model, x, schedule, timesteps, iterations):
    for t_from, t_to in zip([CLEAN, *timesteps[::-1]], timesteps[::-1], strict=False):
        x = ddim_inversion_step(alike(eps_model), x, schedule, t_from, t_to, iterations)
    return x


def sample(eps_model, x, schedule, timesteps):
    for t, t_next in zip(timesteps, [*timesteps[1:], CLEAN], strict=True):
        x = ddim_step(x, eps_model(x, t), schedule, t, t_next)
    return x


def test_timesteps_are_stable_diffusion_s(schedule):
    assert schedule.timesteps(50)[:2] == [981, 961]
    assert schedule.timesteps(50)[-1] == 1
    assert schedule.timesteps(500)[0] == 999
    with pytest.raises(UserError, match="1001 steps are more than the model's 1000"):
        schedule.timesteps(1001)


def test_as_many_steps_as_levels_stay_among_them(schedule):
    """The offset of 1 would lead to a timestep 1000, which has no level."""
    every = schedule.timesteps(1000)
    assert every == list(range(999, -1, -1))
    assert set(schedule.timesteps(50)) < set(every)


def test_levels_are_variance_preserving(schedule):
    for t in (CLEAN, 1, 500, 999):
        alpha, sigma = schedule.alpha_sigma(t)
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
    assert schedule.alpha_sigma(CLEAN) == schedule.alpha_sigma(0)  # set_alpha_to_one: False


def test_a_step_is_the_scheduler_s(schedule):
    scheduler = DDIMScheduler(**SD_SCHEDULER)
    scheduler.set_timesteps(50)
    x, eps = randn(2, 4, 6, 5, seed=1), randn(2, 4, 6, 5, seed=2)
    for t, t_next in ((981, 961), (21, 1), (1, CLEAN)):
        expected = scheduler.step(eps, t, x).prev_sample
        found = ddim_step(x, eps, schedule, t, t_next)
        assert torch.allclose(found, expected, atol=1e-5)


def test_one_iteration_is_plain_ddim_inversion(schedule):
    x, bent = randn(3, 4, 6, 5), lambda x, t: torch.tanh(x.flip(-1) + t / 1000)
    found = ddim_inversion_step(alike(bent), x, schedule, 21, 41)
    plain = ddim_step(x, bent(x, 41), schedule, 21, 41)
    assert torch.equal(found, plain)


def test_other_predictions_are_refused():
    scheduler = DDIMScheduler(**SD_SCHEDULER, prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type sample"):
        NoiseSchedule(scheduler)


def test_inversion_of_a_noise_that_ignores_x_is_exact_at_once(schedule):
    noise = randn(1, 4, 8, 8, seed=5, dtype=torch.float64)
    model = lambda x, t: noise * (1 + t / 1000)  # noqa: E731
    clean, timesteps = randn(2, 4, 8, 8, dtype=torch.float64), schedule.timesteps(20)
    noisy = invert(model, clean, schedule, timesteps, iterations=1)
    assert (noisy - clean).abs().max() > 1
    assert torch.allclose(sample(model, noisy, schedule, timesteps), clean, atol=1e-10)


def test_inversion_of_a_linear_model_is_exact_in_the_limit(schedule):
    model = lambda x, t: 0.4 * x + 0.1 * x.flip(-1)  # noqa: E731
    clean, timesteps = randn(2, 4, 8, 8, dtype=torch.float64), schedule.timesteps(50)
    errors = []
    for iterations in (1, 2, 4, 30):
        noisy = invert(model, clean, schedule, timesteps, iterations)
        errors.append(float((sample(model, noisy, schedule, timesteps) - clean).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-10


@pytest.mark.parametrize("gain", [-0.7, -1.0, -1.5])
def test_mixing_finds_the_inverse_where_the_iteration_turns_round(schedule, gain):
    """A prediction along one direction only, in which an iteration multiplies the error by `gain`.

    Three evaluations are exact there, in every frame whatever the others do.
    """
    direction = torch.nn.functional.normalize(randn(64, dtype=torch.float64), dim=0)
    t_from, t_to = 661, 681
    (alpha_from, sigma_from), (alpha_to, sigma_to) = (
        schedule.alpha_sigma(t_from),
        schedule.alpha_sigma(t_to),
    )
    slope = torch.tensor([gain, gain / 2, 0.0]) / (sigma_to - sigma_from * alpha_to / alpha_from)

    def model(x, t):
        along = slope[:, None].double() * (x.flatten(1) @ direction)[:, None] * direction
        return along.unflatten(1, x.shape[1:]) + 0.3

    x = randn(3, 4, 4, 4, seed=1, dtype=torch.float64)
    found = ddim_inversion_step(alike(model), x, schedule, t_from, t_to, iterations=3)
    back = ddim_step(found, model(found, t_to), schedule, t_to, t_from)
    assert torch.allclose(back, x, atol=1e-9)
    more = ddim_inversion_step(alike(model), x, schedule, t_from, t_to, iterations=9)
    assert torch.allclose(more, found, atol=1e-9)  # and it stays there


def frames_of_unequal_difficulty():
    """Latents, and a model under which an iteration shrinks their errors at unequal rates."""
    gains = torch.tensor([0.0, 0.05, 0.6, 0.9], dtype=torch.float64)

    def model(x, t, rows):
        evaluated.append(rows.tolist())
        return 8 * gains[rows, None, None, None] * torch.sin(x) + 0.3

    evaluated = []
    return randn(4, 4, 4, 4, seed=1, dtype=torch.float64), model, evaluated


def test_a_finished_frame_is_not_evaluated_again(schedule):
    x, model, evaluated = frames_of_unequal_difficulty()
    ddim_inversion_step(model, x, schedule, 661, 681, 30, tolerance=1e-4)
    assert evaluated[0] == [0, 1, 2, 3]
    assert all(set(after) <= set(before) for before, after in itertools.pairwise(evaluated))
    counts = [sum(i in rows for rows in evaluated) for i in range(4)]
    assert counts == sorted(counts)
    assert counts[0] == 2  # one evaluation, and one that finds no change
    assert counts[0] < counts[1] < counts[3] < 30


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_the_early_stop_is_as_near_as_its_tolerance(schedule, tolerance):
    x, model, _ = frames_of_unequal_difficulty()
    exact = ddim_inversion_step(model, x, schedule, 661, 681, 200)
    found = ddim_inversion_step(model, x, schedule, 661, 681, 200, tolerance)
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 2 * tolerance
    assert not torch.equal(found, exact)


def test_a_frame_s_early_stop_is_its_own(schedule):
    """Bit by bit, for a model that is."""
    x, model, _ = frames_of_unequal_difficulty()
    together = ddim_inversion_step(model, x, schedule, 661, 681, 9, 1e-3)
    for i in range(len(x)):
        alone = lambda x, t, rows, i=i: model(x, t, rows + i)  # noqa: E731
        found = ddim_inversion_step(alone, x[i : i + 1], schedule, 661, 681, 9, 1e-3)
        assert torch.equal(found[0], together[i])


def test_a_good_start_ends_a_step_at_once(schedule):
    x, model, evaluated = frames_of_unequal_difficulty()
    exact = ddim_inversion_step(model, x, schedule, 661, 681, 200)
    evaluated.clear()
    found = ddim_inversion_step(model, x, schedule, 661, 681, 9, 1e-3, start=exact)
    assert evaluated == [[0, 1, 2, 3]]
    assert torch.allclose(found, exact, atol=1e-12)
