"""The small trained model of models/tiny: a quick part of what scripts/check_tiny.py measures.

The bounds are loose, for the first weights; models/tiny/README.md says what is known of them.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from check_tiny import ClipCheck, check_text_to_image
from demo import INVERSION
from shapes_metrics import Judge
from shapes_world import SAMPLE_FRAMES, SAMPLES, random_scene, render_clip

from checkpoints import CONTROLNETS, check_controlnet_fits, model_key_for
from diffusion import load_stable_diffusion, psnr
from video import read_clip

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(model_key_for("tiny"))
CPU = torch.device("cpu")
SEED = 3_000_000  # neither trained on nor shipped as a sample
TWO_CLIPS = (SEED, SEED + 1)


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """These tensors are large enough to share between threads, unlike the other tests'."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge():
    return Judge(MODEL / "judge", CPU)


@pytest.fixture(scope="module")
def checked_clips(tmp_path_factory):
    """Two clips of few frames, inverted and edited in few steps."""
    models = load_stable_diffusion(MODEL, CPU, torch.float32)
    check = ClipCheck(
        models,
        MODEL,
        tmp_path_factory.mktemp("check_tiny"),
        "cpu",
        inversion=INVERSION | {"n_frames": 4, "steps": 10, "save_steps": 10, "inversion_iters": 3},
        settings=("n_inversion_steps=10", "n_timesteps=10", "n_frames=4", "batch_size=2"),
        methods=("tokenflow", "per_frame"),
        accuracy_steps=20,
        accuracy_frames=1,
    )
    return [check(seed) for seed in TWO_CLIPS]


def test_all_of_the_model_is_there_and_small():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt", ".pkl")]
    weights = [path for path in files if path.suffix == ".safetensors"]
    parts = {path.parent.name for path in weights}
    assert parts == {"unet", "vae", "text_encoder", "controlnet", "judge"}
    assert sum(path.stat().st_size for path in weights) <= 40e6


def test_the_controlnet_fits_the_unet():
    check_controlnet_fits(MODEL, CONTROLNETS["tiny", "canny"])


def test_text_to_image_follows_the_caption(judge):
    figures = check_text_to_image(MODEL, judge, CPU, count=6, seed=SEED)
    assert figures["judge"]["color_accuracy"] == figures["judge"]["background_accuracy"] == 1
    assert figures["color_accuracy"] >= 0.8
    assert figures["background_accuracy"] >= 0.5


def test_clips_survive_the_vae_and_the_inversion(checked_clips):
    for clip in checked_clips:
        assert clip["vae_psnr"] > 30
        assert clip["inversion_iters_5_psnr"] > clip["inversion_vae_psnr"] - 1.5
        assert clip["inversion_iters_5_psnr"] > clip["inversion_psnr"]


def test_the_colour_asked_for_is_there_and_the_background_stays(checked_clips):
    assert np.mean([clip["edit_color_success"] for clip in checked_clips]) >= 0.5
    for clip in checked_clips:
        assert clip["background_psnr"] > 18


def test_tokenflow_flickers_less_than_the_same_edit_frame_by_frame(checked_clips):
    errors = [clip["warp_error"] for clip in checked_clips]
    mean = {name: np.mean([error[name] for error in errors]) for name in errors[0]}
    assert mean["source"] < mean["vae"] < mean["tokenflow"] < mean["per_frame"]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_clips_are_what_the_world_renders(name):
    clip = read_clip(ROOT / "data" / f"{name}.mp4", 100, size=(256, 256))
    rendered = render_clip(random_scene(*SAMPLES[name]), SAMPLE_FRAMES, 256)
    assert clip.frames.shape == rendered.frames.shape
    assert psnr(clip.frames, rendered.frames) > 30
