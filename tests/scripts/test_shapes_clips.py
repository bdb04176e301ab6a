"""Clips of the shapes world on disk, with their truth and the list for Table 1."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from scripts.shapes import clips as shapes_clips
from scripts.shapes.metrics import ATTRIBUTES, attributes
from scripts.shapes.world import (
    COLORS,
    SAMPLE_FRAMES,
    another_color,
    random_scene,
    recolored,
    render_clip,
)
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


def test_clips_of_the_second_world_are_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_clips, "SIZE", 64)
    shapes_clips.main([str(tmp_path / "clips"), "--clips", "1", "--kinds", "textured_crossing"])
    shapes_clips.main([str(tmp_path / "few"), "--frames", "3", "--kinds", "textured", "shapes",
                       "--clips", "2"])  # fmt: skip
    listed, few = (load_yaml(tmp_path / name / "clips.yaml") for name in ("clips", "few"))
    assert [listed["settings"]["n_frames"], few["settings"]["n_frames"]] == [40, 3]
    name = f"textured_crossing-{shapes_clips.SEED}"
    clip = render_clip(shapes_clips.scene_of("textured_crossing", shapes_clips.SEED), 40, 64)
    frames = load_frames(tmp_path / "clips" / name)
    assert np.array_equal(frames, clip.frames)
    motion = load_motion(tmp_path / "clips" / f"{name}.flow.safetensors")
    assert np.array_equal(motion.flow[19].permute(1, 2, 0).numpy(), clip.flow(20, 19)[0])
    mask = cv2.imread(str(tmp_path / "clips" / "masks" / name / "00020.png"), 0)
    assert np.array_equal(mask > 0, clip.masks[20] == 1)
    assert [len(load_frames(each["data_path"])) for each in few["clips"]] == [3, 3]


@pytest.mark.parametrize("seed", [6_000_000, 6_000_007])
def test_kinds_are_what_they_are_called(seed):
    scenes = {kind: shapes_clips.scene_of(kind, seed) for kind in shapes_clips.KINDS}
    assert np.hypot(*scenes["moving"].pan) == pytest.approx(shapes_clips.PAN)
    assert scenes["moving"].objects == scenes["shapes"].objects
    visible = (render_clip(scenes["crossing"], SAMPLE_FRAMES, 128).masks == 1).sum(axis=(1, 2))
    assert visible[:12].min() < 0.5 * min(visible[0], visible[11])  # hidden, and seen again
    assert scenes["textured"].surface and scenes["textured_crossing"].surface
    for kind, scene in scenes.items():
        asked, attribute = shapes_clips.edited_scene(kind, scene), shapes_clips.KINDS[kind][0]
        differing = [
            name
            for name, a, b in zip(ATTRIBUTES, attributes(scene), attributes(asked), strict=True)
            if a != b
        ]
        assert differing == [attribute]
        assert asked.objects[1:] == scene.objects[1:]
        assert attributes(asked)[1] != asked.background
    for color in COLORS:  # of the first object; the second keeps its own
        things = replace(scenes["crossing"].objects[0], color=color), scenes["crossing"].objects[1]
        scene = replace(scenes["crossing"], objects=things)
        assert another_color(scene) not in {scene.background, *(o.color for o in things)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clips", "0"], "--clips: expected at least 1"),
        (["--kinds", "still"], "--kinds: invalid choice"),
        (
            ["--frames", "17", "--kinds", "textured", "fill"],
            "--kinds have 16, got 17",
        ),
        (["--seed", "5"], "--seed: expected at least 1000000"),
    ],
)
def test_bad_options_are_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        shapes_clips.main([str(tmp_path / "new"), *words])
    with pytest.raises(UserError, match="exists already"):
        shapes_clips.main([str(tmp_path)])
