"""Table 1's baselines that are no editing technique: the VAE's reconstruction, RGB propagation."""

import cv2
import numpy as np
import pytest

from run_tokenflow_pnp import PnPConfig
from scripts.table1 import baselines
from tests.helpers import edit_keys, invert, make_clip
from tokenflow.diffusion.vae import decode_latents
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml
from util import UserError


def texture(seed, size=(96, 128)):
    """A smooth picture, (H, W, 3) uint8."""
    noise = np.random.default_rng(seed).uniform(0, 255, (*size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, None, 4)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


@pytest.mark.parametrize("propagate", [baselines.propagate_rgb, baselines.propagate_patches])
def test_a_keyframe_s_pixels_follow_the_source_s_motion_both_ways(propagate):
    if propagate is baselines.propagate_patches:
        pytest.importorskip("patchmatch", reason="PyPatchMatch needs Python 3.11")
    source = np.stack([np.roll(texture(1), 3 * i, axis=1) for i in range(5)])
    keyframe = texture(2)
    frames = propagate(keyframe, source, 2)
    assert np.array_equal(frames[2], keyframe)
    for i, found in enumerate(frames):
        inside = np.s_[12:-12, 20:-20]  # of what the roll brings in from the other side
        moved = np.roll(keyframe, 3 * (i - 2), axis=1)[inside].astype(float)
        other_way = np.roll(keyframe, -3 * (i - 2), axis=1)[inside].astype(float)
        error = np.abs(found[inside] - moved).mean()
        assert error < 4
        assert i == 2 or error < 0.3 * np.abs(found[inside] - other_way).mean()


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    clip = make_clip(folder / "clip.mp4", 5)
    invert(clip, folder / "latents", tiny_model)
    return PnPConfig(**edit_keys(folder, tiny_model))


def test_the_reconstruction_is_the_vae_s(config):
    folder = baselines.reconstruction(config)
    session = EditSession(open_edit_inputs(config))
    clean = session.cache.latents("clean", 5)
    assert np.array_equal(load_frames(folder / "frames"), decode_latents(session.models, clean))
    names = {"edited.mp4", "side_by_side.mp4", "frames", "edited_latents.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"config.yaml", "run.yaml"}
    assert load_yaml(folder / "run.yaml")["technique"] == "reconstruction"
    assert "decode" in load_yaml(folder / "run.yaml")["seconds"]
    before = (folder / "run.yaml").stat().st_mtime_ns
    assert baselines.reconstruction(config) == folder
    assert (folder / "run.yaml").stat().st_mtime_ns == before


def test_patch_propagation_needs_its_library(config, monkeypatch):
    monkeypatch.setattr(baselines, "has_patch_match", lambda: False)
    with pytest.raises(UserError, match="patch_propagation needs PyPatchMatch"):
        baselines.patch_propagation(config)


def test_rgb_propagation_starts_from_the_per_frame_edit_s_middle_frame(config):
    folder = baselines.rgb_propagation(config)
    (alone,) = (folder.parents[2] / "pnp").rglob("run.yaml")
    assert load_yaml(alone.parent / "config.yaml")["consistency"] == "none"
    frames, edited = load_frames(folder / "frames"), load_frames(alone.parent / "frames")
    assert np.array_equal(frames[2], edited[2])
    assert not np.array_equal(frames[0], edited[0])


@pytest.mark.parametrize("words", [[], ["nonsense"], ["--config", "x.yaml"]])
def test_a_baseline_must_be_named(words):
    with pytest.raises(UserError, match="expected reconstruction or rgb_propagation or patch_"):
        baselines.main(words)
