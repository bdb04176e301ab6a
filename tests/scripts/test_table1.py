"""Table 1: the list of clips, the rows' settings, the table, and the whole on two clips."""

import json
import re
from dataclasses import replace

import pytest
import torch

from run_tokenflow_controlnet import ControlNetConfig
from run_tokenflow_pnp import PnPConfig
from scripts.table1 import table1
from tokenflow.evaluation.score_table import Row, summarize
from util import UserError, load_yaml, save_yaml

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
METHODS = {method.name: method for method in table1.METHODS}


def write(folder, changes=None):
    path = folder / "clips.yaml"
    save_yaml(path, LIST | (changes or {}))
    return path


def test_settings_come_from_the_most_special_place(tmp_path):
    plan = table1.read_list(write(tmp_path))
    a, b = (plan.config(clip, METHODS["PnP, fixed keyframes"]) for clip in plan.clips)
    assert isinstance(a, PnPConfig)
    assert (a.guidance_scale, a.keyframes, a.latents_path) == (2.0, "fixed", "caches")
    assert (a.seed, a.negative_prompt) == (1, "")
    assert (b.seed, b.negative_prompt) == (7, "red")
    zero = plan.config("b", METHODS["Text2Video-Zero"])
    assert isinstance(zero, ControlNetConfig)
    assert (zero.consistency, zero.use_ddim_noise, zero.canny_low) == ("first_frame", False, 50)
    assert (zero.guidance_scale, zero.negative_prompt) == (7.5, "")  # PnP's are PnP's alone
    assert plan.inversion("a") | {"inversion_iters": 2, "steps": 10} == plan.inversion("a")


def test_every_row_differs_from_every_other(tmp_path):
    plan = table1.read_list(write(tmp_path))
    made = {(m.technique, plan.config("a", m)) for m in table1.METHODS}
    assert len(made) == len(table1.METHODS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": []}, "clips: expected a list of clips"),
        ({"clip": []}, "clip: unknown key"),
        ({"clips": [{**CLIP, "prompt": None}]}, "clips: number 1: prompt: expected text, got None"),
        ({"clips": [CLIP, CLIP]}, "number 2: a clip named a is in the list already"),
        ({"clips": [{**CLIP, "sed": 3}]}, "a: .*: sed: unknown key; did you mean seed"),
        ({"settings": {"n_frames": "many"}}, "n_frames: expected a whole number"),
        ({"settings": []}, "settings: expected keys and values"),
        ({"settings": {"consistency": "none"}}, "settings: consistency: is what tells the rows"),
        ({"clips": [{**CLIP, "pnp": {"blend": "linear"}}]}, "a: pnp: blend: is what tells"),
        ({"clips": [{**CLIP, "pnp": 3}]}, "a: pnp: expected keys and values"),
        ({"sdedit": {"sd_version": "1.5"}}, "sdedit: sd_version: all rows share one inversion"),
        ({"evaluate": {"json": "x"}}, "evaluate: json: unknown key"),
        ({"evaluate": {"flow": "guess"}}, "evaluate: flow: expected one of raft, dis, truth"),
        ({"preprocess": {"stepz": 3}}, "stepz"),
    ],
)
def test_a_wrong_list_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        table1.read_list(write(tmp_path, changes))


def test_the_davis_list_is_right():
    plan = table1.read_list(table1.ROOT / "configs/table1_davis.yaml")
    assert plan.protocol.flow == "raft"
    assert plan.config("dog", METHODS["PnP, TokenFlow"]).batch_size == 8


def row(method, clip, **measures):
    needed = {"prompt": None, "source_prompt": None, "folder": None, "video": "v", "n_frames": 1}
    needed |= {"height": 8, "width": 8, "fps": 1.0, "protocol": {}}
    return Row(method=method, clip=clip, **needed | measures)


def test_the_table_has_means_beside_the_paper_s_figures():
    rows = [row("PnP, TokenFlow", clip, warp_error=e) for clip, e in (("a", 1.0), ("b", 2.0))]
    rows.append(row("RGB propagation", "a", warp_error=0.5))
    head, *lines = table1.table(summarize(rows))
    assert head == ["method", "clips", "warp error x1e-3", "paper: warp error", "paper: CLIP"]
    assert ["PnP, TokenFlow", "2", "1.50", "3", "0.33"] in lines
    assert ["RGB propagation", "1", "0.50", "-", "-"] in lines
    assert ["Tune-A-Video", "-", "-", "30", "0.31"] in lines
    rows += [row("Gen-1", "a", warp_error=8.0), row("Tune-A-Video", "a", warp_error=9.0)]
    lines = table1.table(summarize(rows))
    assert lines[-1] == ["Gen-1", "1", "8.00", "-", "-"]
    assert ["Tune-A-Video", "1", "9.00", "30", "0.31"] in lines


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
FEW = ("VAE reconstruction", "Text2Video-Zero", "PnP, TokenFlow")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Three rows of one good clip and one that is not there."""
    folder = tmp_path_factory.mktemp("table1")
    (folder / "data").symlink_to(table1.ROOT / "data")
    (folder / "models").symlink_to(table1.ROOT / "models")
    steps = {"n_frames": 2, "n_inversion_steps": 2, "n_timesteps": 2, "device": "cpu"}
    changes = {
        "settings": {"sd_version": "tiny", **steps},
        "preprocess": {"H": 64, "W": 64},
        "evaluate": {"flow": "dis", "clip_model": "models/tiny/judge"},
        "clips": [{**GOOD, "data_path": "data/none.mp4"}, GOOD],
    }
    write(folder, changes)
    words = ["clips.yaml", "--jobs", "2", "--json", "rows.json", "--markdown", "table.md"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(UserError, match="3 of 6 rows are missing"):
            table1.main([*words, "--methods", *FEW])
        yield folder


def test_one_clip_s_failure_does_not_lose_the_other(done):
    rows = json.loads((done / "rows.json").read_text())
    assert [(r["method"], r["clip"]) for r in rows] == [(name, "star") for name in FEW]
    assert all(r["warp_error"] > 0 and -1 < r["clip_score"] < 1 for r in rows)
    assert "data/none.mp4" in (done / "results/rows/none.log").read_text()
    markdown = (done / "table.md").read_text()
    assert re.search(r"^\| VAE reconstruction +\| +1 \|", markdown, re.MULTILINE)
    assert "Protocol: flow dis" in markdown


def test_other_programs_rows_join_the_table(done, monkeypatch, capsys):
    monkeypatch.chdir(done)
    ours = json.loads((done / "rows.json").read_text())[0]
    (done / "theirs.json").write_text(json.dumps([ours | {"method": "Gen-1"}]))
    clips = write(done, load_yaml(done / "clips.yaml") | {"clips": [GOOD]})
    rows = table1.main([str(clips), "--methods", FEW[0], "--also", "theirs.json"])
    assert [r.method for r in rows] == [FEW[0], "Gen-1"]
    assert re.search(r"^Gen-1 +1 ", capsys.readouterr().out, re.MULTILINE)
    (done / "theirs.json").write_text('[{"method": 3}]')
    with pytest.raises(UserError, match=r"theirs.json: row 1: "):
        table1.main([str(clips), "--also", "theirs.json"])


def test_what_is_made_is_not_made_again(done, monkeypatch):
    monkeypatch.chdir(done)
    made = {p: p.stat().st_mtime_ns for p in (done / "results").rglob("edited.mp4")}
    assert len(made) == 3
    rows = table1.main(["clips.yaml", "--clip", "star", "--methods", *FEW])
    assert [r.method for r in rows] == list(FEW)
    assert {p: p.stat().st_mtime_ns for p in (done / "results").rglob("edited.mp4")} == made


def test_a_row_that_runs_out_of_memory_leaves_the_others(done, monkeypatch):
    def too_large(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.chdir(done)
    too_much = replace(table1.BASELINES["reconstruction"], make=too_large)
    monkeypatch.setitem(table1.BASELINES, "reconstruction", too_much)
    plan = table1.read_list(done / "clips.yaml")
    rows = table1.make_rows(plan, "star", [METHODS[name] for name in FEW])
    assert [r.method for r in rows] == list(FEW[1:])


def test_an_interrupt_starts_no_further_clip(tmp_path, monkeypatch):
    begun = []

    class Child:
        def __init__(self, command, **streams):
            begun.append(command[command.index("--clip") + 1])

        def wait(self):
            raise KeyboardInterrupt

        def terminate(self):
            begun.append("terminated")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table1.subprocess, "Popen", Child)
    clips = [{**CLIP, "data_path": name} for name in "abcdefgh"]
    plan = table1.read_list(write(tmp_path, {"clips": clips}))
    table1.rows_file(plan, "a").parent.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        table1.make_clips(plan, [], jobs=1)
    assert begun[0] == "a"
    assert "terminated" in begun
    assert len([name for name in begun if name != "terminated"]) <= 2  # one may just have begun


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--methods", "Gen-1"], "--methods: expected some of"),
        (["--clip", "c"], "--clip: expected one of a, b; got c"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        table1.main([str(write(tmp_path)), *words])
