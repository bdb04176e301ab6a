"""The rendered pictures that the small model learns from."""

import cv2
import numpy as np
import pytest
import torch

from scripts.shapes import pictures as shapes_pictures
from scripts.shapes import world, world2
from scripts.shapes.pictures import (
    open_pictures,
    picture,
    render_pictures,
    save_sheet,
    to_pixels,
)
from scripts.shapes.world import random_scene
from tokenflow.diffusion.vae import to_frames
from util import MissingFileError


def test_pictures_are_rendered_once_and_are_those_of_their_numbers(tmp_path):
    assert render_pictures(tmp_path, 5, (32, 16)) == [32, 16]
    assert render_pictures(tmp_path, 5, (32, 16)) == []
    for size in (16, 32):
        expected = np.stack([picture(number, size)[0] for number in range(5)])
        assert np.array_equal(open_pictures(tmp_path, 5, size), expected)
    with pytest.raises(MissingFileError, match=r"32_6\.npy: missing; run `.*train pictures"):
        open_pictures(tmp_path, 6, 32)


def test_pictures_are_of_both_worlds_in_turn():
    captions = [picture(number, 16)[1] for number in range(40)]
    assert captions[::2] == [world.random_scene(number).caption for number in range(0, 40, 2)]
    assert captions[1::2] == [world2.random_scene(number).caption for number in range(1, 40, 2)]


def test_the_world_s_version_changes_with_what_it_shows_and_says(monkeypatch):
    version = shapes_pictures.world_version()
    assert version == shapes_pictures.world_version()
    with monkeypatch.context() as context:
        context.setattr(world, "random_scene", lambda seed: random_scene(seed + 1))
        assert shapes_pictures.world_version() != version
    monkeypatch.setattr(
        shapes_pictures, "picture", lambda seed, size: (picture(seed, size)[0], "a wolf")
    )
    assert shapes_pictures.world_version() != version


def test_pixels_and_frames_are_inverse():
    frames = np.arange(2 * 8 * 16 * 3, dtype=np.uint8).reshape(2, 8, 16, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (2, 3, 8, 16)
    assert np.array_equal(to_frames(pixels), frames)
    assert np.array_equal(to_frames(torch.tensor([[[[-2.0]]], [[[2.0]]]]))[:, 0, 0, 0], [0, 255])


def test_a_sheet_has_rows_of_pictures(tmp_path):
    frames = np.stack([np.full((4, 6, 3), number, np.uint8) for number in range(6)])
    save_sheet(tmp_path / "sheet.png", frames, columns=3)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (8, 18, 3)
    assert sheet[0, ::6, 0].tolist() == [0, 1, 2]
    assert sheet[4, ::6, 0].tolist() == [3, 4, 5]
