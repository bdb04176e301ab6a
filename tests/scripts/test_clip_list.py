"""Lists of clips: their format, and the jobs they ask for."""

import shutil
from pathlib import Path

import pytest

from scripts.batch import clip_list
from scripts.batch.clip_list import INVERSION, read_batch
from scripts.batch.davis import read_image_set, sequences
from tests.helpers import make_image_folder, write_list
from tokenflow.storage.yaml_files import load_yaml
from util import UserError

ROOT = Path(clip_list.__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("here")


def configs(found):
    """By clip and technique, the configurations of a batch's edits."""
    edits = [job for job in found.jobs if job.kind != INVERSION]
    return {(job.clip, job.kind): job.work for job in edits}


# --------------------------------------------------------------------------------------- the list


def test_settings_come_from_the_most_special_place(tiny_model):
    own = {"n_frames": 2, "sdedit": {"start": 0.5}, "prompts": ["x {clip}"], "pnp": {"seed": 3}}
    found = read_batch(
        write_list(
            tiny_model,
            techniques=["pnp", "sdedit"],
            sdedit={"start": 0.7, "seed": 5},
            inversion_prompt="a {clip}",
            clips=[{"data_path": "a"}, {"data_path": "b_c-d", **own}],
            output_path="results",
        )
    )
    of = configs(found)
    assert of["a", "sdedit"]["start"] == 0.7
    assert (of["b_c-d", "sdedit"]["start"], of["b_c-d", "sdedit"]["seed"]) == (0.5, 5)
    assert (of["b_c-d", "pnp"]["seed"], of["a", "pnp"]["seed"]) == (3, 1)
    assert (of["a", "pnp"]["n_frames"], of["b_c-d", "pnp"]["n_frames"]) == (3, 2)
    # {clip} is the list's word; a clip's own prompts are what they are.
    assert (of["a", "pnp"]["prompt"], of["b_c-d", "pnp"]["prompt"]) == ("a a of marble", "x {clip}")
    assert of["a", "pnp"]["output_path"] == "results"
    prompts = [j.work["inversion_prompt"] for j in found.jobs if j.kind == INVERSION]
    assert prompts == ["a a", "a b c d"]


def test_a_preset_wins_over_the_places_before_it_and_reaches_the_inversion(tiny_model):
    settings = {"model_key": str(tiny_model), "correspondence": "nn", "preset": "best"}
    clips = [{"data_path": "a", "preset": "paper", "n_inversion_steps": 100}, {"data_path": "b"}]
    given = {"settings": settings | {"n_timesteps": 25}, "clips": clips}
    given |= {"techniques": ["pnp", "sdedit"], "sdedit": {"preset": "best", "smooth_steps": 0.2}}
    found = read_batch(write_list(tiny_model, **given))
    shown = {
        name: (work["correspondence"], work["smooth_steps"], work["deflicker"])
        for name, work in configs(found).items()
    }
    assert shown["a", "pnp"] == ("nn", 0.0, False)
    assert shown["b", "pnp"] == ("nn", 0.5, True)  # its own key wins over its preset
    assert shown["b", "sdedit"] == ("flow", 0.2, True)
    a, b = (job.work for job in found.jobs if job.kind == INVERSION)
    assert (a["steps"], a["save_steps"], a["reconstruction"]) == (100, 25, "full")
    assert (b["steps"], b["save_steps"], b["reconstruction"]) == (50, 25, "sample")
    flow = {"model_key": str(tiny_model), "n_inversion_steps": 50, "correspondence": "flow"}
    found = read_batch(write_list(tiny_model, settings=flow))
    assert found.jobs[0].work["correspondence"] == "flow"  # its features serve these edits


def test_each_cache_is_made_once_before_its_edits_and_those_of_one_model_together(
    tiny_model, tiny_v_model
):
    # The sdedit's is another model, and so another cache of each clip.
    other = {"sdedit": {"model_key": str(tiny_v_model), "sd_version": "1.5"}}
    found = read_batch(write_list(tiny_model, techniques=["pnp", "sdedit"], **other))
    shape = [(job.clip, job.kind) for job in found.jobs]
    assert shape == [
        ("a", INVERSION), ("a", "pnp"), ("b", INVERSION), ("b", "pnp"),
        ("a", INVERSION), ("a", "sdedit"), ("b", INVERSION), ("b", "sdedit"),
    ]  # fmt: skip
    for job, before in zip(found.jobs[1::2], found.jobs[::2], strict=True):
        assert job.needs == before.key
    assert len({job.key for job in found.jobs}) == 8
    assert [j.key for j in read_batch(Path("list.yaml")).jobs] == [j.key for j in found.jobs]


def test_an_inversion_serves_all_edits_from_it(tiny_model):
    clips = [{"data_path": "a", "pnp": {"pnp_f_t": 0.2, "pnp_attn_t": 0.1, "keyframe_interval": 3}}]
    found = read_batch(
        write_list(
            tiny_model,
            techniques=["sdedit", "pnp"],
            clips=clips,
            preprocess={"inversion_iters": 2, "no_cache_features": True},
        )
    )
    options = found.jobs[0].work
    assert (options["pnp_f_t"], options["pnp_attn_t"], options["keyframe_interval"]) == (
        0.2,
        0.1,
        2,
    )
    assert (options["inversion_iters"], options["cache_features"]) == (2, False)
    assert (options["verify"], options["allow_pickle"]) == (False, False)
    checked = read_batch(Path("list.yaml"), verify=True)
    assert checked.jobs[0].work["verify"] is True
    assert checked.jobs[1].work["verify"] is True


def test_an_inversion_under_a_controlnet_has_the_edit_s(tiny_model):
    control = {"controlnet_key": str(tiny_model / "controlnet"), "canny_low": 50}
    changes = {"techniques": ["pnp", "controlnet"], "controlnet": control}
    settings = load_yaml(write_list(tiny_model))["settings"] | {"sd_version": "ControlNet"}
    found = read_batch(write_list(tiny_model, **changes, settings=settings))
    assert [job.kind for job in found.jobs] == [INVERSION, "pnp", "controlnet"] * 2
    assert found.jobs[0].work["canny_low"] == 50


def test_the_command_line_is_in_the_place_of_the_list_s(tiny_model):
    clips = [{"data_path": "a"}, {"data_path": "b", "prompts": ["own"], "techniques": ["pnp"]}]
    path = write_list(tiny_model, clips=clips)
    found = read_batch(path, {"prompts": ["p", "q"], "techniques": ["sdedit"]})
    edits = [(j.clip, j.kind, j.work["prompt"]) for j in found.jobs if j.kind != INVERSION]
    assert edits == [("a", "sdedit", "p"), ("a", "sdedit", "q"), ("b", "pnp", "own")]
    key = found.jobs[2].key
    assert [job.work.get("prompt") for job in found.only([key]).jobs] == [None, "q"]
    with pytest.raises(UserError, match="--only: 123: this list has no such job"):
        found.only(["123"])


CLIP = {"data_path": "a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": []}, "clip: unknown key; did you mean clips"),
        ({"clips": {}}, "clips: expected a list, got {}"),
        ({"clips": []}, "names no clips"),
        ({"clips": ["a"]}, "clips: number 1: expected keys and values"),
        ({"clips": [{}]}, "number 1: data_path: is missing; expected text"),
        ({"clips": [{"data_path": "a\0b"}]}, "number 1: data_path: .*NUL"),
        ({"clips": [CLIP, CLIP]}, "number 2: a is given twice"),
        ({"clips": [{**CLIP, "promts": ["x"]}]}, "a: pnp: promts: unknown key; did you mean"),
        ({"clips": [{**CLIP, "output_path": "x"}]}, "number 1: output_path: is not a setting"),
        ({"clips": [{**CLIP, "pnp": 3}]}, "number 1: pnp: expected keys and values"),
        ({"clips": [{**CLIP, "pnp": {"prompt": "x"}}]}, "pnp: prompt: is not a setting"),
        ({"prompts": "a bear"}, "prompts: expected a list, got 'a bear'"),
        ({"prompts": []}, "prompts: expected a list of texts"),
        ({"prompts": ["x", 3]}, "prompts: number 2: expected text, got 3"),
        ({"prompts": ["x", "x"]}, "prompts: 'x' is given twice"),
        ({"inversion_prompt": 3}, "inversion_prompt: expected text or null, got 3"),
        ({"techniques": ["pmp"]}, "techniques: number 1: expected one of pnp, .*got 'pmp'"),
        ({"settings": {"prompt": "x"}}, "settings: prompt: is not a setting"),
        ({"settings": {"n_frames": "many"}}, "a: pnp: n_frames: expected a whole number"),
        ({"sdedit": {"start": 3}, "techniques": ["sdedit"]}, "start: expected .*at most 1"),
        ({"latents_path": 3}, "latents_path: expected text"),
        ({"output_path": None}, "output_path: expected text"),
        ({"preprocess": {"stepz": 3}}, "a: preprocess: .*stepz"),
        ({"preprocess": {"steps": 3}}, "preprocess: steps: comes from the edits; say n_inv"),
        ({"preprocess": {"overwrite": True}}, "overwrite: would rebuild the caches"),
        ({"preprocess": {"fast": 3}}, "preprocess: fast: expected true or false, got 3"),
        ({"settings": {"model_key": "x/y/z"}}, "a: pnp: x/y/z: no such folder"),
        ({"settings": {"device": "gpu"}}, "a: pnp: device: gpu is unknown"),
        ({"davis": {"roots": "x"}}, "davis: roots: unknown key; did you mean root"),
        ({"davis": {"resolution": "480p"}}, "davis: root: is missing; expected text"),
        ({"davis": {"root": "none"}}, "none/JPEGImages/480p: no such folder"),
        ({"davis": {"root": "x", "resolution": ".."}}, "resolution: expected a folder's name"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused_before_any_work(tiny_model, changes, message):
    if "model_key" not in changes.get("settings", {}) and "settings" in changes:
        changes = changes | {"settings": {"model_key": str(tiny_model)} | changes["settings"]}
    with pytest.raises(UserError, match=message):
        read_batch(write_list(tiny_model, **changes))


def test_edits_from_one_cache_must_agree_on_it(tiny_model):
    path = write_list(tiny_model, techniques=["pnp", "sdedit"], sdedit={"n_timesteps": 1})
    with pytest.raises(UserError, match="sdedit: n_timesteps: is 1 here and 2 for other edits"):
        read_batch(path)


def test_clips_of_one_name_and_shots_of_one_clip_are_told_apart(tiny_model):
    shots = [{"data_path": "d1/a"}, {"data_path": "d2/a"}, {"data_path": "d1/a", "frame_start": 9}]
    shots.append({"data_path": "d1/a", "preprocess": {"frame_stride": 2}})
    found = read_batch(write_list(tiny_model, clips=shots))
    assert found.clips == ["a", "a (2)", "a (3)", "a (4)"]
    assert len({job.log_name for job in found.jobs}) == 4
    inversions, edits = found.jobs[::2], found.jobs[1::2]
    keys = ("data_path", "frame_start", "frame_stride")
    asked = [tuple(job.work.get(key) for key in keys) for job in inversions]
    assert asked == [
        ("d1/a", None, None), ("d2/a", None, None), ("d1/a", 9, None), ("d1/a", None, 2),
    ]  # fmt: skip
    # The edits name the cache of their own inversion; {clip} is the clip's name.
    places = [tuple(job.work[key] for key in keys) for job in edits]
    assert places == [("d1/a", 0, 1), ("d2/a", 0, 1), ("d1/a", 9, 1), ("d1/a", 0, 2)]
    assert {job.work["n_inversion_steps"] for job in edits} == {2}
    assert {job.work["prompt"] for job in edits} == {"a a of marble"}


# ------------------------------------------------------------------------------------------ DAVIS


def make_davis():
    """A tree of sequences bear and car-turn, and a folder without images."""
    for name in ("car-turn", "bear"):
        make_image_folder(Path("DAVIS/JPEGImages/480p") / name, 1)
    Path("DAVIS/JPEGImages/480p/notes").mkdir()
    Path("DAVIS/ImageSets").mkdir()
    return Path("DAVIS")


def test_a_tree_has_a_clip_in_each_folder_of_images(tiny_model):
    root = make_davis()
    assert [folder.name for folder in sequences(root, "480p", None, "x")] == ["bear", "car-turn"]
    own = [{"data_path": "./DAVIS/JPEGImages/480p/../480p/bear/", "prompts": ["a polar bear"]}]
    settings = {"model_key": str(tiny_model)}
    path = write_list(tiny_model, clips=own, davis={"root": "DAVIS"}, settings=settings)
    prompts = {clip: config["prompt"] for (clip, _), config in configs(read_batch(path)).items()}
    assert prompts == {"bear": "a polar bear", "car-turn": "a car turn of marble"}
    shutil.rmtree(root / "JPEGImages/480p/bear")
    shutil.rmtree(root / "JPEGImages/480p/car-turn")
    with pytest.raises(UserError, match="holds no folders of images"):
        sequences(root, "480p", None, "x")


@pytest.mark.parametrize(
    "text",
    [
        "bear\n\ngone\nbear\n",
        "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png\n"
        "JPEGImages/480p/bear/00001.jpg x\r\n/JPEGImages/480p/gone/00000.jpg x\n",
    ],
)
def test_an_image_set_names_sequences(text):
    root = make_davis()
    (root / "ImageSets/val.txt").write_text(text)
    assert read_image_set(root / "ImageSets/val.txt") == ["bear", "gone"]
    for place in ("ImageSets/val.txt", "DAVIS/ImageSets/val.txt"):  # from the root, or from here
        found = sequences(root, "480p", place, "x")
        assert found == [root / "JPEGImages/480p" / name for name in ("bear", "gone")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bear\n../../secret\n", "line 2: '../../secret' is not the name of a sequence"),
        ("..\n", "line 1: '..' is not"),
        ("/etc\n", "'/etc' is not"),
        ("/JPEGImages/480p/../00000.jpg x\n", "is not the name"),
        ("a\\b\n", "is not the name"),
        ("a\0b\n", "is not the name"),
        ("\n \n", "names no sequences"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (None, "no such file"),
    ],
)
def test_an_image_set_that_names_something_else_is_refused(text, message):
    if text is not None:
        Path("set.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=message):
        read_image_set(Path("set.txt"))


def test_the_davis_list_is_right(monkeypatch):
    root = make_davis()
    (root / "ImageSets/val.txt").write_text("car-turn\n")
    monkeypatch.setattr(clip_list, "_check_models", lambda edits: None)
    told = {"davis": {"root": str(root), "image_set": "ImageSets/val.txt"}}
    found = read_batch(ROOT / "configs/davis.yaml", told)
    assert found.clips == ["breakdance-flare", "blackswan", "car-turn"]
    assert configs(found)["car-turn", "pnp"]["prompt"] == "a car turn, watercolor painting"
