"""DDIM in both directions, and text and pictures to and from latents."""

import itertools
import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from tokenflow.diffusion import models as diffusion
from tokenflow.diffusion.checkpoints import (
    checkpoint_folder,
    checkpoint_revision,
    controlnet_key_for,
)
from tokenflow.diffusion.conditions import (
    Control,
    ControlSettings,
    canny_edges,
    depth_latents,
    draw_control,
    load_controlnet,
    optical_flow,
)
from tokenflow.diffusion.models import (
    CLEAN,
    Denoiser,
    NoiseSchedule,
    ddim_inversion_step,
    ddim_step,
    decode_latents,
    encode_frames,
    encode_prompts,
    load_stable_diffusion,
    psnr,
    resolve_device,
    resolve_dtype,
)
from util import MissingFileError, UserError

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
    return NoiseSchedule.from_scheduler(DDIMScheduler(**SD_SCHEDULER))


@pytest.fixture(scope="module")
def models(tiny_model):
    return load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def alike(eps_model):
    """A model that treats every row of a batch alike, as `ddim_inversion_step` calls one."""
    return lambda x, t, rows: eps_model(x, t)


def invert(eps_model, x, schedule, timesteps, iterations):
    for t_from, t_to in zip([CLEAN, *timesteps[::-1]], timesteps[::-1], strict=False):
        x = ddim_inversion_step(alike(eps_model), x, schedule, t_from, t_to, iterations)
    return x


def sample(eps_model, x, schedule, timesteps):
    for t, t_next in zip(timesteps, [*timesteps[1:], CLEAN], strict=True):
        x = ddim_step(x, eps_model(x, t), schedule.level(t), schedule.level(t_next))
    return x


# ---------------------------------------------------------------- the schedule


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
        alpha, sigma = schedule.level(t)
        assert alpha**2 + sigma**2 == pytest.approx(1.0)
    assert schedule.level(CLEAN) == schedule.level(0)  # set_alpha_to_one: False


def test_a_step_is_the_scheduler_s(schedule):
    scheduler = DDIMScheduler(**SD_SCHEDULER)
    scheduler.set_timesteps(50)
    x, eps = randn(2, 4, 6, 5, seed=1), randn(2, 4, 6, 5, seed=2)
    for t, t_next in ((981, 961), (21, 1), (1, CLEAN)):
        expected = scheduler.step(eps, t, x).prev_sample
        found = ddim_step(x, eps, schedule.level(t), schedule.level(t_next))
        assert torch.allclose(found, expected, atol=1e-5)


def test_other_predictions_are_refused():
    scheduler = DDIMScheduler(**SD_SCHEDULER, prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type sample"):
        NoiseSchedule.from_scheduler(scheduler)


# ---------------------------------------------------------------- inversion


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
    (alpha_from, sigma_from), (alpha_to, sigma_to) = schedule.level(t_from), schedule.level(t_to)
    slope = torch.tensor([gain, gain / 2, 0.0]) / (sigma_to - sigma_from * alpha_to / alpha_from)

    def model(x, t):
        along = slope[:, None].double() * (x.flatten(1) @ direction)[:, None] * direction
        return along.unflatten(1, x.shape[1:]) + 0.3

    x = randn(3, 4, 4, 4, seed=1, dtype=torch.float64)
    found = ddim_inversion_step(alike(model), x, schedule, t_from, t_to, iterations=3)
    back = ddim_step(found, model(found, t_to), schedule.level(t_to), schedule.level(t_from))
    assert torch.allclose(back, x, atol=1e-9)
    more = ddim_inversion_step(alike(model), x, schedule, t_from, t_to, iterations=9)
    assert torch.allclose(more, found, atol=1e-9)  # and it stays there


def inversion_step_without_stop(eps_model, x, schedule, t_from, t_to, iterations):
    """`ddim_inversion_step` as it was before a step could end early."""
    levels = schedule.level(t_from), schedule.level(t_to)
    estimate = last_found = last_residual = x
    for iteration in range(iterations):
        found = ddim_step(x, eps_model(estimate, t_to), *levels)
        residual = found - estimate
        if iteration < 2:
            estimate = found
        else:
            change = residual - last_residual
            length = change.square().sum((1, 2, 3), keepdim=True)
            mixing = (residual * change).sum((1, 2, 3), keepdim=True)
            mixing = mixing / length.where(length > 0, torch.inf)
            estimate = found - mixing * (found - last_found)
        last_found, last_residual = found, residual
    return estimate


def bent(x, t):
    """A prediction that is no linear function of x."""
    return torch.tanh(x.flip(-1) + t / 1000) + 0.2 * x.mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
def test_without_a_tolerance_every_evaluation_is_made_as_ever(schedule, iterations):
    x = randn(3, 4, 6, 5)
    found = ddim_inversion_step(alike(bent), x, schedule, 21, 41, iterations)
    expected = inversion_step_without_stop(bent, x, schedule, 21, 41, iterations)
    assert torch.equal(found, expected)
    if iterations == 1:
        plain = ddim_step(x, bent(x, 41), schedule.level(21), schedule.level(41))
        assert torch.equal(found, plain)


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


def test_fixed_point_iterations_reconstruct_ever_better_on_the_tiny_unet(models):
    """The error of 20 steps falls monotonically with K on a network."""
    timesteps = models.schedule.timesteps(20)
    denoiser = Denoiser(models, encode_prompts(models, ["a wolf"]))
    frames = torch.arange(2)
    model = lambda x, t: denoiser(x, t, frames)[0]  # noqa: E731
    clean = randn(2, 4, 8, 8, seed=3) * 0.8
    errors = []
    for iterations in (1, 2, 3, 5):
        with torch.inference_mode():
            noisy = invert(model, clean, models.schedule, timesteps, iterations)
            back = sample(model, noisy, models.schedule, timesteps)
        errors.append(float((back - clean).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_v_prediction_gives_the_noise_that_it_stands_for(tiny_v_model):
    models = load_stable_diffusion(tiny_v_model, torch.device("cpu"), torch.float32)
    assert models.schedule.prediction_type == "v_prediction"
    text, x, t = encode_prompts(models, [""]), randn(1, 4, 8, 8), 501
    eps = Denoiser(models, text)(x, t, torch.arange(1))[0]
    v = models.unet(x, t, encoder_hidden_states=text).sample
    scheduler = DDIMScheduler.from_config(models.schedule.config)
    scheduler.set_timesteps(50)
    clean = scheduler.step(v, t, x).pred_original_sample
    alpha, sigma = models.schedule.level(t)
    assert torch.allclose(alpha * clean + sigma * eps, x, atol=1e-5)


def test_a_nan_stops_the_run_and_names_the_step(tiny_model):
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    models.unet.conv_out.bias.data.fill_(float("nan"))
    denoiser = Denoiser(models, encode_prompts(models, [""]))
    with pytest.raises(UserError, match=r"timestep 501 .*float32.*dtype"):
        denoiser(randn(1, 4, 8, 8), 501, torch.arange(1))


def test_loading_leaves_the_models_as_diffusers_makes_them(models, tiny_model):
    controlnet = load_controlnet(str(tiny_model / "controlnet"), models.device, models.dtype)
    for model in (models.unet, controlnet):
        assert {type(processor) for processor in model.attn_processors.values()} == {
            AttnProcessor2_0
        }
        assert not any("forward" in vars(module) for module in model.modules())


# ---------------------------------------------------------------- text and pictures


def test_branches_are_independent(models):
    text = encode_prompts(models, ["a red ball", "a green ball"])
    x = randn(3, 4, 6, 10)
    both = Denoiser(models, text)(x, 300, torch.arange(3))
    assert both.shape == (2, 3, 4, 6, 10)
    for branch in range(2):
        alone = Denoiser(models, text[branch : branch + 1])(x, 300, torch.arange(3))[0]
        assert torch.allclose(both[branch], alone, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-4


def test_a_controlnet_sees_each_branch_s_own_text(models, tiny_model):
    controlnet = load_controlnet(str(tiny_model / "controlnet"), models.device, models.dtype)
    control = Control(controlnet, torch.rand(3, 1, 48, 80))
    text, x = encode_prompts(models, ["a red ball", "a green ball"]), randn(3, 4, 6, 10)
    both = Denoiser(models, text, control=control)(x, 300, torch.arange(3))
    for branch in range(2):
        for frame in range(3):
            alone = Denoiser(models, text[branch : branch + 1], control=control)
            expected = alone(x[frame : frame + 1], 300, torch.tensor([frame]))[0, 0]
            assert torch.allclose(both[branch, frame], expected, atol=1e-5)
    assert (both - Denoiser(models, text)(x, 300, torch.arange(3))).abs().max() > 1e-4


def test_every_image_of_every_branch_is_counted(models):
    denoiser = Denoiser(models, encode_prompts(models, ["a red ball", "a green ball"]))
    assert denoiser.image_forwards == 0
    denoiser(randn(3, 4, 6, 10), 300, torch.arange(3))
    denoiser(randn(1, 4, 6, 10), 300, torch.arange(1))
    assert denoiser.image_forwards == 2 * 3 + 2 * 1


def test_an_overlong_prompt_is_cut_and_said(models, caplog):
    with caplog.at_level(logging.WARNING):
        embedding = encode_prompts(models, ["a red ball " * 100])
    assert embedding.shape[1] == 77
    assert "longer than 77 tokens" in caplog.text
    caplog.clear()
    encode_prompts(models, ["a red ball"])
    assert not caplog.records


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_frames_to_latents_and_back(models, batch_size):
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    latents = encode_frames(models, frames, batch_size)
    assert latents.shape == (3, 4, 6, 10)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, encode_frames(models, frames, 3), atol=1e-5)
    decoded = decode_latents(models, latents, batch_size)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8


def test_psnr_of_a_known_error():
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(frames + 5, frames) == pytest.approx(20 * np.log10(255 / 5))


@pytest.mark.parametrize("shape", [(3, 40, 50, 3), (6000, 3), (1, 1)])
def test_psnr_summed_in_pieces_is_that_of_the_whole(shape, monkeypatch):
    monkeypatch.setattr(diffusion, "_VALUES_AT_ONCE", 1000)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
    expected = 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
    assert psnr(a, b) == pytest.approx(expected, rel=1e-12)
    error = diffusion.SquaredError()
    for part in (slice(0, 1), slice(1, None)):
        error.add(a[part], b[part])
    assert error.psnr == psnr(a, b)
    with pytest.raises(ValueError, match="not the same"):
        psnr(a, b[:, :1] if shape != (1, 1) else b[:0])


# ---------------------------------------------------------------- spatial conditions


def test_canny_finds_the_edge_and_nothing_else():
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[1, :, 16:] = 255
    edges = canny_edges(frames, 100, 200)
    assert edges.shape == (2, 3, 32, 32)
    assert edges[0].max() == 0
    assert set(edges[1].unique().tolist()) == {0.0, 1.0}
    assert edges[1][:, :, [0, 8, 24, 31]].max() == 0


def test_depth_latents_span_their_range():
    depth = torch.linspace(0, 1, 64)[None, None, None].expand(1, 1, 64, 64)
    latents = depth_latents(depth, (8, 8))
    assert latents.shape == (1, 1, 8, 8)
    assert -1 <= latents.min() < -0.8
    assert 0.8 < latents.max() <= 1


def test_optical_flow_points_where_pixels_go():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    frame = small.repeat(8, axis=0).repeat(8, axis=1)
    flow = optical_flow(frame, np.roll(frame, (2, 5), axis=(0, 1)))  # 2 down, 5 right
    assert flow[0, 24:72, 24:72].median() == pytest.approx(5, abs=0.5)
    assert flow[1, 24:72, 24:72].median() == pytest.approx(2, abs=0.5)


# ---------------------------------------------------------------- checkpoints and devices


def test_revision_is_of_the_content_not_of_the_path(tiny_model, tiny_v_model, tmp_path):
    link = tmp_path / "elsewhere"
    link.symlink_to(tiny_model)
    assert checkpoint_revision(link) == checkpoint_revision(checkpoint_folder(str(tiny_model)))
    assert checkpoint_revision(tiny_v_model) != checkpoint_revision(link)


def test_a_checkpoint_without_a_part_is_named(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for part in ("unet", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (folder / part).symlink_to(tiny_model / part)
    with pytest.raises(MissingFileError, match=r"broken: .*vae/config\.json is missing"):
        checkpoint_folder(str(folder))


def test_a_checkpoint_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere: no such folder, and not a hub id"):
        checkpoint_folder(str(tmp_path / "nowhere"))


def test_an_unknown_controlnet_is_said():
    with pytest.raises(UserError, match="no depth ControlNet is known for sd_version tiny"):
        controlnet_key_for("tiny", "depth")


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device: gpu is unknown"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="device: cuda:99 was asked for"):
        resolve_device("cuda:99")


def test_automatic_dtypes():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_the_vae_s_memory_layout_changes_rounding_only(tiny_model):
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    weight = models.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)

    def both_ways():
        latents = encode_frames(models, frames)
        with torch.inference_mode():
            return latents, models.vae.decode(latents, return_dict=False)[0]

    laid_out = both_ways()
    models.vae.to(memory_format=torch.contiguous_format)
    assert weight.is_contiguous()
    for found, plain in zip(laid_out, both_ways(), strict=True):
        assert float((found - plain).norm() / plain.norm()) < 1e-5


def test_a_controlnet_s_pictures_are_its_canny_edges(tiny_model):
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    settings = ControlSettings("canny", str(tiny_model / "controlnet"), 1.0, 100, 200)
    controlnet = load_controlnet(settings.key, torch.device("cpu"), torch.float32)
    control = draw_control(controlnet, settings, frames, None)
    assert control.images.dtype == torch.uint8
    assert torch.equal(control.images.expand(-1, 3, -1, -1).float(), canny_edges(frames, 100, 200))
