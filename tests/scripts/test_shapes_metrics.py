"""The measures of pictures and clips of the shapes world, on cases worked out by hand."""

import cv2
import numpy as np
import pytest
import torch

from scripts.shapes import world, world2
from scripts.shapes.metrics import (
    Judge,
    attributes,
    background_psnr,
    color_shape_background,
    color_shapes,
    hue_of_object,
    warp_error,
)
from scripts.shapes.world import COLORS, HUES, random_scene, render, render_clip
from util import UserError

MASK = np.ones((4, 4), bool)


def painted(*rgb: int) -> np.ndarray:
    return np.full((4, 4, 3), rgb, np.uint8)


@pytest.mark.parametrize("name", COLORS)
@pytest.mark.parametrize("light", [0.4, 1.0])
def test_a_hue_is_named_in_any_light(name, light):
    frame = painted(*(np.array(HUES[name]) * light * 255).astype(int))
    assert hue_of_object(frame, MASK) == name


@pytest.mark.parametrize("rgb", [(120, 120, 120), (121, 120, 120), (120, 121, 121), (0, 0, 0)])
def test_what_has_no_hue_is_gray(rgb):
    assert hue_of_object(painted(*rgb), MASK) == "gray"


def test_the_hue_is_that_of_most_of_the_mask_and_of_nothing_else():
    frame = painted(0, 0, 255)
    frame[:2] = (255, 0, 0)
    frame[2, :1] = (255, 0, 0)
    assert hue_of_object(frame, MASK) == "red"  # 9 of 16
    mask = MASK.copy()
    mask[:2] = False
    assert hue_of_object(frame, mask) == "blue"  # 7 of 8


def test_rendered_pictures_are_seen_for_what_they_are():
    seen = set()
    for seed in range(60):
        scene = random_scene(seed, n_objects=1)
        frame, mask = render(scene, 0.5, (256, 256))
        assert hue_of_object(frame, mask > 0) == scene.objects[0].color, scene.caption
        noisy = frame + np.random.default_rng(seed).normal(0, 4, frame.shape)
        told = color_shape_background(noisy.clip(0, 255).astype(np.uint8))
        assert told == attributes(scene)[1:4], scene.caption
        seen.add((scene.objects[0].fill, told[1]))
    assert len(seen) >= 18  # of 4 fills x 5 shapes


def test_two_objects_are_told_by_their_colours():
    for seed in range(40):
        scene = (world2 if seed % 2 else world).random_scene(seed, n_objects=2)
        frame, _ = render(scene, 0, (256, 256))
        true = {thing.color: thing.shape for thing in scene.objects}
        assert color_shapes(frame) == true, scene.caption
    both = drawn(lambda f: [cv2.circle(f, (x, 128), 30, RED, -1) for x in (60, 190)])
    assert color_shapes(both) == {"red": "none"}
    assert color_shapes(drawn(lambda f: cv2.circle(f, (60, 60), 5, RED, -1))) == {}


def drawn(draw):
    """A picture on a blue background, of what is drawn in red."""
    frame = np.full((256, 256, 3), (73, 94, 168), np.uint8)
    draw(frame)
    return frame


RED = (230, 36, 31)
MISSHAPEN = {
    "an ellipse": lambda frame: cv2.ellipse(frame, (128, 128), (80, 45), 20, 0, 360, RED, -1),
    "a bar": lambda frame: cv2.rectangle(frame, (30, 100), (230, 150), RED, -1),
    "two circles in one": lambda frame: [
        cv2.circle(frame, (x, 128), 40, RED, -1) for x in (95, 150)
    ],
    "two objects": lambda frame: [cv2.circle(frame, (x, 128), 30, RED, -1) for x in (60, 190)],
    "a frame with a square hole": lambda frame: cv2.rectangle(frame, (80, 80), (170, 170), RED, 15),
    "a half circle": lambda frame: cv2.ellipse(frame, (128, 128), (70, 70), 0, 0, 180, RED, -1),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_what_is_no_shape_of_the_world_is_called_none(name):
    assert color_shape_background(drawn(MISSHAPEN[name])) == ("red", "none", "blue")


def test_an_object_that_leaves_the_frame_is_seen_and_nothing_is_not():
    frame = drawn(lambda frame: cv2.circle(frame, (68, 128), 70, RED, -1))
    assert color_shape_background(frame) == ("red", "circle", "blue")
    assert color_shape_background(drawn(lambda frame: None)) == ("none", "none", "blue")


def test_the_warp_error_of_a_clip_and_of_a_flash():
    """A uniform change by d of 255 adds d^2 in both frame pairs that it touches, of three."""
    clip = render_clip(random_scene(3, n_objects=1), 4, 128)
    assert warp_error(clip.frames, clip) < 0.5
    gray = np.full_like(clip.frames, 100)
    assert warp_error(gray, clip) == 0
    gray[1] += 51
    assert warp_error(gray, clip) == pytest.approx(1e3 * 0.2**2 * 2 / 3, rel=1e-5)


def test_only_what_is_away_from_the_objects_counts_as_background():
    reference = np.zeros((2, 20, 20, 3), np.uint8)
    masks = np.zeros((2, 20, 20), np.uint8)
    masks[:, 8:12, 8:12] = 1
    frames = reference.copy()
    frames[:, 5:15, 5:15] = 200  # the objects, and three pixels around them
    assert background_psnr(frames, reference, masks, margin=3) > 100
    frames[:, :, :] = 51
    frames[:, 8:12, 8:12] = 255
    expected = 10 * np.log10(1 / 0.2**2)
    assert background_psnr(frames, reference, masks, margin=3) == pytest.approx(expected)


def test_a_folder_without_a_judge_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Judge(tmp_path, torch.device("cpu"))
