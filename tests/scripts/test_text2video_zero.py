"""Text2Video-Zero equals diffusers' pipelines, and edits by edges and by depth."""

import sys

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, TextToVideoZeroPipeline

import run_tokenflow_controlnet as controlnet
from scripts.table1 import text2video_zero
from scripts.table1.text2video_zero import Text2VideoZeroConfig
from scripts.tiny_model.model_files import ddim_scheduler
from tests.helpers import HEIGHT, WIDTH, edit_keys, invert, make_clip, randn
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.results import read_result
from tokenflow.editing.techniques import EditPlan
from util import UserError

# Diffusers has moved the module that it is in, and will again.
theirs = sys.modules[TextToVideoZeroPipeline.__module__]
N = 3
PARTS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """With a clip and its cache."""
    folder = tmp_path_factory.mktemp("zero")
    make_clip(folder / "clip.mp4", N)
    invert(folder / "clip.mp4", folder / "latents", tiny_model, n_frames=N)
    return folder


@pytest.fixture
def session(folder, tiny_model):
    """Opens the session of an edit."""

    def open_session(**changes):
        keys = {"consistency": "first_frame", "n_frames": N, "guidance_scale": 4.0, **changes}
        keys |= {"controlnet_key": str(tiny_model / "controlnet"), "noise": "shared"}
        return EditSession(
            open_edit_inputs(Text2VideoZeroConfig(**edit_keys(folder, tiny_model, **keys)))
        )

    return open_session


def parts_of(session):
    models = session.models
    parts = {name: getattr(models, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    return PARTS | parts | {"scheduler": ddim_scheduler()}


@pytest.mark.parametrize("strength", [(12, 12), (0, -40), (300, 7.5), (-1000, 4)])
def test_the_motion_field_is_diffusers(strength):
    latents = randn(1, 4, 6, 10).repeat(4, 1, 1, 1)
    expected = theirs.create_motion_field_and_warp_latents(*strength, [1, 2, 3, 4], latents)
    for k, latent in enumerate(latents, start=1):
        found = text2video_zero.translated(latent, *(k * each for each in strength))
        assert torch.equal(found, expected[k - 1])


def test_with_a_controlnet_it_is_diffusers_pipeline(session):
    mine = session()
    found = text2video_zero.edit_latents(mine)
    network = mine.models.controlnet(mine.config.controlnet_key)
    processor = theirs.CrossFrameAttnProcessor2_0(batch_size=2)
    changed = [(each, each.attn_processors) for each in (mine.models.unet, network)]
    for each, _ in changed:
        each.set_attn_processor(processor)
    pipe = StableDiffusionControlNetPipeline(**parts_of(mine), controlnet=network)
    denoiser = make_denoiser(
        mine.models, mine.frames, "", controlnet.control_settings(mine.config), None
    )
    expected = pipe(
        [mine.config.prompt] * N,
        image=denoiser.control.images.float().repeat(1, 3, 1, 1),
        latents=text2video_zero.plan(mine).start,
        num_inference_steps=5,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    for each, before in changed:
        each.set_attn_processor(before)
    assert torch.allclose(found, expected, atol=1e-4)
    mine.config = mine.config.model_copy(update={"consistency": "none"})
    assert not torch.allclose(text2video_zero.edit_latents(mine), expected, atol=1e-2)


def test_with_a_motion_field_it_is_diffusers_pipeline(session, monkeypatch):
    mine = session(motion_x=150.0, motion_y=-60.0)
    start = mine.noisy_start(mine.inputs.timesteps[0], "shared")
    monkeypatch.setattr(controlnet, "plan", lambda _: EditPlan(mine.inputs.timesteps, start))
    found = mine.edit_latents(text2video_zero.plan(mine))
    generator = torch.Generator().manual_seed(mine.config.seed)
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=generator)
    expected = TextToVideoZeroPipeline(**parts_of(mine))(
        mine.config.prompt,
        video_length=N,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=noise,
        generator=generator,
        motion_field_strength_x=150,
        motion_field_strength_y=-60,
        t0=2,
        t1=3,
        output_type="latent",
    ).images
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_motion_field_needs_steps(session):
    with pytest.raises(UserError, match="n_timesteps: 1: a motion field needs at least 3"):
        text2video_zero.plan(session(motion_x=12.0, n_timesteps=1))


@pytest.mark.parametrize("control", ["canny", "depth"])
def test_an_edit_by_edges_and_by_depth(folder, tiny_model, control, capsys):
    keys = edit_keys(folder, tiny_model, n_frames=N, output_path=folder / "results")
    keys |= {"control": control, "controlnet_key": tiny_model / "controlnet"}
    keys |= {"depth_model": tiny_model / "depth_estimator", "motion_x": 12.0}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    result = read_result(text2video_zero.main(words))
    assert f"result: {result.folder}" in capsys.readouterr().out
    shown = {"canny": "Canny", "depth": "depth"}[control]
    assert result.method == f"Text2Video-Zero ({shown})"
    assert len(result.frames()) == N
    assert result.config["consistency"] == "first_frame"
