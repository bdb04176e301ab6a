"""The run scripts from the command line to the result, on the tiny model."""

import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderTiny
from PIL import Image

import preprocess
import run_tokenflow_controlnet
import run_tokenflow_pnp
import run_tokenflow_sdedit
from run_tokenflow_controlnet import ControlNetConfig
from run_tokenflow_pnp import PnPConfig
from run_tokenflow_sdedit import SDEditConfig
from scripts.shapes.world import SAMPLES, random_scene
from tests.helpers import (
    HEIGHT,
    WIDTH,
    contents,
    edit_keys,
    invert,
    make_clip,
    make_image_folder,
    no_model_may_load,
    video_facts,
)
from tokenflow.cache.options import PreprocessOptions
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion import models
from tokenflow.editing import loop as editing
from tokenflow.editing import run as run_module
from tokenflow.editing.config import read_configs
from tokenflow.storage.images import load_frames
from tokenflow.storage.schema import PRESETS_FILE, load_config
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError, load_tensors, sha256_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "pnp": (run_tokenflow_pnp, PnPConfig),
    "sdedit": (run_tokenflow_sdedit, SDEditConfig),
    "controlnet": (run_tokenflow_controlnet, ControlNetConfig),
}
FPS = Fraction(30000, 1001)
N_FRAMES = 5


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with a clip and its cache."""
    folder = tmp_path_factory.mktemp("place")
    invert(make_clip(folder / "star.mp4", N_FRAMES, fps=FPS), folder / "latents", tiny_model)
    return folder


@pytest.fixture(scope="module")
def settings(place, tiny_model):
    """A configuration without an output path."""
    keys = {"data_path": str(place / "star.mp4"), "prompt": "A shiny, golden star!"}
    settings = edit_keys(place, tiny_model, **keys)
    del settings["output_path"]
    return settings


def edit(technique, values, folder, *argv):
    """Run a script on a config file written to `folder`; returns the file."""
    if technique == "controlnet":
        values = {"controlnet_key": str(Path(values["model_key"]) / "controlnet"), **values}
    path = folder / "config.yaml"
    save_yaml(path, values)
    SCRIPTS[technique][0].main(["--config", str(path), *argv])
    return path


def only_result(output):
    """The folder of the one result under an output path."""
    (config,) = output.glob("*/*/*/config.yaml")
    return config.parent


@pytest.fixture(scope="module")
def results(settings, tmp_path_factory):
    """Each technique's output folder and the configuration that it was made from."""
    made = {}
    for technique, (_, config_class) in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(technique)
        values = {**settings, "output_path": str(folder / "out")}
        path = edit(technique, values, folder)
        made[technique] = folder / "out", load_config(config_class, path), path
    return made


# ---------------------------------------------------------------- a result


@pytest.mark.parametrize("technique", SCRIPTS)
def test_a_result_is_what_the_design_says(results, place, technique):
    output, _, _ = results[technique]
    folder = only_result(output)
    assert folder.parent == output / technique / "star"
    assert re.fullmatch("a-shiny-golden-star-[0-9a-f]{8}", folder.name)
    files = "edited.mp4 side_by_side.mp4 edited_latents.safetensors config.yaml run.yaml frames"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == {
        *files.split(),
        *(f"frames/0000{i}.png" for i in range(N_FRAMES)),
    }
    assert list(folder.parent.iterdir()) == [folder]  # and nothing half-made
    # All frames at the clip's rate.
    assert video_facts(folder / "edited.mp4") == (N_FRAMES, FPS, (HEIGHT, WIDTH))
    assert video_facts(folder / "side_by_side.mp4") == (N_FRAMES, FPS, (HEIGHT, 2 * WIDTH))
    latents = load_tensors(folder / "edited_latents.safetensors")["latents"]
    assert latents.shape == (N_FRAMES, 4, HEIGHT // 8, WIDTH // 8)
    # How it went.
    run, cache = load_yaml(folder / "run.yaml"), next(place.rglob("nframes_5-*"))
    assert (run["technique"], run["cache"]) == (technique, str(cache))
    assert run["cache_sha256"] == open_cache(cache).sha256
    assert (run["n_frames"], run["dtype"]) == (N_FRAMES, "float32")
    assert run["source_features"] == "live"  # the cache holds none
    assert run["device"].startswith("cpu")
    assert set(run["seconds"]) == {"load", "edit", "decode", "write"}
    assert min(run["seconds"].values()) >= 0
    assert run["peak_memory_bytes"] > 1 << 20
    assert {"python", "torch", "diffusers"} <= set(run["versions"])


def test_the_edit_changes_the_clip_and_techniques_differ(results, place):
    frames = {name: load_frames(only_result(out) / "frames") for name, (out, *_) in results.items()}
    frames["source"] = load_frames(next(place.rglob("nframes_5-*")) / "frames")
    names = sorted(frames)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(frames[one].astype(int) - frames[other]).mean() > 0.5, (one, other)


@pytest.mark.parametrize("technique", SCRIPTS)
def test_the_saved_config_makes_the_same_result(results, technique, monkeypatch):
    output, config, _ = results[technique]
    saved = only_result(output) / "config.yaml"
    assert load_config(type(config), saved) == config.model_copy(update={"sd_version": "2.1"})
    keys = [key for key in type(config).model_fields if key != "preset"]
    assert list(load_yaml(saved)) == keys
    monkeypatch.setattr(editing, "load_stable_diffusion", no_model_may_load)
    SCRIPTS[technique][0].main(["--config_path", str(saved)])  # finds it made


# ---------------------------------------------------------------- a second run


def test_a_finished_result_is_skipped_and_overwritten_on_demand(
    results, settings, tmp_path, monkeypatch, capsys
):
    output, _, path = results["sdedit"]
    before = contents(output)
    with monkeypatch.context() as patch:
        patch.setattr(editing, "load_stable_diffusion", no_model_may_load)
        run_tokenflow_sdedit.main(["--config", str(path)])
        assert contents(output) == before
        assert f"result: {only_result(output)}\n" in capsys.readouterr().out
        with pytest.raises(pytest.fail.Exception):
            run_tokenflow_sdedit.main(["--config", str(path), "--overwrite"])
        with pytest.raises(pytest.fail.Exception):  # other settings are another result
            run_tokenflow_sdedit.main(["--config", str(path), "--set", "start=0.5"])
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    (only_result(copy) / "frames" / "00000.png").unlink()
    notes = only_result(copy) / "frames" / "notes.txt"
    notes.write_text("the user's")
    latents = only_result(copy) / "edited_latents.safetensors"
    old = sha256_file(latents)
    run_tokenflow_sdedit.main(
        ["--config", str(path), "--set", f"output_path={copy}", "--overwrite"]
    )
    assert notes.read_text() == "the user's"
    assert contents(copy).keys() - {str(notes.relative_to(copy))} == before.keys()
    assert sha256_file(latents) == old


def test_a_result_of_another_cache_is_computed_again(
    settings, place, tiny_model, tmp_path, monkeypatch
):
    values = {**settings, "output_path": str(tmp_path / "out"), "start": 0.2}
    values["latents_path"] = str(shutil.copytree(place / "latents", tmp_path / "latents"))
    path = edit("sdedit", values, tmp_path)
    invert(place / "star.mp4", tmp_path / "latents", tiny_model, inversion_iters=2, overwrite="")
    monkeypatch.setattr(editing, "load_stable_diffusion", no_model_may_load)
    with pytest.raises(pytest.fail.Exception):
        run_tokenflow_sdedit.main(["--config", str(path)])


def test_an_interrupted_edit_leaves_no_result(settings, tmp_path, monkeypatch):
    values = {**settings, "output_path": str(tmp_path / "out"), "start": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_tensors", lambda *args: 1 / 0)  # frames are there
        with pytest.raises(ZeroDivisionError):
            edit("sdedit", values, tmp_path)
    parent = tmp_path / "out" / "sdedit" / "star"
    assert all(path.name.startswith(".") for path in parent.iterdir())
    edit("sdedit", values, tmp_path)
    assert [path.name for path in parent.iterdir()] == [only_result(tmp_path / "out").name]


@pytest.mark.parametrize("fps", [12, 23.976023976023978, 0.5])
def test_another_frame_rate_on_demand(settings, tmp_path, fps):
    values = {**settings, "output_path": str(tmp_path / "out"), "start": 0.2, "fps": fps}
    values["latents_path"] = str(shutil.copytree(settings["latents_path"], tmp_path / "latents"))
    manifest = next(tmp_path.rglob("manifest.yaml"))  # an earlier version took any rate
    manifest.write_text(manifest.read_text().replace(f"fps: {FPS}", "fps: '2000'"))
    edit("sdedit", values, tmp_path)
    count, rate, _ = video_facts(only_result(tmp_path / "out") / "edited.mp4")
    assert count == N_FRAMES
    assert float(rate) == pytest.approx(fps, rel=1e-5)


def test_previews_show_the_edit_come_along_and_go(settings, tmp_path, monkeypatch):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, act_fn="relu"
    )
    vae.save_pretrained(tmp_path / "taesd")
    drawn, save = [], Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda image, path: drawn.append(image.size) or save(image, path)
    )
    for key in (None, str(tmp_path / "taesd")):
        drawn.clear()
        keys = {**settings, "output_path": str(tmp_path / f"out{key is None}"), "start": 1.0}
        edit("sdedit", keys | {"preview_every": 2, "preview_vae": key}, tmp_path)
        assert drawn.count((3 * WIDTH, HEIGHT)) == 5 // 2
        folder = only_result(Path(keys["output_path"]))
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# ---------------------------------------------------------------- mistakes


def test_flags_win_over_set_and_an_unknown_one_is_explained():
    words = ["--device", "cpu", "--set", "device=cuda", "--set", "data_path=x", "--set", "prompt=a"]
    [config], overwrite = read_configs(PnPConfig, words, "pnp", "")
    assert (config.device, overwrite) == ("cpu", False)
    with pytest.raises(UserError, match="arguments: --prompt a; use --set prompt="):
        read_configs(PnPConfig, ["--prompt", "a"], "pnp", "")
    with pytest.raises(UserError, match="prompt: is missing"):  # the shipped one is an example
        read_configs(PnPConfig, words[:-2], "pnp", "")


def test_a_mistake_is_told_before_the_slow_imports():
    code = """
import sys
import benchmark, evaluate, preprocess, report, visualize
import run_tokenflow_controlnet, run_tokenflow_pnp, run_tokenflow_sdedit
from util import UserError
mistakes = [(preprocess.main, ["--data_path", "x", "--steps", "0"])]
mistakes += [(evaluate.main, ["no/results", "--flow", "dus"])]
mistakes += [(report.main, ["x", "--metrik"]), (benchmark.main, ["--steps", "0"])]
mistakes += [(visualize.main, ["correspondence", "--frame", "1", "--keyframe", "2", "--out", "x"])]
for main, argv in mistakes + [
    (script.main, ["--set", "n_frames=0"])
    for script in (run_tokenflow_pnp, run_tokenflow_sdedit, run_tokenflow_controlnet)
]:
    try:
        main(argv)
    except UserError as error:
        print(error)
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *told, imported = ran.stdout.splitlines()
    names = ["--steps", "--flow", "unrecognized arguments", "--steps", "--cache and --result"]
    names += ["--set n_frames"] * 3
    assert [line.partition(":")[0] for line in told] == names
    assert imported == "[]"


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("listed", [True, False])
def test_several_prompts_are_several_edits_of_one_load(
    settings, tmp_path, monkeypatch, capsys, listed
):
    loads, load = [], models.load_stable_diffusion
    monkeypatch.setattr(
        models, "load_stable_diffusion", lambda *key: loads.append(key) or load(*key)
    )
    prompts = ["a red robot", "'quoted', a: #1"]
    keys = {**settings, "output_path": str(tmp_path / "out"), "n_frames": 1, "start": 0.2}
    save_yaml(tmp_path / "config.yaml", keys | ({"prompt": prompts} if listed else {}))
    words = [] if listed else [word for text in prompts for word in ("--set", f"prompt={text}")]
    run_tokenflow_sdedit.main(["--config", str(tmp_path / "config.yaml"), *words])
    *lines, page = capsys.readouterr().out.splitlines()
    printed = [line.partition("result: ")[2] for line in lines]
    assert [load_config(SDEditConfig, f"{p}/config.yaml").prompt for p in printed] == prompts
    assert len(loads) == 1
    shown = tmp_path / "out" / "report" / "report.html"
    assert page == f"report: {shown} (2 results of 1 clips)"
    assert all(Path(folder).name in shown.read_text() for folder in printed)
    save_yaml(tmp_path / "config.yaml", keys | {"prompt": []})
    with pytest.raises(UserError, match=r"prompt: expected a text or a list of texts, got \[\]"):
        run_tokenflow_sdedit.main(["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "prompt",
    [
        "../../x",
        "/etc/passwd",
        "two\nlines\r\n--overwrite",
        "a tab \t, a bell \a and a next line \x85",
        "\N{WOLF FACE} \N{ZERO WIDTH JOINER} \u202e \x1b[31m",
        "wolf " * 2000,
        "",
        "CON: ~/$HOME `x` '\"",
    ],
    ids=range(8),
)
def test_a_hostile_prompt_stays_in_the_output_folder(settings, place, tmp_path, prompt):
    keys = {"output_path": str(tmp_path / "out"), "prompt": prompt, "negative_prompt": prompt}
    before = contents(place)
    edit("sdedit", {**settings, **keys, "n_frames": 1, "start": 0.2}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]
    assert contents(place) == before
    folder = only_result(tmp_path / "out")
    assert folder.parent == tmp_path / "out" / "sdedit" / "star"
    assert set(folder.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(folder.name) < 64
    assert load_config(SDEditConfig, folder / "config.yaml").prompt == prompt


def test_a_nul_is_refused(settings, tmp_path):
    for key in ("prompt", "negative_prompt", "data_path", "output_path"):
        with pytest.raises(UserError, match=f"{key}: 'a.x00b' holds a NUL character"):
            edit("sdedit", {**settings, key: "a\0b"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "name",
    [
        "a [b]*? {c} #1 % & ; $(x) `y` ' \" \\ <img src=x>",
        "\N{WOLF FACE} \u72fc \u0630\u0626\u0628 \N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}",
        "-rf ~ ..",
    ],
    ids=("signs", "alphabets", "dashes"),
)
def test_a_hostile_clip_name_is_a_folder_in_the_cache_and_in_the_results(
    settings, tiny_model, tmp_path, name
):
    (tmp_path / "work").mkdir()
    clip = make_clip(tmp_path / "clips" / f"{name}.mp4", n_frames=1)
    cache = invert(clip, tmp_path / "work" / "latents", tiny_model, n_frames=1)
    assert cache.parent == tmp_path / "work" / "latents" / "sd_2.1" / name / "steps_10"
    keys = {
        "data_path": str(clip),
        "latents_path": str(tmp_path / "work" / "latents"),
        "output_path": str(tmp_path / "work" / "out"),
    }
    edit("sdedit", {**settings, **keys, "n_frames": 1, "start": 0.2}, tmp_path / "work")
    folder = only_result(tmp_path / "work" / "out")
    assert folder.parent == tmp_path / "work" / "out" / "sdedit" / name
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    assert there == {f"clips/{name}.mp4", "work/config.yaml", "work/latents", "work/out"}


def test_a_fresh_checkout_has_the_folder_of_caches():
    assert (ROOT / "latents" / ".gitkeep").is_file()


# ---------------------------------------------------------------- the released files

RELEASED = Path(__file__).with_name("released")


@pytest.mark.parametrize("technique", ["pnp", "sdedit"])
def test_a_released_config_runs_unchanged(technique, tiny_model, tmp_path, monkeypatch):
    """With nothing but the device and the model overridden on the command line."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(RELEASED / f"{technique}.yaml", "config.yaml")
    keys = load_yaml("config.yaml")
    # The released scripts know no smaller size than 512; the cache decides.
    small = {"H": 16, "W": 16, "steps": keys["n_inversion_steps"], "save_steps": 50}
    clip = make_image_folder(tmp_path / keys["data_path"], n_frames=2)
    invert(clip, "latents", tiny_model, **small, n_frames=40, recon_steps=1, cache_features="")
    script, config_class = SCRIPTS[technique]
    script.main(
        ["--config_path", "config.yaml", "--device", "cpu", "--set", f"model_key={tiny_model}"]
    )
    folder = only_result(tmp_path / "tokenflow-results")
    assert folder.parents[1].name == technique
    assert folder.parent.name == clip.name
    assert video_facts(folder / "edited.mp4") == (2, Fraction(24), (16, 16))
    used = load_config(config_class, folder / "config.yaml").model_dump()
    keys["keyframe_interval"] = keys.pop("batch_size")
    assert used == used | keys | {"device": "cpu", "model_key": str(tiny_model)}


# ---------------------------------------------------------------- configs/


@pytest.mark.parametrize("technique", SCRIPTS)
def test_the_commented_config_is_the_defaults(technique):
    _, config_class = SCRIPTS[technique]
    path = ROOT / "configs" / f"config_{technique}.yaml"
    config = load_config(config_class, path)
    fields = {name: field.get_default() for name, field in config_class.model_fields.items()}
    written = load_yaml(path)
    assert written.keys() == fields.keys()
    chosen = {"data_path", "prompt", "negative_prompt"}
    assert {name for name in fields if getattr(config, name) != fields[name]} == chosen


def resolved(cls, path, text, *overrides):
    path.write_text(f"data_path: a\nprompt: b\n{text}", encoding="utf-8")
    return load_config(cls, path, overrides)


@pytest.mark.parametrize("name", load_yaml(PRESETS_FILE))
@pytest.mark.parametrize("technique", SCRIPTS)
def test_a_preset_is_its_keys_and_not_a_key_of_the_result(technique, name, tmp_path):
    cls, sections = SCRIPTS[technique][1], load_yaml(PRESETS_FILE)[name]
    keys = sections["edit"] | sections.get(technique, {})
    config = resolved(cls, tmp_path / "c.yaml", f"preset: {name}\n")
    assert config == cls(data_path="a", prompt="b", **keys)
    assert "preset" not in config.model_dump()
    shipped = ROOT / "configs" / f"config_{technique}.yaml"
    config = load_config(cls, shipped, [f"preset={name}"])
    assert config.model_dump() == load_config(cls, shipped).model_dump() | keys
    assert PreprocessOptions(data_path="a", preset=name) == PreprocessOptions(
        data_path="a", **sections["preprocess"]
    )


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], ("nn", 8)),
        ("preset: best", [], ("flow", 4)),
        ("preset: best\ncorrespondence: nn\nbatch_size: 2", [], ("nn", 2)),  # the file's own keys
        ("correspondence: nn\nbatch_size: 2", ["preset=best"], ("flow", 4)),
        ("correspondence: nn", ["keyframe_interval=3", "preset=best"], ("flow", 3)),
        ("preset: best\ncorrespondence: hybrid", ["preset=paper"], ("hybrid", 8)),
        ("preset: best", ["preset=paper"], ("nn", 8)),
        ("preset: best", ["batch_size=5"], ("flow", 5)),
    ],
)
def test_keys_win_over_a_preset_that_is_named_with_them(
    text, overrides, expected, tmp_path, monkeypatch, caplog
):
    keys = {"correspondence": "flow", "keyframe_interval": 4}
    presets = {"paper": {"edit": {}, "pnp": {}}, "best": {"edit": keys, "pnp": {}}}
    monkeypatch.setattr("tokenflow.storage.schema._presets", lambda: presets)
    caplog.set_level("INFO")
    config = resolved(PnPConfig, tmp_path / "c.yaml", text, *overrides)
    assert (config.correspondence, config.keyframe_interval) == expected
    kept = "own correspondence: nn, batch_size: 2 win over preset: best" in caplog.text
    assert kept == (expected == ("nn", 2))


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(UserError, match="preset: expected one of paper, released, best; got"):
        resolved(PnPConfig, tmp_path / "c.yaml", "preset: bets")
    with pytest.raises(UserError, match="--preset: 'bets', expected one of paper, released, best"):
        preprocess.parse_args(["--data_path", "a", "--preset", "bets"])


def test_fast_wins_over_a_preset():
    words = ["--data_path", "a", "--preset", "released", "--fast"]
    assert preprocess.parse_args(words) == preprocess.parse_args(["--data_path", "a", "--fast"])


BUNDLED = [(t, path) for t in SCRIPTS for path in sorted(ROOT.glob(f"configs/[!c]*_{t}*.yaml"))]


@pytest.mark.parametrize(("technique", "path"), BUNDLED, ids=lambda path: getattr(path, "stem", ""))
def test_the_configs_of_the_bundled_clips_load(technique, path):
    config = load_config(SCRIPTS[technique][1], path)
    caption = random_scene(*SAMPLES[Path(config.data_path).stem]).caption
    assert config.sd_version == "tiny"
    assert config.negative_prompt in ("", caption)
    assert config.prompt != caption
    assert len(config.prompt.split()) in range(len(caption.split()), len(caption.split()) + 2)


# ---------------------------------------------------------------- as programs


@pytest.mark.parametrize("script", [preprocess, *(script for script, _ in SCRIPTS.values())])
def test_help_is_printed(script, capsys):
    with pytest.raises(SystemExit) as left:
        script.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: " in shown
    assert "--device" in shown


PROGRAMS = {
    "preprocess.py": ["--data_path", "nowhere.mp4"],
    "run_tokenflow_pnp.py": ["--config", "nowhere.yaml"],
    "run_tokenflow_sdedit.py": ["--set", "start=2"],
    "run_tokenflow_controlnet.py": ["--set", "latents_path=nowhere", "--device", "cpu"],
}


def test_a_bad_input_ends_a_program_with_one_line(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    before = contents(tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {
        name: subprocess.Popen([sys.executable, ROOT / name, *argv], cwd=tmp_path, **pipes)
        for name, argv in PROGRAMS.items()
    }
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, ""), name
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert any(value.partition("=")[2] in line for value in PROGRAMS[name])
    assert contents(tmp_path) == before
