"""The inversion of a clip as a stream of latents, and its early stop."""

import pytest
import torch

from tokenflow.diffusion.denoiser import Denoiser, encode_prompts
from tokenflow.diffusion.inversion import expected_noise, invert, reconstruct


@pytest.fixture
def denoiser(models):
    with torch.inference_mode():
        return Denoiser(models, encode_prompts(models, ["a wolf"]))


@pytest.fixture(scope="module")
def clean():
    """Three frames, the last of which is far from the others."""
    latents = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    return latents * torch.tensor([0.8, 0.8, 3.0])[:, None, None, None]


def last(stream):
    *_, (_, latents) = stream
    return latents


def test_expected_noise_lies_on_the_line():
    line = lambda t: torch.tensor([3.0, -1.0]) + t * torch.tensor([0.5, 2.0])  # noqa: E731
    assert torch.equal(expected_noise([(1, line(1))], 21), line(1))
    assert torch.allclose(expected_noise([(1, line(1)), (21, line(21))], 51), line(51))


def test_each_timestep_is_given_before_the_next_is_evaluated(denoiser, clean):
    timesteps = denoiser.models.schedule.timesteps(5)[::-1]
    stream = invert(denoiser, clean, timesteps, 2, 0.0, batch_size=2)
    for number, t in enumerate(timesteps, start=1):
        reached, latents = next(stream)
        assert reached == t
        assert latents.shape == clean.shape
        assert denoiser.image_forwards == number * 2 * len(clean)
    assert next(stream, None) is None


def test_latents_that_were_given_do_not_change(denoiser, clean):
    timesteps = denoiser.models.schedule.timesteps(4)[::-1]
    for tolerance in (0.0, 1e-3):
        kept = []
        for _, latents in invert(denoiser, clean, timesteps, 3, tolerance, batch_size=8):
            assert all(torch.equal(x, copy) for x, copy in kept)
            kept.append((latents, latents.clone()))


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_frame_s_inversion_does_not_depend_on_its_batch(denoiser, clean, tolerance):
    timesteps = denoiser.models.schedule.timesteps(10)[::-1]
    together = last(invert(denoiser, clean, timesteps, 4, tolerance, batch_size=8))
    in_twos = last(invert(denoiser, clean, timesteps, 4, tolerance, batch_size=2))
    torch.testing.assert_close(in_twos, together, rtol=1e-4, atol=1e-4)
    for i in range(len(clean)):
        alone = last(invert(denoiser, clean[i : i + 1], timesteps, 4, tolerance, batch_size=8))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_the_early_stop_saves_evaluations_and_no_accuracy(denoiser, clean):
    """A tolerance of 1e-4 comes as near to the exact inverse as 8 evaluations of every step do."""
    timesteps = denoiser.models.schedule.timesteps(20)
    errors, forwards = [], []
    for tolerance in (0.0, 1e-4):
        before = denoiser.image_forwards
        noisy = last(invert(denoiser, clean, timesteps[::-1], 8, tolerance, batch_size=8))
        forwards.append(denoiser.image_forwards - before)
        back = reconstruct(denoiser, noisy, timesteps, batch_size=8)
        errors.append(float((back - clean).norm() / clean.norm()))
    assert forwards[0] == 8 * 20 * len(clean)
    assert forwards[1] < 0.6 * forwards[0]
    assert errors[1] < 1e-3
    plain = last(invert(denoiser, clean, timesteps[::-1], 1, 0.0, batch_size=8))
    back = reconstruct(denoiser, plain, timesteps, batch_size=8)
    assert float((back - clean).norm() / clean.norm()) > 10 * errors[1]


def test_one_evaluation_with_a_tolerance_starts_from_the_expected_noise(denoiser, clean):
    """So it is nearer to the exact inverse than plain DDIM, for the same work."""
    timesteps = denoiser.models.schedule.timesteps(20)
    errors = []
    for tolerance in (0.0, 0.5):
        noisy = last(invert(denoiser, clean, timesteps[::-1], 1, tolerance, batch_size=8))
        back = reconstruct(denoiser, noisy, timesteps, batch_size=8)
        errors.append(float((back - clean).square().mean()))
    assert denoiser.image_forwards == 2 * 2 * 20 * len(clean)
    assert errors[1] < 0.5 * errors[0]
