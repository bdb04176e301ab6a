"""scripts/studies/inversion_curve.py end to end in few steps, and its table and picture."""

import numpy as np
import pytest
from PIL import Image

from scripts.studies import inversion_curve
from scripts.studies.inversion_curve import (
    ITERATED,
    PLAIN,
    STOPPED,
    Row,
    Setting,
    curve,
    means,
    table,
    time_ratios,
)
from tests.helpers import make_clip
from tokenflow.cache.options import FAST
from util import UserError

FAST_LABEL = inversion_curve.FAST_LABEL


def row(clip="a", family=PLAIN, label="500 steps", recon_steps=500, **numbers):
    values = {"forwards": 1000.0, "psnr": 50.0, "seconds": 90.0}
    return Row(clip, family, label, recon_steps, **values | numbers)


FAST_ROW = {"family": STOPPED, "label": FAST_LABEL, "recon_steps": 50, "forwards": 100.0}
ROWS = [
    row("a", **FAST_ROW, psnr=60.0, seconds=10.0),
    row("a", psnr=50.0, seconds=90.0),
    row("a", recon_steps=50, forwards=550.0, psnr=40.0),
    row("a", ITERATED, "K = 2", 50, forwards=150.0),
    row("b", **FAST_ROW, psnr=62.0, seconds=5.0),
    row("b", psnr=52.0, seconds=60.0),
]


def test_all_that_is_asked_for_is_measured():
    found = inversion_curve.settings()
    plain = {s.steps: s.recon_steps for s in found if s.family == PLAIN}
    assert plain == {50: (50,), **{n: (n, 50) for n in (100, 250, 500, 1000)}}
    assert [s.iterations for s in found if s.family == ITERATED] == [1, 2, 3, 4, 5]
    (fast,) = (s for s in found if s.label == FAST_LABEL)
    wanted = [FAST[name] for name in ("steps", "inversion_iters", "inversion_tol")]
    assert [fast.steps, fast.iterations, fast.tolerance] == wanted
    assert found[found.index(fast) + 1].steps == 500  # timed one after the other


def test_means_are_over_clips_and_ratios_within_one():
    found = {(r.label, r.recon_steps): r for r in means(ROWS)}
    assert found[FAST_LABEL, 50].psnr == 61.0
    assert found["500 steps", 500].psnr == 51.0
    assert found["500 steps", 50].psnr == 40.0
    assert time_ratios(ROWS) == [9.0, 12.0]


def test_the_table_names_the_preset():
    lines = table(means(ROWS)).splitlines()
    assert len(lines) == 2 + 4
    first, last = ([cell.strip() for cell in lines[i].split("|")] for i in (2, -1))
    assert first == ["", f"{PLAIN}: 500 steps", "50 steps", "550.0", "40.0 dB", "90.0", ""]
    assert last[1:5] == [f"{STOPPED}: {FAST_LABEL} (--fast)", "50 steps", "100.0", "61.0 dB"]


def test_the_curve_has_a_line_for_each_family():
    (axis,) = curve(means(ROWS)).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {
        f"{PLAIN}, 50 steps to reconstruct": [[550.0, 40.0]],
        f"{PLAIN}, as many steps to reconstruct": [[1000.0, 51.0]],
        ITERATED: [[150.0, 50.0]],
        STOPPED: [[100.0, 61.0]],
    }
    assert f"{FAST_LABEL} (--fast)" in [text.get_text() for text in axis.texts]


def test_the_script_measures_once_and_draws(tiny_model, tmp_path, monkeypatch, capsys):
    few = [
        Setting(STOPPED, FAST_LABEL, 5, 2, 1e-3, (5,)),
        Setting(PLAIN, "500 steps", 10, 1, 0.0, (10, 5)),
    ]
    monkeypatch.setattr(inversion_curve, "settings", lambda: few)
    monkeypatch.setattr(inversion_curve, "time_ratios", lambda rows: [2.0, 4.0, 3.0])
    clip = make_clip(tmp_path / "wall.mp4", n_frames=4)
    argv = [str(clip), "--model", str(tiny_model), "--size", "48", "--frames", "2"]
    argv += ["--json", str(tmp_path / "rows.json"), "--device", "cpu"]
    inversion_curve.main([*argv, "--plot", str(tmp_path / "curve.png")])
    shown = capsys.readouterr().out
    cells = [" ".join(line.split()) for line in shown.splitlines()]
    assert any(f"{PLAIN}: 500 steps | 10 steps | 20.0 |" in line for line in cells)
    assert any(f"{PLAIN}: 500 steps | 5 steps | 15.0 |" in line for line in cells)
    assert "take 3.0 times as long as --fast (from 2.0 to 4.0, over 3 clips)" in shown
    assert np.asarray(Image.open(tmp_path / "curve.png")).ndim == 3

    monkeypatch.setattr(inversion_curve, "measure", lambda *args: pytest.fail("measured again"))
    inversion_curve.main(argv)
    assert capsys.readouterr().out.splitlines()[:6] == shown.splitlines()[:6]
    with pytest.raises(UserError, match=r"holds rows of .*name another file"):
        inversion_curve.main([*argv[:-4], "--frames", "1", *argv[-4:]])
