"""scripts/studies/max_keyframes.py: the edits that it makes, and what it prints of their scores."""

from types import SimpleNamespace

import pytest

from scripts.batch.engine import FAILED, FOUND, Outcome
from scripts.studies import max_keyframes
from tests.scripts.test_table1 import CLIP, row, write
from util import UserError


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The jobs that ran; clip b's flicker falls with the bound, a's does so but for 3."""
    ran = SimpleNamespace(jobs=[], state=FOUND)

    class Evaluator:
        def __init__(self, protocol):
            pass

        def score_result(self, key):
            work = next(job.work for job in ran.jobs if job.key == str(key))
            bound, clip = work["max_keyframes"] or 10, work["data_path"]
            error = bound + (3 if clip == "a" and bound == 3 else 0)
            return row("pnp", clip, warp_error=10.0 - error, clip_score=0.5)

    def run_jobs(jobs, log_folder):
        ran.jobs += jobs
        return {job.key: Outcome(ran.state, folder=job.key) for job in jobs}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(max_keyframes, "Evaluator", Evaluator)
    monkeypatch.setattr(max_keyframes, "run_jobs", run_jobs)
    write(tmp_path, {"clips": [{**CLIP, "data_path": name} for name in "ab"]})
    return ran


def test_each_clip_is_inverted_once_and_edited_under_each_bound(ran, capsys):
    max_keyframes.main(["clips.yaml", "--interval", "2", "--bounds", "6", "3"])
    inversions = [job.work for job in ran.jobs if job.variant is None]
    assert [(work["data_path"], work["keyframe_interval"]) for work in inversions] == [
        ("a", 2),
        ("b", 2),
    ]
    edits = [job.work for job in ran.jobs if job.variant is not None]
    found = [
        (work["data_path"], work["keyframe_interval"], work["max_keyframes"]) for work in edits
    ]
    assert found == [(clip, 2, bound) for clip in "ab" for bound in (None, 6, 3)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["null", "0.00", "0.500", "0"],
        ["6", "4.00", "0.500", "0"],
        ["3", "5.50", "0.500", "0"],
    ]


def test_a_failed_edit_is_reported(ran):
    ran.state = FAILED
    with pytest.raises(UserError, match="6 edits failed; see the logs in results/batch"):
        max_keyframes.main(["clips.yaml", "--bounds", "6", "3"])


def test_wrong_options_are_refused(ran):
    for words in (["--interval", "0", "--bounds", "4"], ["--bounds", "1"]):
        with pytest.raises(UserError, match=r"(interval: .*at least 1|bounds: .*at least 2)"):
            max_keyframes.main(["clips.yaml", *words])
    assert not ran.jobs
