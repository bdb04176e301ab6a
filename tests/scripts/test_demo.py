"""The demo, from the first command to the last line, in few steps."""

import contextlib
import io
import shutil
from pathlib import Path

import cv2
import pytest

from scripts import demo
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError

ROOT = Path(__file__).resolve().parents[2]
FEW = {"n_inversion_steps": 2, "n_timesteps": 2, "n_frames": 2, "keyframe_interval": 2}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder in which the demo was run once, by shorter configs, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("data", "models"):
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "configs").glob("demo_*.yaml"):
        save_yaml(folder / "configs" / path.name, load_yaml(path) | FEW)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        demo.main([])
    return folder, printed.getvalue()


@pytest.fixture
def place(first_run, tmp_path, monkeypatch):
    """A copy of that folder, to work in."""
    folder = shutil.copytree(first_run[0], tmp_path / "demo", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def test_the_demo_edits_draws_and_reports(first_run):
    folder, printed = first_run
    for label, _, config in demo.EDITS:
        assert f"--config {config}" in printed
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{label} ")]
        assert float(line.removeprefix(label).split()[1]) > 0  # the warp error
    rows = len(demo.EDITS) + 1
    assert cv2.imread(str(folder / demo.PICTURE)).shape[0] >= rows * 112
    assert len(list((folder / "tokenflow-results/demo").rglob("edited.mp4"))) == len(demo.EDITS)


def test_the_demo_keeps_what_is_there(place):
    made = sorted((place / "tokenflow-results/demo").rglob("edited.mp4"))
    before = {path: path.stat().st_mtime_ns for path in made}
    demo.main([])
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_what_an_earlier_demo_made_with_other_settings_is_not_used(place):
    manifest = next((place / "latents").rglob("manifest.yaml"))
    save_yaml(manifest, load_yaml(manifest) | {"model_revision": "0123456789abcdef"})
    shutil.rmtree(place / "tokenflow-results")
    with pytest.raises(UserError, match="--overwrite, or run `make clean`"):
        demo.main([])
