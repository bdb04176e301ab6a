"""Tables of scores, and files of rows."""

import csv
import io
import json

import pytest

from tokenflow.evaluation.score_table import (
    COLUMNS,
    Row,
    interval,
    markdown_table,
    paired_difference,
    read_rows,
    rows_as_csv,
    rows_as_json,
    summarize,
    text_table,
)
from util import MissingFileError, UserError


def row(**values: object) -> Row:
    protocol = {
        "flow": "dis", "flow_weights": None, "occlusion": "o", "resolution": "4x4", "mask": None,
        "clip_model": None, "dino_model": None, "versions": {"torch": "1"},
    }  # fmt: skip
    plain = {
        "method": "A", "clip": "one", "prompt": "p", "source_prompt": None, "folder": None,
        "video": "v", "n_frames": 3, "height": 4, "width": 4, "fps": 10.0, "protocol": protocol,
    }  # fmt: skip
    return Row(**plain | values)


def test_means_are_of_the_rows_that_have_a_measure():
    rows = [
        row(warp_error=1.0, clip_score=0.5),
        row(method="B", warp_error=9.0),
        row(clip="two", warp_error=3.0),
        row(clip="two", warp_error=5.0),
    ]
    a, b = summarize(rows)
    assert (a.method, a.rows, a.clips) == ("A", 3, 2)
    assert a.means["warp_error"] == 3
    assert (a.means["clip_score"], a.counts["clip_score"]) == (0.5, 1)
    assert (a.means["psnr"], a.counts["psnr"]) == (None, 0)
    assert (b.method, b.rows, b.means["warp_error"]) == ("B", 1, 9)
    assert set(a.means) == set(COLUMNS)


def test_the_text_table_is_aligned_and_says_of_how_many_a_mean_is():
    rows = [
        row(warp_error=12.345, clip_score=0.5, peak_memory_bytes=3 * 2**29),
        row(clip="another", warp_error=1.0),
        row(method="B", clip="another", clip_score=0.25, warp_error=2.0),
    ]
    lines = text_table(rows).splitlines()
    assert lines[:6] == [
        "method    clip         warp error x1e-3    CLIP score    peak memory GiB",
        "A         one                     12.35         0.500               1.50",
        "A         another                  1.00             -                  -",
        "B         another                  2.00         0.250                  -",
        "A         mean of 2                6.67  0.500 (of 1)        1.50 (of 1)",
        "B         mean of 1                2.00         0.250                  -",
    ]
    assert lines[7].startswith("Protocol: flow dis; occlusion o; 4x4 (HxW), 3 frames; masks: none;")


def test_edits_of_one_clip_by_one_method_are_told_apart_by_their_prompts():
    rows = [row(prompt="a blue star", psnr=1.0), row(prompt="a green star", psnr=2.0)]
    lines = text_table(rows).splitlines()
    assert lines[0].split() == ["method", "clip", "prompt", "PSNR", "dB"]
    assert "a blue star" in lines[1]
    assert "prompt" not in text_table(rows[:1])


def test_rows_by_other_protocols_are_told():
    base = row()
    other = row(protocol=base.protocol | {"flow": "raft", "flow_weights": "w"})
    lines = text_table([base, other, base, base]).splitlines()[-2:]
    assert lines[0].startswith("Protocol of rows 1, 3-4: flow dis;")
    assert lines[1].startswith("Protocol of rows 2: flow raft, w;")


def test_names_break_no_markdown_and_no_csv():
    hostile = row(method="a|b\n*c* <script>", prompt='say "hi",\nthen | go', psnr=1.0)
    line = markdown_table([hostile]).splitlines()[2]
    assert line.split() == ["|", r"a\|b", r"\*c\*", r"\<script>", "|", "one", "|", "1.00", "|"]
    text = rows_as_csv([hostile, row(seconds={"edit": 1.5})])
    first_line, second_line = csv.DictReader(io.StringIO(text, newline=""))
    assert first_line["prompt"] == hostile.prompt
    assert first_line["seconds_edit"] == ""
    assert second_line["seconds_edit"] == "1.5"


def test_rows_survive_saving(tmp_path):
    rows = [row(warp_error=1.0), row(method="B", seconds={"edit": 1.5}, peak_memory_bytes=7)]
    (tmp_path / "rows.json").write_text(rows_as_json(rows))
    read = json.loads((tmp_path / "rows.json").read_text())[0]
    assert (read["warp_error"], read["clip_score"]) == (1.0, None)
    assert set(read) == set(Row.model_fields)
    assert read_rows(tmp_path / "rows.json") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "rows.json: not valid JSON"),
        ("[" * 100_000, "rows.json: not valid JSON"),
        ("{}", "rows.json: expected a list of rows, as evaluate.py --json writes it"),
        ("[[]]", "rows.json: row 1: expected keys and values"),
        ('[{"method": 3}]', "rows.json: row 1: method: expected text, got 3"),
    ],
)
def test_what_holds_no_rows_is_refused(text, message, tmp_path):
    with pytest.raises(MissingFileError, match="no such file of rows"):
        read_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "rows.json")


def test_the_interval_is_that_of_the_mean():
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    mean, low, high = interval([0.0, 1.0] * 50)
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)


def test_a_paired_difference_is_of_the_clips_that_both_have():
    errors = {"a": (1.0, 3.0), "b": (1.0, 4.0), "c": (1.0, 2.0)}
    rows = [
        row(method=method, clip=clip, warp_error=error)
        for clip, pair in errors.items()
        for method, error in zip(("one", "other"), pair, strict=True)
    ]
    rows += [row(method="one", clip="d", warp_error=9.0), row(method="other", clip="e")]
    rows.append(row(method="one", clip="a", warp_error=2.0))  # another prompt: the mean is 1.5
    line = paired_difference(rows, "one", "other", "warp_error")
    assert line.startswith("one - other: warp error -1.83 (-3.00, -1.00), smaller on 3 of 3 clips")
    assert line.endswith(": apart")
    same = paired_difference(rows, "one", "one", "warp_error")
    assert same.endswith("smaller on 0 of 4 clips: not apart")
    assert "of 1 clips, so no interval" in paired_difference(rows[:2], "one", "other", "warp_error")
