"""Clips of the shapes world on disk, with their truth and the list for Table 1."""

import cv2
import numpy as np
import pytest

from scripts.shapes import clips as shapes_clips
from scripts.shapes.world import SAMPLE_FRAMES, another_color, random_scene, recolored, render_clip
from tokenflow.evaluation.metrics import warp_error
from tokenflow.evaluation.motion import load_motion
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml
from util import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "clips"
    shapes_clips.main([str(folder), "--clips", "2"])
    return folder


def test_frames_and_truth_are_the_world_s(place):
    clips = load_yaml(place / "clips.yaml")["clips"]
    for seed, entry in zip((shapes_clips.SEED, shapes_clips.SEED + 1), clips, strict=True):
        scene = random_scene(seed, n_objects=1)
        clip = render_clip(scene, SAMPLE_FRAMES, 256)
        assert entry["data_path"] == str(place / f"shapes-{seed}")
        assert entry["inversion_prompt"] == scene.caption
        assert entry["prompt"] == recolored(scene, another_color(scene))
        frames = load_frames(entry["data_path"])
        assert np.array_equal(frames, clip.frames[: len(frames)])
        motion = load_motion(place / f"shapes-{seed}.flow.safetensors")
        flow, visible = clip.flow(3, 2)
        assert np.array_equal(motion.flow[2].permute(1, 2, 0).numpy(), flow)
        assert np.array_equal(motion.visible[2].numpy(), visible)
        assert warp_error(frames, motion) < 0.3  # of interpolation
        mask = cv2.imread(str(place / "masks" / f"shapes-{seed}" / "00003.png"), 0)
        assert np.array_equal(mask > 0, clip.masks[3] > 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clips", "0"], "--clips: expected at least 1"),
        (["--seed", "5"], "--seed: expected at least 1000000"),
    ],
)
def test_bad_options_are_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        shapes_clips.main([str(tmp_path / "new"), *words])
    with pytest.raises(UserError, match="exists already"):
        shapes_clips.main([str(tmp_path)])
