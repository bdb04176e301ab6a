"""The script that draws clips as rows of frames."""

import cv2
import numpy as np
import pytest

from scripts import strip
from tests.helpers import make_clip
from util import UserError


def test_clips_become_labelled_rows(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", n_frames=5)
    out = tmp_path / "out" / "strip.png"
    rows = [f"a long label={clip}", f"b={clip}"]
    strip.main([str(out), *rows, "--columns", "3", "--size", "32"])
    picture = cv2.imread(str(out))
    margin = strip.label_width(["a long label", "b"])
    assert picture.shape == (2 * 32, margin + 3 * 32, 3)
    assert np.array_equal(picture[:32, margin:], picture[32:, margin:])
    ink = (picture[:32, :margin] < 128).any(axis=(0, 2)).nonzero()[0]
    assert len(ink) and ink[-1] < margin - 1  # the label is whole
    first, last = picture[:32, margin : margin + 32], picture[:32, -32:]
    assert not np.array_equal(first, last)


@pytest.mark.parametrize("option", ["--columns=0", "--columns=-1", "--size=0", "--n_frames=0"])
def test_numbers_out_of_range_are_refused(option, tmp_path):
    with pytest.raises(UserError, match="expected at least 1"):
        strip.main([str(tmp_path / "out.png"), f"a={make_clip(tmp_path / 'a.mp4')}", option])


def test_a_row_needs_a_label(tmp_path):
    with pytest.raises(UserError, match="is not LABEL=CLIP"):
        strip.main([str(tmp_path / "out.png"), "clip.mp4"])
