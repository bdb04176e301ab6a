"""Masks of a clip, found and fitted to an edit."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import save_masks
from tokenflow.evaluation.inputs import (
    Source,
    find_masks,
    read_masks,
)
from util import MissingFileError, UserError


def some_source(numbers: tuple[int, ...] = (0, 1), fit: str = "stretch") -> Source:
    return Source("bear", Path("bear.mp4"), lambda: None, (2, 4, 8), numbers, fit)


def test_masks_are_objects_by_index_resized_by_nearest_neighbour(tmp_path):
    masks = np.zeros((3, 2, 4), np.uint8)
    masks[0, 0, 0], masks[1, 1, 3], masks[2] = 1, 2, 1
    save_masks(tmp_path / "bear", masks)
    for folder in (tmp_path, tmp_path / "bear"):
        read = read_masks(some_source(), folder)
        assert read.shape == (2, 4, 8)
        assert np.array_equal(read, masks[:2].repeat(2, axis=1).repeat(2, axis=2) > 0)
    later = some_source((1, 2))
    assert read_masks(later, tmp_path)[1].all()
    every_second = some_source((0, 2))
    assert read_masks(every_second, tmp_path)[1].all()


@pytest.mark.parametrize(("fit", "marked", "kept"), [("stretch", [5], [2]), ("crop", [5], [1])])
def test_thin_objects_are_not_averaged_away_and_masks_are_cropped_as_frames(
    fit, marked, kept, tmp_path
):
    masks = np.zeros((2, 4, 16), np.uint8)
    masks[:, :, marked] = 1
    save_masks(tmp_path / "bear", masks)
    source = some_source(fit=fit)
    read = read_masks(source, tmp_path)
    assert np.array_equal(read[0], np.isin(np.arange(8), kept)[None].repeat(4, 0))


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "I;16"])
def test_masks_may_be_of_any_kind(mode, tmp_path):
    for i in range(2):
        image = Image.new(mode, (8, 4))
        if mode == "RGBA":
            image = Image.new(mode, (8, 4), (0, 0, 0, 255))
        white = {"RGB": (0, 0, 255), "RGBA": (9, 0, 0, 255)}.get(mode, 1)
        image.putpixel((5, 2), white)
        image.save(tmp_path / f"{i}.png")
    read = read_masks(some_source(), tmp_path)
    assert np.argwhere(read).tolist() == [[0, 2, 5], [1, 2, 5]]


def test_masks_without_leading_zeros_are_in_order(tmp_path):
    for i in range(8, 12):
        Image.new("L", (8, 4)).save(tmp_path / f"{i}.png")
    source = some_source((1, 2))
    assert [path.name for path in find_masks(source, tmp_path)] == ["9.png", "10.png"]


def test_one_mask_serves_all_frames(tmp_path):
    save_masks(tmp_path / "bear", np.eye(4, 8, dtype=np.uint8)[None])
    read = read_masks(some_source((5, 6)), tmp_path / "bear" / "00000.png")
    assert np.array_equal(read, [np.eye(4, 8)] * 2)


def test_missing_masks_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"--masks: .*: expected a folder of PNG files, one"):
        find_masks(some_source(), tmp_path)
    Image.new("L", (8, 4)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="1 masks, the edit needs 2"):
        find_masks(some_source(), tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1.png: a mask that cannot be read"):
        read_masks(some_source(), tmp_path)
