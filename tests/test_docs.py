"""README and docs: links lead somewhere, README's Python and the notebook run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "models/tiny/README.md"]


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http"):
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_readme_s_python_runs(tmp_path, monkeypatch):
    code = re.search(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    names = {}
    exec(code[1].replace("fast=True", "steps=2, save_steps=2"), names)
    assert names["frames"].shape == (8, 64, 64, 3)
    assert names["result"].n_frames == names["cache"].manifest.n_frames == 8


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells are plain Python, so that no kernel is needed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    notebook = json.loads((ROOT / "docs" / "tokenflow.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    source, *edits = names["clips"]
    assert len(edits) == 2
    for edited in edits:  # the star changed its colour, the background did not
        changed = np.abs(edited.astype(int) - source).mean(axis=-1) > 60
        assert 0.05 < changed.mean() < 0.2
