"""Warp errors by distance to fixed keyframes: of results whose flicker is known."""

import json

import numpy as np
import pytest
import torch

from scripts.table1 import keyframe_distance
from tokenflow.evaluation.motion import Motion
from tokenflow.storage.yaml_files import save_yaml
from util import UserError


def test_distances_are_from_the_middle_of_a_pair():
    found = keyframe_distance.pair_distances(8, 4)  # keyframes 2 and 6
    assert found.tolist() == [1.5, 0.5, 0.5, 1.5, 1.5, 0.5, 0.5]


@pytest.fixture
def results(monkeypatch):
    """Two clips of each method, still but for a jump in one pair, far from the keyframes."""
    monkeypatch.setattr(keyframe_distance, "Evaluator", _Evaluator)
    flow = torch.zeros(7, 2, 4, 4), torch.ones(7, 4, 4, dtype=torch.bool)
    _Evaluator.motion = Motion(*flow)

    def open_results(folders, protocol):
        subjects = []
        for method, jump in (("PnP, fixed keyframes", 51), ("PnP, TokenFlow", 0), ("other", 9)):
            for clip in ("a", "b"):
                folder = folders[0] / method / clip
                save_yaml(folder / "config.yaml", {"keyframe_interval": 4})
                frames = np.zeros((8, 4, 4, 3), np.uint8)
                frames[4:] = jump  # between frames 3 and 4
                subjects.append(_Subject(method, clip, folder, frames))
        return subjects, []

    monkeypatch.setattr(keyframe_distance, "open_results", open_results)


class _Evaluator:
    def __init__(self, protocol):
        assert protocol.clip_model is None

    def scores_of(self, source):
        return self


class _Subject:
    source = None

    def __init__(self, method, clip, folder, frames):
        self.row, self.method, self.clip = self, method, clip
        self.folder, self.n_frames, self.frames = str(folder), len(frames), frames

    def read(self):
        return self.frames


def test_the_errors_of_pairs_of_one_distance_are_one_of_a_clip(results, tmp_path, capsys):
    words = [str(tmp_path), "--flow", "dis", "--out", str(tmp_path / "d.png")]
    found = keyframe_distance.main([*words, "--json", str(tmp_path / "d.json")])
    jump = 1e3 * 0.2**2 / 3  # one of three pairs of distance 1.5
    assert found["PnP, fixed keyframes"] == {
        0.5: {"a": 0, "b": 0},
        1.5: {"a": pytest.approx(jump), "b": pytest.approx(jump)},
    }
    assert found["PnP, TokenFlow"] == {0.5: {"a": 0, "b": 0}, 1.5: {"a": 0, "b": 0}}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["1.5", "2", "13.33", "(13.33,", "13.33)", "0.00", "(0.00,", "0.00)"]
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    assert list(json.loads((tmp_path / "d.json").read_text())) == list(keyframe_distance.METHODS)
    with pytest.raises(UserError, match="no result of x"):
        keyframe_distance.main([*words, "--methods", "x"])
