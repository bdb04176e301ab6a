"""Caches and results of one clip's name lie side by side, and an edit finds its own cache."""

import logging
import re
import shlex
import shutil

import pytest

import preprocess
from run_tokenflow_pnp import PnPConfig, edit
from tests.helpers import contents, invert, make_clip
from tokenflow.cache.options import parse_args
from tokenflow.editing.inputs import open_edit_inputs, remedy
from tokenflow.editing.results import result_folder
from util import MissingFileError, UserError

CLIP_FOLDER = "latents/sd_2.1/IMG"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("d1", 0), ("d2", 1)):
        (tmp_path / folder).mkdir()
        make_clip(tmp_path / folder / "IMG.mp4", n_frames=6, seed=seed)
    return tmp_path


def config(model, **keys):
    """Of a short edit that names no cache but by its clip and model."""
    keys = {"data_path": "d1/IMG.mp4", **keys}
    return PnPConfig(
        prompt="a star", model_key=str(model), n_timesteps=5, n_frames=3, device="cpu", **keys
    )


def cached(place, model, clip="d1/IMG.mp4", **options):
    return invert(place / clip, "latents", model, **{"n_frames": 3, **options})


def test_two_shots_and_two_clips_of_one_name_lie_side_by_side(place, tiny_model):
    """By the same two commands each, without --overwrite."""
    shots = (("d1/IMG.mp4", 0), ("d1/IMG.mp4", 3), ("d2/IMG.mp4", 0))
    folders = set()
    for clip, start in shots:
        cache = cached(place, tiny_model, clip, frame_start=start)
        keys = {"data_path": clip, "consistency": "none"}
        if clip == "d1/IMG.mp4":
            keys["frame_start"] = start
        result = edit(config(tiny_model, **keys))
        folders |= {cache.resolve(), result.resolve()}
    assert len(folders) == 6
    before = contents(place)
    for clip, start in shots:
        cached(place, tiny_model, clip, frame_start=start)
    edit(config(tiny_model, frame_start=3, consistency="none"))
    assert contents(place) == before


def test_two_models_of_one_version_lie_side_by_side(place, tiny_model, tiny_v_model):
    caches = [cached(place, model) for model in (tiny_model, tiny_v_model)]
    for model, cache in zip((tiny_model, tiny_v_model), caches, strict=True):
        assert open_edit_inputs(config(model)).cache.folder == cache


def test_results_of_one_cache_made_with_other_settings_lie_side_by_side(place, tiny_model):
    cached(place, tiny_model)
    first = result_folder(open_edit_inputs(config(tiny_model)), "pnp")
    named = config(tiny_model, n_inversion_steps=10, frame_start=0)
    assert result_folder(open_edit_inputs(named), "pnp") == first
    cached(place, tiny_model, inversion_prompt="a star", overwrite="")
    assert result_folder(open_edit_inputs(config(tiny_model)), "pnp") != first


def test_several_caches_that_fit_are_listed(place, tiny_model):
    caches = [
        cached(place, tiny_model),
        cached(place, tiny_model, frame_start=3),
        cached(place, tiny_model, frame_stride=2),
        cached(place, tiny_model, steps=5),
    ]
    with pytest.raises(UserError, match=rf"{CLIP_FOLDER}: several caches fit: ") as caught:
        open_edit_inputs(config(tiny_model))
    for cache in caches:
        assert cache.parent.name + "/" + cache.name in str(caught.value)
    for fact in ("n_frames 3", "frame_start 3", "frame_stride 2", "n_inversion_steps 5"):
        assert fact in str(caught.value)
    keys = {"n_inversion_steps": 10, "frame_start": 0, "frame_stride": 1}
    assert open_edit_inputs(config(tiny_model, **keys)).cache.folder == caches[0]
    keys |= {"frame_start": 3}
    assert open_edit_inputs(config(tiny_model, **keys)).cache.folder == caches[1]
    keys |= {"frame_start": 0, "frame_stride": 2}
    assert open_edit_inputs(config(tiny_model, **keys)).cache.folder == caches[2]
    assert open_edit_inputs(config(tiny_model, n_inversion_steps=5)).cache.folder == caches[3]


def test_without_the_clip_two_of_its_name_are_told_apart_by_nothing(place, tiny_model, caplog):
    cached(place, tiny_model)
    shutil.move("d1/IMG.mp4", "elsewhere.mp4")
    assert open_edit_inputs(config(tiny_model))
    assert "data_path: d1/IMG.mp4 is not there to compare" in caplog.text
    cached(place, tiny_model, "d2/IMG.mp4")
    with pytest.raises(UserError, match="several caches fit"):
        open_edit_inputs(config(tiny_model))


def test_a_cache_of_an_earlier_version_keeps_its_folder(place, tiny_model):
    new = cached(place, tiny_model)
    old = new.rename(new.with_name("nframes_3"))
    before = contents(old)
    assert cached(place, tiny_model) == old
    assert contents(old) == before
    with pytest.raises(UserError, match="made with other settings"):
        cached(place, tiny_model, inversion_prompt="a star")
    assert open_edit_inputs(config(tiny_model)).cache.folder == old
    assert cached(place, tiny_model, "d2/IMG.mp4") != old


def test_a_damaged_cache_beside_the_one_that_fits_is_told(place, tiny_model, caplog):
    (cached(place, tiny_model, "d2/IMG.mp4") / "manifest.yaml").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.yaml: not valid YAML"):
        open_edit_inputs(config(tiny_model))
    good = cached(place, tiny_model)
    caplog.set_level(logging.WARNING)
    assert open_edit_inputs(config(tiny_model)).cache.folder == good
    assert "manifest.yaml: not valid YAML" in caplog.text


def test_the_cache_of_another_clip_of_the_name_does_not_serve(place, tiny_model):
    other = cached(place, tiny_model, "d2/IMG.mp4")
    before = contents(other)
    with pytest.raises(MissingFileError, match="no cache for this clip") as caught:
        open_edit_inputs(config(tiny_model))
    assert f"{other.name} (" in str(caught.value)
    assert "another clip: IMG.mp4" in str(caught.value)
    assert "--overwrite" not in str(caught.value)
    command = shlex.split(re.search(r"run: (python preprocess\.py .*)$", str(caught.value))[1])
    preprocess.main([*command[2:], "--device", "cpu", "--H", "48", "--W", "80"])
    assert open_edit_inputs(config(tiny_model)).cache.folder != other
    assert contents(other) == before


@pytest.mark.parametrize("prompt", ["-dark", "", "it's"])
def test_the_advised_command_is_one_that_preprocess_takes(place, tiny_model, prompt):
    cached(place, tiny_model, inversion_prompt=prompt or None)
    edit_config = config(tiny_model)
    advice = remedy(edit_config, open_edit_inputs(edit_config).cache.manifest)
    args = parse_args(shlex.split(advice.removeprefix("run: "))[2:])
    assert (args.inversion_prompt, args.steps) == (prompt, 10)


@pytest.mark.parametrize("n_timesteps", [1, 7, 50, 400, 1000])
def test_steps_left_open_are_advised_as_a_multiple_of_the_timesteps(place, tiny_model, n_timesteps):
    edit_config = PnPConfig(data_path="d1/IMG.mp4", prompt="a star", n_timesteps=n_timesteps)
    args = parse_args(shlex.split(remedy(edit_config, None).removeprefix("run: "))[2:])
    assert args.steps % args.save_steps == 0
