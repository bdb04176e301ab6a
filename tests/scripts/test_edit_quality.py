"""scripts/studies/edit_quality.py: its edits, measures and tables, and the whole."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scripts.batch.engine import FAILED, ROOT, Outcome
from scripts.shapes.clips import edited_scene, scene_of, write_clips
from scripts.shapes.metrics import Judge
from scripts.shapes.pictures import SIZE
from scripts.shapes.world import HUES, SAMPLE_FRAMES, render_clip
from scripts.studies import edit_quality
from scripts.studies.edit_quality import Grid, Setting
from tokenflow.evaluation.evaluator import Protocol
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError

SEED = 6_000_000
FEW = {"n_frames": 2, "n_inversion_steps": 2, "n_timesteps": 2, "device": "cpu"}


def test_the_grid_is_valid_and_its_clips_differ(clips):
    grid = Grid(**load_yaml(edit_quality.GRID))
    edit_quality.read_jobs(clips, grid.rows)  # refuses keys that a technique does not know
    seeds = [{s.seed + i for i in range(len(s.kinds))} for s in grid.splits.values()]
    assert not seeds[0] & seeds[1]
    assert len(grid.splits["report"].kinds) >= 10


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A list of two clips, of few frames and steps."""
    path = write_clips(tmp_path_factory.mktemp("quality") / "tune", SEED, 2, ["shapes", "crossing"])
    given = load_yaml(path)
    for section in ("settings", "preprocess"):
        given[section] |= {"settings": FEW, "preprocess": {"H": 64, "W": 64}}[section]
    save_yaml(path, given | {"evaluate": given["evaluate"] | {"clip_model": JUDGE}})
    return path


JUDGE = str(ROOT / "models/tiny/judge")


def test_settings_that_invert_alike_share_a_cache(clips):
    settings = {
        "a": Setting(technique="pnp"),
        "b": Setting(technique="sdedit", edit={"start": 0.5}),
        "c": Setting(technique="pnp", preprocess={"inversion_iters": 1}),
        "d": Setting(technique="pnp", edit={"n_inversion_steps": 4}),
    }
    jobs = edit_quality.read_jobs(clips, settings)[0].jobs
    assert len({job.key for job in jobs}) == len(jobs)
    inversions = {job.key: job.work for job in jobs if job.variant is None}
    of = {(j.kind, j.clip): inversions[j.needs] | {"key": j.needs} for j in jobs if j.variant}
    for clip in ("shapes-6000000", "crossing-6000001"):
        a, b, c, d, vae = (of[name, clip] for name in (*settings, edit_quality.VAE))
        assert a["key"] == b["key"] == vae["key"]
        assert (a["steps"], a["inversion_iters"]) == (2, 2)
        assert c["save_dir"] != a["save_dir"] == d["save_dir"]
        assert (c["inversion_iters"], d["steps"], d["inversion_iters"]) == (1, 4, 2)


def test_edits_of_objects_are_masked_by_their_own_masks(clips):
    setting = Setting(technique="pnp", edit={"mask": "{masks}"})
    batch, protocol = edit_quality.read_jobs(clips, {"masked": setting})
    edits = [job for job in batch.jobs if job.kind == "masked"]
    assert [job.work["mask"] for job in edits] == [f"{protocol.masks}/{j.clip}" for j in edits]
    behind = replace(edits[0], clip="background-1", work=setting.edit)
    assert edit_quality._with_mask(behind, protocol) is None


@pytest.mark.parametrize("kind", ["shapes", "crossing", "background", "fill"])
def test_success_is_the_share_of_frames_that_show_what_was_asked_for(kind):
    measure = edit_quality.Scores(SimpleNamespace(protocol=Protocol(clip_model=JUDGE)))
    measure.judge = Judge(ROOT / "models/tiny/judge", "cpu")
    scene = scene_of(kind, SEED + 1)
    asked = edited_scene(kind, scene)
    thing = replace(asked.objects[0], rgb=HUES[asked.objects[0].color])
    if kind == "background":
        asked = replace(asked, background_rgb=HUES[asked.background])
    asked = replace(asked, objects=(thing, *scene.objects[1:]))
    source, edited = (render_clip(s, SAMPLE_FRAMES, SIZE).frames[:12] for s in (scene, asked))
    clip = f"{kind}-{SEED + 1}"
    assert measure.success(clip, source) == 0
    assert measure.success(clip, edited) == 1
    assert measure.success(clip, np.concatenate([edited[:6], source[6:]])) == pytest.approx(
        0.5, abs=0.1  # the hidden frames of a crossing do not count
    )  # fmt: skip


def score(method, clip, **measures):
    return {
        **dict.fromkeys(edit_quality.MEASURES),
        **{"method": method, "clip": clip, "kind": clip[:1], "warp_error": 1.0, **measures},
    }


def test_the_tables_compare_a_technique_s_settings_with_its_first():
    settings = {name: Setting(technique="pnp") for name in ("first", "second")}
    settings["other"] = Setting(technique="sdedit")
    scores = [
        score("first", "a1", warp_error=2.0),
        score("first", "b1", warp_error=4.0, clip_score=0.5),
        score("second", "a1", warp_error=1.0),
        score("second", "b1", warp_error=1.0, clip_score=0.75),
        score("second", "c1", warp_error=9.0),  # no pair
        score("other", "a1"),
    ]
    head, first, second, other = edit_quality.means_table(scores)
    assert first[head.index("warp error x1e-3")] == "3.00"
    assert [line[1] for line in (first, second, other)] == ["2", "3", "1"]
    head, line = edit_quality.differences_table(scores, settings)
    found = dict(zip(head, line, strict=True))
    assert found["method"] == "second"
    assert found["less warp error"] == "2 of 2"
    assert found["warp error x1e-3"] == "-2.00 (-3.00, -1.00)"
    assert found["CLIP score"] == "+0.250 (+0.250, +0.250)"
    assert found["success"] == "-"
    head, first, *_ = edit_quality.kinds_table(scores)
    assert head == ["method", "a (1)", "b (1)", "c (1)"]
    assert first == ["first", "2.00", "4.00", "-"]


@pytest.mark.slow
def test_the_whole(clips, tmp_path, monkeypatch, shared_ray, capsys):
    monkeypatch.chdir(ROOT)
    words = ["tune", "--folder", str(clips.parents[1]), "--clips", "1"]
    words += ["--rows", "PnP", "PnP, released", "PnP, inversion 32 x 1"]
    files = ["--json", str(tmp_path / "s.json"), "--markdown", str(tmp_path / "s.md")]
    files += ["--picture", str(tmp_path / "s.png")]
    scores = edit_quality.main([*words, *files])
    assert json.loads((tmp_path / "s.json").read_text()) == scores
    assert [s["method"] for s in scores] == [*words[-3:], edit_quality.VAE]
    base, _, plain, vae = scores
    assert vae["sharpness_ratio_object"] == vae["sharpness_ratio_background"] == 1
    # Inversion, reconstruction and features; with one evaluation a step, two fewer.
    assert base["preprocess_forwards"] - plain["preprocess_forwards"] == 2
    assert base["edit_forwards"] > 4
    assert Image.open(tmp_path / "s.png").size[0] > 100
    assert "| PnP, released " in (tmp_path / "s.md").read_text()

    def fail(jobs, *args):
        return {job.key: Outcome(FAILED) for job in jobs}

    monkeypatch.setattr(edit_quality, "run_jobs", fail)
    with pytest.raises(UserError, match="4 edits have no scores; see the logs in "):
        edit_quality.main(words)
    with pytest.raises(UserError, match="--rows: invalid choice"):
        edit_quality.main(["tune", "--rows", "PnP, better"])
