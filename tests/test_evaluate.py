"""evaluate.py from the command line to its tables: results of the tiny model, and other videos."""

import csv
import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import run_tokenflow_sdedit
from scripts.shapes.metrics import true_motion
from scripts.shapes.world import random_scene, render_clip
from tests.helpers import (
    HEIGHT,
    WIDTH,
    contents,
    edit,
    invert,
    make_clip,
    no_model_may_load,
    save_masks,
)
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion import optical_flow
from tokenflow.diffusion.vae import psnr
from tokenflow.editing.results import Result, find_results, read_result
from tokenflow.evaluation import inputs, metrics, motion
from tokenflow.evaluation.evaluator import Evaluator, Protocol
from tokenflow.evaluation.score_table import (
    Row,
    markdown_table,
    text_table,
)
from tokenflow.storage.images import load_frames, save_frames
from tokenflow.storage.video import save_video
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import MissingFileError, PartialFailure, UserError

JUDGE = str(Path(__file__).resolve().parents[1] / "models" / "tiny" / "judge")
QUICK = ["--flow", "dis", "--clip_model", "none", "--device", "cpu"]
N_FRAMES = 4
FIRST = tuple(range(N_FRAMES))
SOURCE_PROMPT, PROMPT = "a red star on a yellow background", "a blue star on a yellow background"


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with two clips, their true motion and masks, caches, and an edit of each."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("one", "two")):
        clip = make_clip(folder / f"{name}.mp4", 5, seed=seed)
        rendered = render_clip(random_scene(seed), 5, (HEIGHT, WIDTH))
        motion.save_motion(folder / f"{name}.flow.safetensors", true_motion(rendered))
        save_masks(folder / "masks" / name, rendered.masks)
        invert(clip, folder / "latents", tiny_model, inversion_prompt=SOURCE_PROMPT)
        settings = {"prompt": PROMPT, "n_frames": N_FRAMES, "keyframe_interval": 2, "start": 0.4}
        edit(run_tokenflow_sdedit, clip, tiny_model, **settings)
        if name == "one":
            edit(run_tokenflow_sdedit, clip, tiny_model, **settings, keyframes="fixed")
    return folder


@pytest.fixture
def results(place, tmp_path):
    """A copy of the results that a test may damage."""
    return Path(shutil.copytree(place / "results", tmp_path / "out"))


def first(results: Path) -> Path:
    return find_results([results])[0][0]


def change(path: Path, **keys: object) -> None:
    """Set keys of a YAML file; None removes one."""
    record = load_yaml(path) | keys
    save_yaml(path, {k: v for k, v in record.items() if v is not None})


# ---------------------------------------------------------------- results


@pytest.fixture(scope="module")
def scored(place, tmp_path_factory):
    """All results scored by the whole script: the rows, and the folder of the files."""
    out = tmp_path_factory.mktemp("scores")
    files = [f"--{kind}={out / f'scores.{kind}'}" for kind in ("json", "csv", "markdown")]
    rows = evaluate.main(
        [str(place / "results"), "--flow", "truth", "--masks", str(place / "masks"),
         "--clip_model", JUDGE, "--device", "cpu", *files]
    )  # fmt: skip
    return rows, out


def test_every_result_has_a_row(scored, place):
    rows, _ = scored
    assert sorted((row.method, row.clip) for row in rows) == [
        ("SDEdit, TokenFlow", "one"),
        ("SDEdit, TokenFlow", "two"),
        ("SDEdit, fixed keyframes", "one"),
    ]
    for row in rows:
        assert (row.prompt, row.source_prompt) == (PROMPT, SOURCE_PROMPT)
        assert (row.n_frames, row.height, row.width, row.fps) == (N_FRAMES, HEIGHT, WIDTH, 10.0)
        assert Path(row.folder).parent == place / "results" / "sdedit" / row.clip
        assert row.video == f"{row.folder}/edited.mp4"


def test_the_scores_are_the_measures_of_the_png_frames(scored, place):
    rows, _ = scored
    clip = metrics.ClipEmbedder(Path(JUDGE), torch.device("cpu"))
    for row in rows:
        frames = load_frames(Path(row.folder) / "frames")
        source = open_cache(Path(load_yaml(Path(row.folder) / "run.yaml")["cache"])).frames(4)
        truth = motion.load_motion(place / f"{row.clip}.flow.safetensors")
        masks = render_clip(random_scene(["one", "two"].index(row.clip)), 5, (HEIGHT, WIDTH)).masks
        object_ = masks[:N_FRAMES] > 0
        assert row.warp_error == metrics.warp_error(frames, truth)
        for part, where in (("object", object_), ("background", ~object_)):
            error = metrics.warp_error(frames, truth, where)
            assert getattr(row, f"warp_error_{part}") == error
        assert row.psnr == psnr(frames, source)
        assert row.psnr_object == psnr(frames, source, object_)
        assert row.psnr_background == psnr(frames, source, ~object_)
        assert row.sharpness == metrics.sharpness(frames)
        assert row.sharpness_object == metrics.sharpness(frames, object_) != row.sharpness
        assert row.sharpness_background == metrics.sharpness(frames, ~object_)
        assert (row.ssim, row.ssim_object, row.ssim_background) == metrics.ssim(
            frames, source, object_
        )
        edited, text = clip.embed_frames(frames), clip.embed_text(PROMPT)
        assert row.clip_score == metrics.clip_score(edited, text)
        assert row.clip_frame == metrics.clip_frame_consistency(edited)
        assert row.clip_directional == metrics.clip_directional(
            edited, clip.embed_frames(source), text, clip.embed_text(SOURCE_PROMPT)
        )
        assert row.dino_distance is None


def test_the_cost_is_the_runs(scored):
    for row in scored[0]:
        run = load_yaml(Path(row.folder) / "run.yaml")
        seconds = run["seconds"]
        work = seconds["edit"] + seconds["decode"] + seconds["write"]
        assert row.seconds == seconds
        assert row.seconds_per_frame == pytest.approx(work / N_FRAMES)
        manifest = open_cache(Path(run["cache"])).manifest
        assert row.inversion_seconds_per_frame == pytest.approx(manifest.seconds["inversion"] / 5)
        assert row.peak_memory_bytes == run["peak_memory_bytes"]


def test_the_protocol_is_in_each_row(scored):
    for row in scored[0]:
        protocol = dict(row.protocol)
        assert {"torch", "torchvision", "transformers", "cv2"} <= set(protocol.pop("versions"))
        assert protocol == {
            "flow": "truth",
            "flow_weights": None,
            "occlusion": "ground truth",
            "resolution": f"{HEIGHT}x{WIDTH}",
            "mask": inputs.MASK_RULE,
            "clip_model": JUDGE,
            "dino_model": None,
        }


def test_the_files_hold_the_rows(scored):
    rows, out = scored
    assert json.loads((out / "scores.json").read_text()) == [row.model_dump() for row in rows]
    with open(out / "scores.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["prompt"] == PROMPT
        assert float(line["warp_error"]) == row.warp_error
        assert float(line["seconds_edit"]) == row.seconds["edit"]
        assert line["protocol_flow"] == "truth"
        assert line["dino_distance"] == ""
        assert f"torch {torch.__version__}" in line["protocol_versions"]
    markdown = (out / "scores.markdown").read_text()
    assert markdown == markdown_table(rows)
    assert re.search(r"^\| SDEdit, TokenFlow +\| mean of 2 +\|", markdown, re.MULTILINE)


def test_a_report_on_standard_output_is_alone_there(place, capsys):
    rows = evaluate.main([str(first(place / "results")), "--json", "-", *QUICK])
    shown = capsys.readouterr()
    assert json.loads(shown.out) == [row.model_dump() for row in rows]
    assert text_table(rows) in shown.err


def test_one_result_is_scored_by_its_folder_and_named_twice_is_one_row(place, scored, capsys):
    before = contents(place)
    folder = first(place / "results")
    rows = evaluate.main([str(folder), str(folder.parent), *QUICK])
    assert len(rows) == len(list(folder.parent.iterdir()))
    shown = capsys.readouterr().out
    assert shown.startswith("method ")
    assert "Protocol: flow dis; occlusion forward-backward, alpha1 0.01, alpha2 0.5" in shown
    assert "CLIP score" not in shown  # not measured: no column
    assert all(row.clip_score is None and row.psnr_object is None for row in rows)
    assert contents(place) == before  # results are only read
    by_truth = {row.folder: row for row in scored[0]}
    for row in rows:
        assert row.psnr == by_truth[row.folder].psnr
        assert 0 < row.warp_error != by_truth[row.folder].warp_error


def test_flow_and_embeddings_of_a_source_are_computed_once(place, monkeypatch):
    calls = []
    estimate = motion.motion_by
    monkeypatch.setattr(motion, "motion_by", lambda *a: calls.append("flow") or estimate(*a))
    embed = metrics.ClipEmbedder.embed_frames
    counted = lambda self, frames: calls.append("clip") or embed(self, frames)  # noqa: E731
    monkeypatch.setattr(metrics.ClipEmbedder, "embed_frames", counted)
    rows = evaluate.main(
        [str(place / "results"), "--flow", "dis", "--clip_model", JUDGE, "--device", "cpu"]
    )
    assert len(rows) == 3  # of two sources
    assert calls.count("flow") == 2
    assert calls.count("clip") == 3 + 2


def test_a_source_of_the_same_name_is_another(place, results, tmp_path):
    """What is kept of a source is used for its very frames only."""
    source = place / "one.mp4"
    edited = make_clip(tmp_path / "edit.mp4", 5, seed=5)
    protocol = Protocol(flow="dis", clip_model=None, device="cpu")
    evaluator = Evaluator(protocol)

    def score(source: Path, by: Evaluator = evaluator) -> Row:
        video = inputs.OtherVideo(source=str(source), edited=str(edited))
        return by.score(inputs.open_video(video))

    first_row = score(source)
    assert score(source) == first_row
    moved = shutil.copy(source, tmp_path / "clip.mp4")
    score(moved)
    shutil.copy(place / "two.mp4", moved)
    fresh = score(moved, Evaluator(protocol))
    assert score(moved) == fresh
    assert fresh.warp_error != first_row.warp_error


def test_the_first_frames_of_a_longer_truth_are_used(place):
    """The results have four frames, the truth five: an edit that is its source has its error."""
    source = inputs.Source("one", place / "one.mp4", lambda: None, (4, HEIGHT, WIDTH), FIRST)
    truth = inputs.read_truth(source, None)
    whole = motion.load_motion(place / "one.flow.safetensors")
    assert torch.equal(truth.flow, whole.flow[:3])
    later = dataclasses.replace(source, shape=(3, HEIGHT, WIDTH), numbers=(2, 3, 4))
    assert torch.equal(inputs.read_truth(later, None).flow, whole.flow[2:])
    half = dataclasses.replace(source, shape=(4, HEIGHT // 2, WIDTH))
    assert torch.equal(
        inputs.read_truth(half, place).flow[:, 1],
        whole.flow[:3, 1, 1::2] / 2,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shape": (6, HEIGHT, WIDTH), "numbers": tuple(range(6))},
            "holds 5 frames, the edit needs those up to 6",
        ),
        ({"numbers": (2, 3, 4, 5)}, "holds 5 frames, the edit needs those up to 6"),
        ({"shape": (2, HEIGHT, WIDTH), "numbers": (0, 2)}, "of consecutive frames, the edit skips"),
        ({"shape": (4, 40, 40), "fit": "crop"}, "the edit of a part cropped from it"),
        ({"path": Path("nowhere.mp4")}, "nowhere.flow.safetensors: no such file"),
    ],
)
def test_truth_that_does_not_fit_is_refused(changes, message, place):
    source = inputs.Source("one", place / "one.mp4", lambda: None, (4, HEIGHT, WIDTH), FIRST)
    with pytest.raises(UserError, match=message):
        inputs.find_truth(dataclasses.replace(source, **changes), None)


# ---------------------------------------------------------------- records


def test_a_record_without_figures_gives_nulls(results):
    folder = first(results)
    run = load_yaml(folder / "run.yaml")
    save_yaml(folder / "run.yaml", {key: run[key] for key in ("technique", "cache")})
    change(folder / "config.yaml", fps=None, keyframes=None)
    row = Evaluator(Protocol(flow="dis", clip_model=None, device="cpu")).score_result(folder)
    assert (row.seconds, row.seconds_per_frame, row.peak_memory_bytes) == (None, None, None)
    assert row.fps == 10
    json.dumps(row.model_dump(), allow_nan=False)


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("run.yaml", {"seconds": [1]}, r"run.yaml: seconds: expected keys and values, got \[1\]"),
        ("run.yaml", {"seconds": {"edit": "long"}}, r"run.yaml: seconds: edit: expected a number"),
        ("run.yaml", {"peak_memory_bytes": "much"}, r"run.yaml: peak_memory_bytes: expected a num"),
        ("run.yaml", {"n_frames": 9}, r"4 frames, but run.yaml says 9"),
        ("run.yaml", {"cache": None}, r"run.yaml: cache: is missing.*--source"),
        ("run.yaml", {"cache": "nowhere"}, r"no finished cache nowhere; .*where the edit was run"),
        ("run.yaml", {"cache_sha256": "0"}, r"run.yaml: its cache .* was replaced since.*--source"),
        ("config.yaml", {"prompt": 7}, r"config.yaml: prompt: expected text or null, got 7"),
        ("config.yaml", {"fps": "fast"}, r"config.yaml: fps: expected a number or null, got 'f"),
    ],
)
def test_a_malformed_record_is_one_clear_error(file, keys, message, results, monkeypatch):
    folder = first(results)
    change(folder / file, **keys)
    monkeypatch.setattr(Evaluator, "score", no_model_may_load)
    with pytest.raises(UserError, match=message):
        evaluate.main([str(folder), *QUICK])


def test_frames_that_do_not_fit_the_source_are_refused(results):
    folder = first(results)
    save_frames(folder / "frames", np.zeros((4, 40, 40, 3), np.uint8))
    with pytest.raises(UserError, match=r"4 frames of 40x40.*has 5 of 48x80"):
        evaluate.main([str(folder), *QUICK])
    save_frames(folder / "frames", np.zeros((6, HEIGHT, WIDTH, 3), np.uint8))
    change(folder / "run.yaml", n_frames=None)
    with pytest.raises(UserError, match=r"6 frames of 48x80.*has 5 of 48x80"):
        evaluate.main([str(folder), *QUICK])


def test_the_source_prompt_stands_in_for_an_empty_inversion_prompt(place, monkeypatch):
    folder = first(place / "results")
    assert inputs.open_result(folder, "something else").row.source_prompt == SOURCE_PROMPT
    cache = read_result(folder).cache()
    manifest = cache.manifest.model_copy(update={"inversion_prompt": ""})
    without = dataclasses.replace(cache, manifest=manifest)
    monkeypatch.setattr(Result, "cache", lambda self: without)
    assert inputs.open_result(folder, "something else").row.source_prompt == "something else"


@pytest.mark.parametrize("name", ["frames/00002.png", "frames/00000.png", "run.yaml"])
def test_one_damaged_result_does_not_lose_the_others(name, results, tmp_path, capsys):
    damaged = find_results([results])[0][1] / name
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(PartialFailure, match=rf"1 of 3 could not be scored: {damaged}: "):
        evaluate.main([str(results), "--json", str(tmp_path / "rows.json"), *QUICK])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["folder"] for row in rows] == [str(find_results([results])[0][i]) for i in (0, 2)]
    assert capsys.readouterr().out.startswith("method ")


# ---------------------------------------------------------------- other programs' videos


def test_one_folder_of_masks_is_not_taken_for_several_clips(place):
    with pytest.raises(UserError, match=r"--masks: .*one: holds no folder one/ of masks"):
        evaluate.main([str(place / "results"), "--masks", str(place / "masks" / "one"), *QUICK])


def test_any_video_is_scored(place, tmp_path):
    """An edit that is the source: no error but what is drawn where nothing was, all similar."""
    rows = evaluate.main(
        ["--source", str(place / "one.mp4"), "--edited", str(place / "one.mp4"),
         "--prompt", PROMPT, "--source_prompt", SOURCE_PROMPT, "--method", "Gen-1",
         "--flow", "truth", "--clip_model", JUDGE, "--json", str(tmp_path / "rows.json")]
    )  # fmt: skip
    (row,) = rows
    assert (row.method, row.clip, row.folder) == ("Gen-1", "one", None)
    assert (row.n_frames, row.height, row.width, row.fps) == (5, HEIGHT, WIDTH, 10.0)
    assert row.psnr > 100
    assert row.ssim == pytest.approx(1)
    assert row.clip_directional == 0
    assert 0 < row.warp_error < 2
    assert row.clip_frame > 0.5
    assert json.loads((tmp_path / "rows.json").read_text()) == [row.model_dump()]


def test_a_part_and_a_size_in_common_are_chosen(place, tmp_path, caplog):
    frames = render_clip(random_scene(0), 5, (96, 160)).frames
    save_frames(tmp_path / "edit", frames[2:])
    words = ["--source", str(place / "one.mp4"), "--edited", str(tmp_path / "edit"), *QUICK]
    words += ["--start", "2", "--H", "40", "--W", "64"]
    with caplog.at_level(logging.WARNING):
        (row,) = evaluate.main(words)
    assert (row.n_frames, row.height, row.width) == (3, 40, 64)
    assert row.method == "edit"
    assert row.psnr > 28  # the very frames, but for two codecs' and resizings' differences
    assert not caplog.records
    (row,) = evaluate.main([*words, "--n_frames", "2"])
    assert row.n_frames == 2


@pytest.fixture
def odd_clips(tmp_path):
    """Clips that do not go together."""
    make_clip(tmp_path / "long.mp4", 5)
    make_clip(tmp_path / "short.mp4", 3)
    save_video(tmp_path / "large.mp4", np.zeros((5, 64, 80, 3), np.uint8), Fraction(10))
    return tmp_path


@pytest.mark.parametrize(
    ("edited", "options", "message"),
    [
        ("short", [], r"short.mp4: 3, .*long.mp4: 5 from frame 0; .*--n_frames 3 or less"),
        ("short", ["--n_frames", "4"], r"frames \(of 4 asked for\): .*--n_frames 3"),
        ("long", ["--start", "2"], r"long.mp4: 5, .*long.mp4: 3 from frame 2"),
        ("large", [], r"large.mp4: 64x80, .*long.mp4: 48x80; choose one for both with --H and --W"),
        ("gone", [], r"gone.mp4: no such video"),
    ],
)
def test_videos_that_differ_are_refused(edited, options, message, odd_clips):
    words = ["--source", str(odd_clips / "long.mp4"), "--edited", str(odd_clips / f"{edited}.mp4")]
    with pytest.raises(UserError, match=message):
        evaluate.main([*words, *options, *QUICK])


@pytest.mark.parametrize(
    ("rates", "numbers"),
    [((30, 20), [0, 2, 3, 4]), ((20, 30), [0, 1, 2, 3]), ((10, 20), [0, 1, 2])],
)
def test_frames_of_the_same_time_are_matched_on_demand(rates, numbers, tmp_path):
    """Brightness grows with time."""
    paths = [tmp_path / "source.mp4", tmp_path / "edited.mp4"]
    for path, fps in zip(paths, rates, strict=True):
        frames = [np.full((32, 32, 3), k * 480 // fps, np.uint8) for k in range(5)]
        save_video(path, frames, Fraction(fps))
    words = ["--source", str(paths[0]), "--edited", str(paths[1]), *QUICK]
    said = rf"different frame rates: .*edited.mp4: {rates[1]}, .*source.mp4: {rates[0]}; .*--match"
    with pytest.raises(UserError, match=said):
        evaluate.main(words)
    (by_time,) = evaluate.main([*words, "--match", "times"])
    (by_number,) = evaluate.main([*words, "--match", "frames"])
    assert (by_time.fps, by_time.n_frames) == (min(rates), len(numbers))
    assert by_time.psnr > by_number.psnr + 3
    source, edited = map(str, paths)
    part = inputs.OtherVideo(source=source, edited=edited, match="times", n_frames=2)
    subject = inputs.open_video(part)
    assert subject.source.numbers == tuple(numbers[:2]) and subject.row.n_frames == 2


def test_a_video_of_one_frame_has_no_error_to_measure(odd_clips):
    long = str(odd_clips / "long.mp4")
    (row,) = evaluate.main(["--source", long, "--edited", long, "--n_frames", "1", *QUICK])
    assert row.warp_error is None
    assert row.psnr is not None


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name results, or any video by --source, --edited and --prompt"),
        (["--source", "a.mp4"], "--edited: is missing; name results, or"),
        (["--edited", "a.mp4"], "--source: is missing; name results, or"),
        (["out", "--prompt", "x"], "--prompt: is of a single video; leave out it or the results"),
        (["out", "--source", "x.mp4"], "--source: is of a single video"),
        (["--source", "a", "--edited", "b", "--n_frames", "0"], "--n_frames: 0, expected at le"),
        (["--source", "a", "--edited", "b", "--start", "-1"], "--start: -1, expected at least 0"),
        (["--source", "a", "--edited", "b", "--H", "64"], "--H and --W: give both or neither"),
        (["out", "--json", "."], r"--json: \.: is a folder, expected a file"),
        (["out", "--csv", f"{__file__}/x.csv"], "--csv: .* is a file, expected a folder"),
        (["out", "--flou", "dis"], "unrecognized arguments: --flou"),
    ],
)
def test_a_bad_command_line_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flow", "farneback"], "--flow: 'farneback', expected one of raft, dis, truth"),
        (["--flow", "dis", "--flow_weights", "a"], "--flow_weights: goes with --flow raft only"),
        (["--flow", "dis", "--truth", "a"], "--truth: goes with --flow truth only"),
        (["--flow_weights", "gone.safetensors"], "--flow_weights: gone.safetensors: no such file"),
        (["--flow", "dis", "--clip_model", "no such/folder"], "--clip_model none leaves the meas"),
        (["--flow", "dis", "--dino_model", "no such/folder"], "--dino_model none leaves the meas"),
    ],
)
def test_a_protocol_that_cannot_be_kept_is_refused(words, message, place):
    clip = [] if "--clip_model" in words else ["--clip_model", "none"]
    with pytest.raises(UserError, match=message):
        evaluate.main([str(place / "results"), "--device", "cpu", *clip, *words])


def test_a_missing_prompt_is_refused_before_anything_is_loaded(place, results, monkeypatch):
    monkeypatch.setattr(Evaluator, "score", no_model_may_load)
    dis = ["--flow", "dis", "--clip_model", JUDGE, "--device", "cpu"]
    clip = str(place / "one.mp4")
    with pytest.raises(UserError, match=r"one.mp4: the prompt is missing.*--prompt.*none"):
        evaluate.main(["--source", clip, "--edited", clip, *dis])
    change(first(results) / "config.yaml", prompt=None)
    with pytest.raises(UserError, match=r"config.yaml: the prompt is missing"):
        evaluate.main([str(first(results)), *dis])


def test_folders_without_results_are_refused_before_weights_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(optical_flow, "find_raft_weights", no_model_may_load)
    monkeypatch.setattr(metrics, "model_folder", no_model_may_load)
    with pytest.raises(MissingFileError, match="gone: no such folder of results"):
        evaluate.main([str(tmp_path / "gone")])
    with pytest.raises(UserError, match=r"no finished result; expected a folder with edited.mp4"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(MissingFileError, match=r"gone.mp4: no such video"):
        evaluate.main(["--source", str(tmp_path / "gone.mp4"), "--edited", "a.mp4"])


def test_a_bad_input_ends_the_program_with_one_line():
    root = Path(evaluate.__file__).parent
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--source", "data/star.mp4", "--edited", "data/star.mp4",
         "--prompt", "x", "--n_frames", "2", "--flow_weights", "gone.safetensors"],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --flow_weights: gone.safetensors: no such file\n"
