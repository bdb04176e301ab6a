"""The denoising loop on the tiny model, whole, against a loop-written float64 reference."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import run_tokenflow_controlnet
import run_tokenflow_pnp
import run_tokenflow_sdedit
from run_tokenflow_controlnet import ControlNetConfig
from run_tokenflow_pnp import PnPConfig
from run_tokenflow_sdedit import SDEditConfig, steps_from
from tests import reference
from tests.helpers import HEIGHT, WIDTH, edit_keys, invert, make_clip, save_masks
from tokenflow.cache.source_pass import INJECTED_BLOCK
from tokenflow.diffusion.denoiser import encode_prompts
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.techniques import EditPlan
from tokenflow.storage.work_dir import WorkDir, resumable_dir

N_FRAMES = 7  # of 48x80: latents of 6x10, token grids of 6x10, 3x5, 2x3 and 1x2
STEPS = 5
SOURCE_PROMPT = "a disc on a wall"


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def make_cache(folder, model, **options):
    """A clip and its cache in `folder`; returns the keys that a config needs to find them."""
    clip = make_clip(folder / "clip.mp4", N_FRAMES)
    settings = {"steps": 20, "save_steps": STEPS, "inversion_prompt": SOURCE_PROMPT, **options}
    invert(clip, folder / "latents", model, n_frames=N_FRAMES, **settings)
    keys = {"n_inversion_steps": settings["steps"], "n_timesteps": STEPS, "n_frames": N_FRAMES}
    keys |= {"sd_version": options.get("sd_version", "2.1"), "negative_prompt": "ugly"}
    return edit_keys(
        folder, model, **keys
    )  # its keyframe_interval of 3 leaves a short last interval


@pytest.fixture(scope="module")
def keys(tiny_model, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), tiny_model)


def edit(script, config, keys, **changes):
    session = EditSession(open_edit_inputs(config(**{**keys, **changes})))
    return session.edit_latents(script.plan(session))


pnp = partial(edit, run_tokenflow_pnp, PnPConfig)
sdedit = partial(edit, run_tokenflow_sdedit, SDEditConfig)
controlnet = partial(edit, run_tokenflow_controlnet, ControlNetConfig)


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("propagation", ["paper", "released"])
@pytest.mark.parametrize("technique", ["pnp", "sdedit"])
def test_edit_matches_the_reference(keys, propagation, technique):
    config = PnPConfig(**keys, propagation=propagation)
    session = EditSession(open_edit_inputs(config))
    plan = run_tokenflow_pnp.plan(session)
    assert (plan.attention_steps, plan.feature_steps) == (2, 4)  # of 5: some steps with each
    if technique == "sdedit":
        plan = EditPlan(plan.timesteps[1:], session.noisy_start(plan.timesteps[1], "shared"))
    models = session.models
    texts = encode_prompts(models, [SOURCE_PROMPT, config.negative_prompt, config.prompt])
    other = reference.ReferenceEdit(
        models.unet, models.schedule.config, texts, propagation, "sigmoid", config.keyframe_interval
    )
    generator = torch.Generator().manual_seed(config.keyframe_seed)
    keyframes = [
        [start + int(torch.randint(length, (1,), generator=generator)) for start, length in drawn]
        for drawn in [((0, 3), (3, 3), (6, 1))] * STEPS
    ]
    expected = other.sample(
        plan.start,
        {t: session.cache.latents(t, N_FRAMES) for t in plan.timesteps},
        plan.timesteps,
        keyframes if propagation == "released" else keyframes[-len(plan.timesteps) :],
        config.guidance_scale,
        plan.attention_steps,
        plan.feature_steps,
    )
    found = session.edit_latents(plan)
    assert found.shape == (N_FRAMES, 4, 6, 10)  # no frame is dropped
    assert relative_error(found, expected) < 1e-4
    assert relative_error(plan.start, expected) > 0.1  # there was something to compute


def test_pnp_with_everything_injected_and_the_source_prompt_gives_the_source(tiny_model, tmp_path):
    """Injection of all and the source's own prompt leaves nothing to change.

    Each frame's edit pass is then the source pass, as long as its latents are the source's; the
    inversion (30 fixed-point iterations) makes sampling's latents those, so only its error, of
    float32 amplified over the steps, is left: 5e-4 of the latents' norm.
    """
    keys = make_cache(tmp_path, tiny_model, steps=STEPS, inversion_iters=30)
    everything = {"prompt": SOURCE_PROMPT, "guidance_scale": 1.0, "pnp_attn_t": 1, "pnp_f_t": 1}
    session = EditSession(open_edit_inputs(PnPConfig(**{**keys, **everything})))
    source = session.cache.latents("clean", N_FRAMES)
    same = pnp(keys, **everything, consistency="none")
    assert relative_error(same, source.double()) < 5e-4
    other = pnp(keys, **{**everything, "prompt": "a green star"}, consistency="none")
    assert relative_error(other, source.double()) > 1e-3
    # Propagation blends neighbouring frames' tokens, so it is near the source (0.047 was measured
    # with torch 2.6 and 2.15), not on it.
    near = relative_error(pnp(keys, **everything), source.double())
    assert 5e-4 < near < 0.1


# ---------------------------------------------------------------- reproducibility and chunks


def test_two_runs_are_bit_equal(keys):
    assert torch.equal(pnp(keys), pnp(keys))
    start = {"use_ddim_noise": False}
    assert torch.equal(sdedit(keys, **start), sdedit(keys, **start))
    assert not torch.equal(sdedit(keys, **start), sdedit(keys, **start, seed=2))


@pytest.mark.parametrize(("sampler", "masked"), [("ddim", False), ("dpmpp_2m", True)])
@pytest.mark.parametrize("saves", range(1, STEPS + 1))
def test_an_edit_resumes_from_each_checkpoint(keys, tmp_path, monkeypatch, saves, sampler, masked):
    """Also from the last one, after which no step is left."""
    save_masks(tmp_path / "masks", np.eye(HEIGHT, WIDTH, dtype=np.uint8)[None])
    mask = str(tmp_path / "masks" / "00000.png") if masked else None
    inputs = open_edit_inputs(PnPConfig(**keys, checkpoint_every=1, sampler=sampler, mask=mask))
    whole = EditSession(inputs)
    expected = whole.edit_latents(run_tokenflow_pnp.plan(whole))
    numbers, save = itertools.count(1), WorkDir.save

    def save_and_stop(self, *args, **figures):
        save(self, *args, **figures)
        if next(numbers) == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkDir, "save", save_and_stop)
        with resumable_dir(tmp_path / "result", {}) as work:
            session = EditSession(inputs, work=work)
            session.edit_latents(run_tokenflow_pnp.plan(session))
    with resumable_dir(tmp_path / "result", {}) as work:
        session = EditSession(inputs, work=work)
        assert torch.equal(session.edit_latents(run_tokenflow_pnp.plan(session)), expected)
    assert session.image_forwards == whole.image_forwards


@pytest.mark.parametrize("consistency", ["tokenflow", "first_frame", "none"])
@pytest.mark.parametrize("propagation", ["paper", "released"])
def test_chunk_size_does_not_change_the_result(keys, consistency, propagation):
    options = {"consistency": consistency, "propagation": propagation}
    whole = pnp(keys, **options, chunk_size=N_FRAMES)
    for chunk_size in (1, 4):  # a frame at a time; a short last chunk
        chunked = pnp(keys, **options, chunk_size=chunk_size)
        # Rounding depends on the batch; where two tokens match almost equally, it decides.
        assert relative_error(chunked, whole.double()) < 1e-3


def test_a_run_after_another_equals_a_fresh_one(keys):
    session = EditSession(open_edit_inputs(PnPConfig(**keys)))
    plan = run_tokenflow_pnp.plan(session)
    session.edit_latents(replace(plan, start=plan.start * 0.5))
    assert torch.equal(session.edit_latents(plan), pnp(keys))


# ---------------------------------------------------------------- every choice has its effect


def test_choices_that_must_change_the_result(keys):
    results = {
        name: pnp(keys, **options)
        for name, options in {
            "default": {},
            "extended attention": {"consistency": "extended_attention"},
            "first frame": {"consistency": "first_frame"},
            "per frame": {"consistency": "none"},
            "fixed keyframes": {"keyframes": "fixed"},
            "keyframe seed": {"keyframe_seed": 2},
            "released": {"propagation": "released"},
            "linear": {"blend": "linear"},
            "flow": {"correspondence": "flow"},
            "hybrid": {"correspondence": "hybrid"},
            "smoothing": {"smooth_steps": 0.5},
            "one keyframe": {"keyframe_interval": N_FRAMES},
            "prompt": {"prompt": "a blue disc"},
            "negative prompt": {"negative_prompt": ""},
            "guidance": {"guidance_scale": 3.0},
            "sampler": {"sampler": "dpmpp_2m"},
            "no attention": {"pnp_attn_t": 0.0},
            "no features": {"pnp_f_t": 0.0},
        }.items()
    }
    names = list(results)
    for i, a in enumerate(names):
        assert torch.isfinite(results[a]).all()
        for b in names[i + 1 :]:
            assert relative_error(results[a], results[b].double()) > 1e-4, f"{a} = {b}"


def test_a_single_frame_makes_all_consistencies_one(keys):
    single = {**keys, "n_frames": 1}
    alone = pnp(single, consistency="none")
    assert alone.shape[0] == 1
    for consistency in ("tokenflow", "extended_attention", "first_frame"):
        assert relative_error(pnp(single, consistency=consistency), alone.double()) < 1e-5


def test_guidance_of_one_needs_no_unconditional_branch(keys):
    almost = pnp(keys, guidance_scale=1.0 + 1e-6)
    assert relative_error(pnp(keys, guidance_scale=1.0), almost.double()) < 1e-4


def test_every_frame_is_edited_where_the_clip_is_shorter_than_an_interval(keys):
    assert len(pnp(keys, keyframe_interval=40)) == N_FRAMES


# ---------------------------------------------------------------- starts


def test_ddim_start_is_the_inverted_latent(keys):
    session = EditSession(open_edit_inputs(PnPConfig(**keys)))
    t = session.inputs.timesteps[0]
    assert torch.equal(session.ddim_start(t), session.cache.latents(t, N_FRAMES))


def test_released_start_renoises_with_the_noisiest_latent(keys):
    session = EditSession(open_edit_inputs(PnPConfig(**keys, propagation="released")))
    manifest, schedule = session.cache.manifest, session.models.schedule
    noisiest, t = manifest.timesteps[0], session.inputs.timesteps[0]
    assert noisiest > t  # 20 inversion steps go beyond the first of 5 sampling steps
    clean, noisy = (session.cache.latents(name, N_FRAMES) for name in ("clean", noisiest))
    a2, b2 = schedule.alphas_cumprod[noisiest], schedule.alphas_cumprod[t]
    eps = (noisy - a2**0.5 * clean) / (1 - a2) ** 0.5
    expected = b2**0.5 * clean + (1 - b2) ** 0.5 * eps
    assert torch.allclose(session.ddim_start(t), expected, atol=1e-6)


def test_gaussian_start_is_one_noise_for_all_frames(keys):
    session = EditSession(open_edit_inputs(SDEditConfig(**keys)))
    t = session.inputs.timesteps[1]
    alpha, sigma = session.models.schedule.alpha_sigma(t)
    clean = session.cache.latents("clean", N_FRAMES)
    noise = (session.noisy_start(t, "shared") - alpha * clean) / sigma
    assert torch.allclose(noise, noise[:1].expand_as(noise), atol=1e-4)
    assert noise[0].std() == pytest.approx(1.0, abs=0.15)
    warped = (session.noisy_start(t, "warped") - alpha * clean) / sigma
    assert torch.allclose(warped[0], noise[0], atol=1e-4)  # the same draw
    assert not torch.allclose(warped[-1], noise[0], atol=1e-2)  # the clip moves


@pytest.mark.parametrize(
    ("start", "propagation", "n_steps"),
    [
        (1.0, "paper", 50),
        (0.9, "paper", 45),
        (0.5, "paper", 25),
        (0.001, "paper", 1),
        (1.0, "released", 49),
        (0.9, "released", 44),
        (0.5, "released", 24),
        (0.02, "released", 50),
    ],
)
def test_sdedit_takes_the_last_steps(start, propagation, n_steps):
    timesteps = list(range(981, 0, -20))
    assert steps_from(timesteps, start, propagation) == timesteps[-n_steps:]


def test_sdedit_stays_closer_to_the_clip_with_less_noise(keys):
    session = EditSession(open_edit_inputs(SDEditConfig(**keys)))
    clean = session.cache.latents("clean", N_FRAMES).double()
    errors = [relative_error(sdedit(keys, start=start), clean) for start in (0.2, 0.6, 1.0)]
    assert errors == sorted(errors)


# ---------------------------------------------------------------- conditions


def test_controlnet_steers_the_edit_by_its_scale(keys, tiny_model):
    control = {"controlnet_key": str(tiny_model / "controlnet")}
    steered, off = controlnet(keys, **control), controlnet(keys, **control, controlnet_scale=0.0)
    shared = controlnet(keys, **control, use_ddim_noise=False)
    assert relative_error(shared, steered.double()) > 1e-2
    plain = pnp(keys, pnp_attn_t=0.0, pnp_f_t=0.0)  # nothing injected, no ControlNet
    assert relative_error(off, plain.double()) < 1e-5
    assert relative_error(steered, plain.double()) > 1e-3
    depth = {"control": "depth", "depth_model": str(tiny_model / "depth_estimator")}
    assert relative_error(controlnet(keys, **control, **depth), steered.double()) > 1e-4


def test_no_inner_layer_sees_more_images_than_a_chunk_has(keys, tiny_model):
    """Though all three keyframes go through the UNet and the ControlNet at once."""
    control = {"controlnet_key": str(tiny_model / "controlnet"), "chunk_size": 2}
    session = EditSession(open_edit_inputs(ControlNetConfig(**keys, **control)))
    plan = run_tokenflow_controlnet.plan(session)
    seen, inner = {}, (".conv1", ".net.0", "s.conv")
    for network in (session.models.unet, session.models.controlnet(plan.control.key)):
        for name, module in network.named_modules():
            if name.endswith(inner) and not name.startswith(INJECTED_BLOCK):
                note = lambda module, args, output: seen.setdefault(module, set()).add(len(args[0]))  # noqa: E731
                module.register_forward_hook(note)
    session.edit_latents(replace(plan, timesteps=plan.timesteps[-1:]))
    assert len(seen) > 40
    assert {max(sizes) for sizes in seen.values()} == {2 * 2}  # two branches


def test_source_pass_has_the_controlnet_of_its_inversion(tiny_model, tmp_path):
    control = tiny_model / "controlnet"
    keys = make_cache(tmp_path, tiny_model, sd_version="ControlNet", controlnet_key=control)
    keys["controlnet_key"] = str(control)
    conditioned = controlnet(keys)
    assert torch.isfinite(conditioned).all()
    session = EditSession(open_edit_inputs(ControlNetConfig(**keys)))
    assert session.cache.manifest.control.key == str(control)
    # Without it in the source pass, tokens and with them matches differ.
    manifest = session.cache.manifest.model_copy(update={"control": None})
    inputs = replace(session.inputs, cache=replace(session.cache, manifest=manifest))
    unconditioned = EditSession(inputs)
    plan = run_tokenflow_controlnet.plan(unconditioned)
    assert not torch.equal(unconditioned.edit_latents(plan), conditioned)


def test_depth_model_edits_by_pnp_and_sdedit(tiny_depth_model, tiny_model, tmp_path):
    estimator = tiny_model / "depth_estimator"
    keys = make_cache(tmp_path, tiny_depth_model, sd_version="depth", depth_model=estimator)
    for edited in (pnp(keys), sdedit(keys)):
        assert edited.shape == (N_FRAMES, 4, 6, 10)
        assert torch.isfinite(edited).all()
    # The depth maps matter.
    session = EditSession(open_edit_inputs(PnPConfig(**keys)))
    session.depth = 1 - session.depth
    flipped = session.edit_latents(run_tokenflow_pnp.plan(session))
    assert relative_error(flipped, pnp(keys).double()) > 1e-4


def test_v_prediction_model_edits(tiny_v_model, tmp_path):
    keys = make_cache(tmp_path, tiny_v_model)
    assert torch.isfinite(pnp(keys)).all()
