"""The script that draws clips as rows of frames."""

import numpy as np
import pytest
from PIL import Image

from scripts import strip
from tests.helpers import make_clip
from tokenflow.figures.drawing import png
from tokenflow.storage.video import read_clip
from util import UserError


def test_clips_become_labelled_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(strip, "png", lambda figure: drawn.append(figure) or png(figure))
    clip = make_clip(tmp_path / "clip.mp4", n_frames=5)
    out = tmp_path / "out" / "strip.png"
    rows = [f"a long label={clip}", f"$\\frac$={clip}"]  # no mathematics
    strip.main([str(out), *rows, "--columns", "3", "--size", "32"])
    (figure,) = drawn
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["a long label", "$\\frac$"]
    frames = read_clip(clip, 5, size=(32, 32)).frames
    for row in (figure.axes[:3], figure.axes[3:]):
        shown = [axis.images[0].get_array() for axis in row]
        assert np.array_equal(shown, frames[[0, 2, 4]])
    assert Image.open(out).width >= 3 * 32


@pytest.mark.parametrize("option", ["--columns=0", "--columns=-1", "--size=0", "--n_frames=0"])
def test_numbers_out_of_range_are_refused(option, tmp_path):
    with pytest.raises(UserError, match="expected at least 1"):
        strip.main([str(tmp_path / "out.png"), f"a={make_clip(tmp_path / 'a.mp4')}", option])


@pytest.mark.parametrize("options", [["--size=9000", "--columns=2"], ["--columns=200000"]])
def test_a_picture_that_is_too_large_is_refused_before_a_clip_is_read(options, tmp_path):
    with pytest.raises(UserError, match=r"--columns, --size: 1 rows of .* at most 16384 pixels"):
        strip.main([str(tmp_path / "out.png"), "a=nowhere.mp4", *options])


def test_a_row_needs_a_label(tmp_path):
    with pytest.raises(UserError, match="is not LABEL=CLIP"):
        strip.main([str(tmp_path / "out.png"), "clip.mp4"])
