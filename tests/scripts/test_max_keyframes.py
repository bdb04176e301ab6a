"""studies/max_keyframes.py: which edits it makes of which clips, and the scores that it prints."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from run_tokenflow_pnp import PnPConfig
from scripts.studies import max_keyframes as windows
from util import UserError


class Plan:
    """Two clips whose flicker depends on the bound."""

    clips = ("a", "b")
    protocol = None

    def inversion(self, clip):
        return {"data_path": clip, "interval": 8}

    def config(self, clip, method):
        assert method.name == "PnP, TokenFlow"
        return PnPConfig(data_path=clip, prompt="x")


@pytest.fixture
def made(monkeypatch):
    made = SimpleNamespace(inverted=[], edits=[])
    monkeypatch.setattr(windows.table1, "read_list", lambda path: Plan())

    class Evaluator:
        def __init__(self, protocol):
            pass

        def score_result(self, config):
            bound = config.max_keyframes or 10
            error = bound + (3 if config.data_path == "a" and bound == 3 else 0)
            return SimpleNamespace(warp_error=10.0 - error, clip_score=0.5)

    def edit(config):
        made.edits.append((config.data_path, config.batch_size, config.max_keyframes))
        return config

    monkeypatch.setattr(windows, "Evaluator", Evaluator)
    monkeypatch.setattr(windows.pnp, "edit", edit)
    monkeypatch.setattr(windows.preprocess, "preprocess", made.inverted.append)
    return made


def test_each_clip_is_inverted_once_and_edited_under_each_bound(made, capsys):
    windows.main(["clips.yaml", "--interval", "2", "--bounds", "6", "3"])
    assert [(args.data_path, args.interval) for args in made.inverted] == [("a", 2), ("b", 2)]
    assert made.edits == [(clip, 2, bound) for clip in "ab" for bound in (None, 6, 3)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["null", "0.00", "0.500", "0"],
        ["6", "4.00", "0.500", "0"],
        ["3", "5.50", "0.500", "0"],
    ]


def test_wrong_options_are_refused(made):
    for words in (["--interval", "0", "--bounds", "4"], ["--bounds", "1"]):
        with pytest.raises(UserError, match="expected at least 1; --bounds: expected at least 2"):
            windows.main([str(Path("clips.yaml")), *words])
    assert not made.edits
