"""Table 1: the list of clips, the rows' settings, the table, and the whole on two clips."""

import json
import re

import pytest

from run_tokenflow_controlnet import ControlNetConfig
from run_tokenflow_pnp import PnPConfig
from scripts.batch.engine import ROOT
from scripts.table1 import baselines, table1
from tokenflow.evaluation.score_table import Row
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError

CLIP = {"data_path": "clips/a.mp4", "inversion_prompt": "a red star", "prompt": "a green star"}
LIST = {
    "latents_path": "caches",
    "output_path": "results",
    "settings": {"sd_version": "tiny", "n_frames": 4, "n_inversion_steps": 10, "n_timesteps": 5},
    "pnp": {"guidance_scale": 2.0},
    "controlnet": {"canny_low": 50},
    "preprocess": {"inversion_iters": 2},
    "evaluate": {"flow": "dis", "clip_model": "none"},
    "clips": [CLIP, {**CLIP, "data_path": "b", "seed": 7, "pnp": {"negative_prompt": "red"}}],
}
WITH_DEPTH = {"text2video_zero_depth": {"controlnet_key": "depth_net"}}


def configs_of(batch):
    """By clip and row, the configurations of the edits."""
    edits = [job for job in batch.jobs if job.variant is not None]
    return {(job.clip, job.kind): job.variant.config(**job.work) for job in edits}


def write(folder, changes=None):
    path = folder / "clips.yaml"
    save_yaml(path, LIST | (changes or {}))
    return path


def test_settings_come_from_the_most_special_place(tmp_path):
    batch, _ = table1.read_list(write(tmp_path))
    configs = configs_of(batch)
    a, b = (configs[clip, "PnP, fixed keyframes"] for clip in batch.clips)
    assert isinstance(a, PnPConfig)
    assert (a.guidance_scale, a.keyframes, a.latents_path) == (2.0, "fixed", "caches")
    assert (a.seed, a.negative_prompt) == (1, "")
    assert (b.seed, b.negative_prompt) == (7, "red")
    zero = configs["b", "Text2Video-Zero (Canny)"]
    assert isinstance(zero, ControlNetConfig)
    assert (zero.consistency, zero.control, zero.canny_low) == ("first_frame", "canny", 50)
    assert (zero.guidance_scale, zero.negative_prompt) == (7.5, "")  # PnP's are PnP's alone
    options = batch.jobs[0].work
    assert options | {"inversion_iters": 2, "steps": 10} == options
    assert [job.clip for job in batch.jobs if job.variant is None] == ["a", "b"]  # for all rows


def test_rows_whose_needs_are_missing_are_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(baselines, "has_patch_match", lambda: False)
    batch, _ = table1.read_list(write(tmp_path))
    assert ("a", "Text2Video-Zero (depth)") not in configs_of(batch)
    assert "(depth) is left out: no ControlNet of depth is known for sd_version tiny" in caplog.text
    assert "patch propagation is left out: PyPatchMatch is not installed" in caplog.text
    assert len(configs_of(batch)) == 2 * (len(table1.METHODS) - 2)
    batch, _ = table1.read_list(write(tmp_path, WITH_DEPTH))
    config = configs_of(batch)["a", "Text2Video-Zero (depth)"]
    assert (config.control, config.controlnet_key, config.canny_low) == ("depth", "depth_net", 100)
    assert configs_of(batch)["a", "Text2Video-Zero (Canny)"].controlnet_key is None


def test_every_row_differs_from_every_other(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "has_patch_match", lambda: True)
    batch, _ = table1.read_list(write(tmp_path, {"clips": [CLIP], **WITH_DEPTH}))
    edits = {(job.variant.edit, str(job.work)) for job in batch.jobs if job.variant}
    assert len(edits) == len(table1.METHODS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": [{**CLIP, "prompt": None}]}, "a: has no prompt"),
        ({"clips": [{**CLIP, "sed": 3}]}, "a: .*: sed: unknown key; did you mean seed"),
        ({"settings": []}, "settings: expected keys and values"),
        ({"settings": {"consistency": "none"}}, "settings: consistency: distinguishes the rows"),
        ({"clips": [{**CLIP, "pnp": {"blend": "linear"}}]}, "clips: number 1: pnp: blend: disting"),
        ({"evaluate": {"json": "x"}}, "evaluate: json: unknown key"),
        ({"evaluate": {"flow": "guess"}}, "evaluate: flow: expected one of raft, dis, truth"),
    ],
)
def test_a_wrong_list_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        table1.read_list(write(tmp_path, changes))


def test_the_davis_list_is_right():
    batch, protocol = table1.read_list(ROOT / "configs/table1_davis.yaml")
    assert protocol.flow == "raft"
    assert configs_of(batch)["dog", "PnP, TokenFlow"].keyframe_interval == 8


def row(method, clip, **measures):
    needed = {"prompt": None, "source_prompt": None, "folder": None, "video": "v", "n_frames": 1}
    needed |= {"height": 8, "width": 8, "fps": 1.0, "protocol": {}}
    return Row(method=method, clip=clip, **needed | measures)


def test_the_table_has_means_beside_the_paper_s_figures():
    rows = [row("PnP, TokenFlow", clip, warp_error=e) for clip, e in (("a", 1.0), ("b", 2.0))]
    rows.append(row("RGB propagation", "a", warp_error=0.5))
    head, *lines = table1.table(rows)
    columns = ["method", "clips", "warp error x1e-3", "95 %", "paper: warp error", "paper: CLIP"]
    assert head == columns
    assert ["PnP, TokenFlow", "2", "1.50", "1.00 to 2.00", "3", "0.33"] in lines
    assert ["RGB propagation", "1", "0.50", "-", "-", "-"] in lines
    assert ["Tune-A-Video", "-", "-", "-", "30", "0.31"] in lines
    rows += [row("Gen-1", "a", warp_error=8.0), row("Tune-A-Video", "a", warp_error=9.0)]
    lines = table1.table(rows)
    assert lines[-1] == ["Gen-1", "1", "8.00", "-", "-", "-"]
    assert ["Tune-A-Video", "1", "9.00", "-", "30", "0.31"] in lines


def rows_of(clip, errors):
    return [row(n, clip, warp_error=e) for n, e in zip(table1.ORDER, errors, strict=True)]


def test_the_verdict_on_the_paper_s_order():
    right, wrong = (0.2, 1.0, 2.0, 3.0, 4.0), (0.2, 1.0, 4.0, 3.0, 2.0)
    holds, told = table1.verdict(rows_of("a", right))
    assert holds is True
    assert told.endswith("per frame: holds (means of 1 clips)")
    holds, told = table1.verdict(rows_of("a", wrong))
    assert holds is False
    assert "does not hold, but VAE reconstruction < PnP, TokenFlow < PnP, per frame" in told
    # A clip without one of them does not count, however hard it is.
    easy = [*rows_of("a", right), *rows_of("b", [9.0] * 5)[:-1]]
    assert table1.verdict(easy)[0] is True
    assert table1.verdict(rows_of("a", right)[1:])[0] is None


# ------------------------------------------------------------------------------------- the whole

GOOD = {"data_path": "data/star.mp4", "inversion_prompt": "a red star", "prompt": "a blue star"}
FEW = ("VAE reconstruction", "Text2Video-Zero (Canny)", "PnP, TokenFlow")


@pytest.fixture(scope="module")
def done(tmp_path_factory, shared_ray):
    """Three rows of one good clip and one that is not there."""
    folder = tmp_path_factory.mktemp("table1")
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "models").symlink_to(ROOT / "models")
    steps = {"n_frames": 2, "n_inversion_steps": 2, "n_timesteps": 2, "device": "cpu"}
    changes = {
        "settings": {"sd_version": "tiny", **steps},
        "preprocess": {"H": 64, "W": 64},
        "evaluate": {"flow": "dis", "clip_model": "models/tiny/judge"},
        "clips": [{**GOOD, "data_path": "data/none.mp4"}, GOOD],
    }
    write(folder, changes)
    words = ["clips.yaml", "--json", "rows.json", "--markdown", "table.md"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(UserError, match="3 of 6 rows are missing; see the logs in results/bat"):
            table1.main([*words, "--methods", *FEW])
        yield folder


def test_one_clip_s_failure_does_not_lose_the_other(done):
    rows = json.loads((done / "rows.json").read_text())
    assert [(r["method"], r["clip"]) for r in rows] == [(name, "star") for name in FEW]
    assert all(r["warp_error"] > 0 and -1 < r["clip_score"] < 1 for r in rows)
    assert rows == json.loads((done / "results/rows/star.json").read_text())
    assert "data/none.mp4" in (done / "results/batch/none.log").read_text()
    markdown = (done / "table.md").read_text()
    assert re.search(r"\| VAE reconstruction +\| +1 \|", markdown)
    assert "Protocol: flow dis" in markdown


def test_finished_work_is_skipped_and_other_programs_rows_join_the_table(done, monkeypatch, capsys):
    monkeypatch.chdir(done)
    results = {p: p.stat().st_mtime_ns for p in (done / "results").rglob("edited.mp4")}
    assert len(results) == 3
    ours = json.loads((done / "rows.json").read_text())[0]
    (done / "theirs.json").write_text(json.dumps([ours | {"method": "Gen-1"}]))
    clips = write(done, load_yaml(done / "clips.yaml") | {"clips": [GOOD]})
    rows = table1.main([str(clips), "--methods", *FEW, "--also", "theirs.json"])
    assert [r.method for r in rows] == [*FEW, "Gen-1"]
    assert {p: p.stat().st_mtime_ns for p in (done / "results").rglob("edited.mp4")} == results
    assert re.search(r"^Gen-1 +1 ", capsys.readouterr().out, re.MULTILINE)
    (done / "theirs.json").write_text('[{"method": 3}]')
    with pytest.raises(UserError, match=r"theirs.json: row 1: "):
        table1.main([str(clips), "--also", "theirs.json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--methods", "Gen-1"], "--methods: invalid choice: 'Gen-1'"),
        (["--clip", "c"], "--clip: expected one of a, b; got c"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        table1.main([str(write(tmp_path)), *words])
