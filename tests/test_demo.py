"""The demo, from the first command to the last line, in few steps."""

import shutil
from pathlib import Path

import cv2
import demo
import pytest

from util import UserError, load_yaml, save_yaml

ROOT = Path(__file__).resolve().parents[1]
FEW = {"n_inversion_steps": 2, "n_timesteps": 2, "n_frames": 2, "batch_size": 2}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with all that the demo reads, and shorter configs."""
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in (ROOT / "configs").glob("demo_*.yaml"):
        save_yaml(tmp_path / "configs" / path.name, load_yaml(path) | FEW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_edits_draws_and_reports_and_keeps_what_is_there(place, capsys):
    demo.main([])
    printed = capsys.readouterr().out
    for label, _, config in demo.EDITS:
        assert f"--config {config}" in printed
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{label} ")]
        assert float(line.removeprefix(label).split()[1]) > 0  # the warp error
    rows = len(demo.EDITS) + 1
    assert cv2.imread(str(place / demo.PICTURE)).shape[0] == rows * 112
    made = list((place / "tokenflow-results/demo").rglob("edited.mp4"))
    assert len(made) == len(demo.EDITS)
    before = {path: path.stat().st_mtime_ns for path in made}
    demo.main([])
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_what_an_earlier_demo_made_with_other_settings_is_not_used(place, capsys):
    demo.main([])
    manifest = next((place / "latents").rglob("manifest.yaml"))
    save_yaml(manifest, load_yaml(manifest) | {"model_revision": "0123456789abcdef"})
    shutil.rmtree(place / "tokenflow-results")
    with pytest.raises(UserError, match="--overwrite, or run `make clean`"):
        demo.main([])
