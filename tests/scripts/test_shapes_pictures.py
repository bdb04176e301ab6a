"""The rendered pictures that the small model learns from."""

import cv2
import numpy as np
import pytest
import torch

from scripts.shapes import pictures as shapes_pictures
from scripts.shapes.pictures import (
    Pictures,
    picture,
    render_pictures,
    save_sheet,
    to_frames,
    to_pixels,
)
from scripts.shapes.world import random_scene
from util import MissingFileError


def test_pictures_are_those_of_their_numbers_in_whatever_file_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_pictures, "CHUNK", 4)
    # One process: the monkeypatch would not reach others.
    monkeypatch.setattr(shapes_pictures.os, "cpu_count", lambda: 1)
    assert render_pictures(tmp_path, 10, (32, 16)) == 6
    assert render_pictures(tmp_path, 10, (32, 16)) == 0
    assert len(list(tmp_path.iterdir())) == 6
    for size in (16, 32):
        pictures = Pictures(tmp_path, 10, size)
        assert len(pictures) == len(pictures.captions()) == 10
        for number, caption in enumerate(pictures.captions()):
            expected, told = picture(number, size)
            assert np.array_equal(pictures[number], expected)
            assert caption == told


def test_missing_pictures_are_named(tmp_path):
    render_pictures(tmp_path, 2, (16,))
    with pytest.raises(MissingFileError, match=r"32_000000_2\.npy: missing; run `.*train pictures"):
        Pictures(tmp_path, 2, 32)


def test_the_world_s_version_changes_with_what_it_shows_and_says(monkeypatch):
    version = shapes_pictures.world_version()
    assert version == shapes_pictures.world_version()
    with monkeypatch.context() as context:
        context.setattr(shapes_pictures, "random_scene", lambda seed: random_scene(seed + 1))
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
