"""FiVE-Bench: a made-up tree of its layout, from prompts to laid-out frames and scores."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.batch import engine
from scripts.batch.engine import FAILED, MADE, Outcome
from scripts.table1 import five_bench
from tests.helpers import HEIGHT, WIDTH, shapes_frames
from tokenflow.diffusion.models import KeptModels
from tokenflow.editing.results import find_results
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import PartialFailure, UserError

pytestmark = pytest.mark.usefixtures("here")

DATA = Path("FiVE")
SIZE = 2 * HEIGHT + 1, 2 * WIDTH  # of the benchmark's pictures
LONG = "a wolf " * 60


def entry(clip, prompt, negative="", **changes):
    texts = {"source_prompt": "a [red] star", "target_prompt": prompt, "negative_prompt": negative}
    folder = f"1_{prompt[:20]}"
    return {"video_name": clip, "save_dir": folder, "editing_type_id": 1, **texts} | changes


def write_tree(edits):
    """The benchmark's folder with two clips and these edits, by their kind."""
    for seed, name in enumerate(("0001_bus", "0002_girl-dog")):
        frames = shapes_frames(3, *SIZE, seed)
        for folder, pictures in (("images", frames), ("bmasks", 255 * (frames[..., 0] > 100))):
            (DATA / folder / name).mkdir(parents=True)
            for number, picture in enumerate(pictures, start=1):
                image = Image.fromarray(picture.astype(np.uint8))
                image.save(DATA / folder / name / f"{number:05d}.jpg")
    (DATA / "edit_prompt").mkdir()
    for kind, entries in edits.items():
        path = DATA / "edit_prompt" / f"edit{kind}_FiVE.json"
        path.write_text(json.dumps(entries), encoding="utf-8")


def write_settings(model):
    content = load_yaml(Path(five_bench.__file__).parents[2] / five_bench.LIST)
    content["settings"] |= {
        "sd_version": "tiny", "model_key": str(model), "n_inversion_steps": 4, "n_timesteps": 2,
        "device": "cpu", "keyframe_interval": 2,
    }  # fmt: skip
    content["preprocess"] |= {"H": HEIGHT, "W": WIDTH}
    save_yaml("five.yaml", content)


def run_here(jobs, folder, at_once):
    """Takes the place of run_jobs: no Ray; jobs of a clip named missing fail."""
    load = KeptModels()
    return {
        job.key: Outcome(FAILED, reason="no such clip")
        if not Path(job.work["data_path"]).exists()
        else Outcome(MADE, folder=str(engine.make(job, load)))
        for job in jobs
    }


def test_edits_are_laid_out_for_the_scorer_and_scored(tiny_model, monkeypatch, capsys):
    write_tree({
        "1": [entry("0001_bus", "a [blue] star", "blurry"), entry("gone", "a cat")],
        "4": [entry("0001_bus", LONG, save_dir="4_long"), entry("0002_girl-dog", "a blue star")],
    })  # fmt: skip
    write_settings(tiny_model)
    monkeypatch.setattr(five_bench, "run_jobs", run_here)
    words = [str(DATA), "--list", "five.yaml", "--kinds", "1", "4"]
    with pytest.raises(PartialFailure, match="1 of 4 edits failed: gone: 1_a cat: no such clip"):
        five_bench.main(["edit", *words])
    out = Path("tokenflow-results/five_bench")
    results = {load_yaml(f / "config.yaml")["prompt"]: f for f in find_results([out / "pnp"])[0]}
    assert len(results) == 2  # two clips have one of the prompts in common
    config = load_yaml(next((out / "pnp" / "0001_bus").glob("a-blue-star-*")) / "config.yaml")
    assert (config["prompt"], config["negative_prompt"]) == ("a blue star", "blurry")
    assert (config["propagation"], config["fps"]) == ("released", 10)
    cut = next(prompt for prompt in results if prompt.startswith("a wolf"))
    assert LONG.startswith(cut) and len(cut.split()) == 75  # each of one token
    laid = sorted(
        str(path.parent.relative_to(out)) for path in out.glob("TokenFlow/*/*/*/00002.png")
    )
    assert laid == [
        "TokenFlow/0001_bus/1_a [blue] star/img_ode",
        "TokenFlow/0001_bus/1_a wo/img_ode",  # as long as save_dir
        "TokenFlow/0002_girl-dog/1_a blue star/img_ode",
    ]
    assert load_frames(out / laid[0]).shape == (3, SIZE[0] - 1, SIZE[1], 3)  # even, for H.264

    capsys.readouterr()
    judge = Path(five_bench.__file__).parents[2] / "models" / "tiny" / "judge"
    words += ["--clip_model", str(judge), "--dino_model", "none", "--device", "cpu"]
    words += ["--csv", "scores", "--frame_stride", "2"]
    with pytest.raises(PartialFailure, match=r"1 of 4 could not be scored: .*gone"):
        five_bench.main(["score", *words])
    with open("scores/edit4_FiVE_evaluation_result_frame_stride2.csv", newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading[:2] == ["file_id", "1_TokenFlow|psnr_unedit_part"] and len(heading) == 7
    assert [row[0] for row in rows] == ["0", "1"] and all(
        float(v) >= 0 for r in rows for v in r[1:]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counted = [line[:2] for line in lines if line[0] in ("1", "4", "all")]
    assert counted == [["1", "1"], ["4", "2"], ["all", "3"]]


def test_the_frames_themselves_score_best(tiny_model):
    """Copies of the source keep all; a frame of another size is resized."""
    write_tree({"1": [entry("0001_bus", "a star")]})
    [edit] = five_bench.read_edits(DATA, ["1"])
    found = edit.entry
    assert found.source_prompt == "a red star"
    frames = five_bench.frames_of(Path("results"), edit)
    frames.mkdir(parents=True)
    for number in range(3):
        source = DATA / "images" / "0001_bus" / f"{number + 1:05d}.jpg"
        Image.open(source).save(frames / f"{number:05d}.png")
    models = five_bench.load_models("none", "none", "cpu")
    scores = five_bench.score_edit(DATA, frames, found, 1, models)
    assert scores["mse_unedit_part"] == 0 and scores["ssim_unedit_part"] == pytest.approx(1)
    shutil.rmtree(DATA / "bmasks")
    with pytest.raises(UserError, match="bmasks"):
        five_bench.score_edit(DATA, frames, found, 1, models)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid JSON"),
        ("{}", "expected a list"),
        (json.dumps([entry("../x", "a")]), "number 1: video_name"),
        (json.dumps([entry("x", "a", save_dir="..")]), "number 1: save_dir"),
        (json.dumps([{"video_name": "x"}]), "number 1: "),
    ],
)
def test_a_file_that_is_not_the_benchmark_s_is_refused(content, message):
    path = DATA / "edit_prompt" / "edit1_FiVE.json"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"edit1_FiVE.json: .*{message}"):
        five_bench.read_edits(DATA, ["1"])
    with pytest.raises(UserError, match=r"edit2_FiVE.json: no such file"):
        five_bench.read_edits(DATA, ["2"])


def test_what_one_edit_cannot_be_made_for_both_is_refused(tiny_model):
    edits = {str(kind): [entry("0001_bus", "a star", text)] for kind, text in ((1, "a"), (2, "b"))}
    write_tree(edits)
    write_settings(tiny_model)
    with pytest.raises(UserError, match="different negative prompts"):
        five_bench.main(["edit", str(DATA), "--list", "five.yaml", "--kinds", "1", "2"])
    Path("plain.yaml").write_text("settings: [1]\n", encoding="utf-8")
    for command in ("edit", "score"):
        with pytest.raises(UserError, match=r"plain.yaml: settings: "):
            five_bench.main([command, str(DATA), "--list", "plain.yaml", "--kinds", "1"])
