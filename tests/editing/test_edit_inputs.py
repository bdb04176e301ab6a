"""What the run scripts refuse: bad configurations, caches and checkpoints, before a model loads."""

import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import preprocess
import run_tokenflow_pnp
import run_tokenflow_sdedit
from run_tokenflow_pnp import PnPConfig
from tests.helpers import (
    HEIGHT,
    WIDTH,
    contents,
    edit_keys,
    invert,
    make_clip,
    no_model_may_load,
)
from tokenflow.diffusion.checkpoints import checkpoint_revision
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.results import TECHNIQUES, result_folder
from tokenflow.editing.techniques import load_technique
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import MissingFileError, UserError

LATENTS = "latents/noisy_latents_401.safetensors"


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A folder with a clip and its cache, which tests copy."""
    folder = tmp_path_factory.mktemp("made")
    invert(make_clip(folder / "clip.mp4"), folder / "latents", tiny_model)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of `made` as the working folder, in which no model can be loaded for an edit."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenflow.editing.loop.load_stable_diffusion", no_model_may_load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def keys(tiny_model):
    """A configuration that fits `place`."""
    return edit_keys(Path(), tiny_model, H=HEIGHT, W=WIDTH)


@pytest.fixture
def cache(place):
    return next((place / "latents" / "sd_2.1" / "clip" / "steps_10").iterdir())


def refused(place, message, keys, *argv, technique="pnp", error=UserError):
    """Run a script and check its error; returns the error's text."""
    config = place.parent / f"{place.name}.yaml"
    config.write_text(keys if isinstance(keys, str) else yaml.safe_dump(keys), encoding="utf-8")
    before = contents(place)
    with pytest.raises(error, match=message) as caught:
        load_technique(technique).main(["--config", str(config), *argv])
    assert "\n" not in str(caught.value)
    assert contents(place) == before
    return str(caught.value)


def run_the_command_in(message):
    """Run the preprocess command that an error names, as a user would."""
    command = shlex.split(re.search(r"run: (python preprocess\.py .*)$", message)[1])
    preprocess.main([*command[2:], "--device", "cpu"])


def test_what_is_right_is_accepted(place, keys):
    """So that the refusals below are for the reason that they test."""
    inputs = open_edit_inputs(PnPConfig(**keys))
    assert (inputs.n_frames, inputs.timesteps) == (5, [801, 601, 401, 201, 1])
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        run_tokenflow_pnp.main(
            ["--config", str(write_config(place, keys)), "--set", "consistency=none"]
        )


def write_config(folder, keys):
    path = folder / "config.yaml"
    save_yaml(path, keys)
    return path


# ---------------------------------------------------------------- the command line and the file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pnp_attn": 0.5}, r"\.yaml: pnp_attn: unknown key; did you mean pnp_attn_t\?"),
        ({"start": 0.9}, r"\.yaml: start: unknown key"),  # SDEdit's
        ({"prompt": 7}, "prompt: expected text, got 7; quote it"),
        ({"sd_version": 2.1}, r"sd_version: expected text, got 2\.1; quote it: .*'2\.1'"),
        ({"n_frames": 0}, "n_frames: expected at least 1 and at most .*, got 0"),
        ({"pnp_f_t": 1.5}, "pnp_f_t: expected at least 0 and at most 1, got 1.5"),
        ({"consistency": "all"}, "consistency: expected one of tokenflow, extended_attention"),
        ({"blend": "linear", "propagation": "released"}, "blend: linear goes with .*paper"),
        ({"decoder_key": "some/decoder"}, "decoder_key: some/decoder goes with decoder: temporal"),
        ({"sampler": "dpmpp_2m", "propagation": "released"}, "sampler: dpmpp_2m goes with .*"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused(place, keys, change, message):
    refused(place, message, {**keys, **change})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("nowhere", "mask: nowhere: expected a folder of PNG files, one a frame, or"),
        ("clip.mp4", "mask: clip.mp4: expected a folder of PNG files"),
        ("few", "mask: few: 4 masks, the edit needs 5; masks are numbered like"),
        ("few/0.png", "mask: few/0.png: is 0 in all of the 5 frames"),
        ("broken.png", "broken.png: a mask that cannot be read"),
    ],
)
def test_a_bad_mask_is_refused(place, keys, mask, message):
    (place / "few").mkdir()
    for i in range(4):
        Image.new("L", (10, 6)).save(place / "few" / f"{i}.png")
    (place / "broken.png").write_bytes(b"no picture")
    refused(place, message, {**keys, "mask": mask})


@pytest.mark.parametrize(
    ("technique", "change", "message"),
    [
        ("sdedit", {"start": 0}, "start: expected more than 0 and at most 1, got 0"),
        ("sdedit", {"pnp_f_t": 0.8}, "pnp_f_t: unknown key"),
        ("controlnet", {"canny_low": 256}, "canny_low: expected at least 0 and at most 255"),
        ("controlnet", {"canny_low": 201}, "canny_low: 201 is above canny_high: 200"),
        ("controlnet", {"sd_version": "depth"}, "sd_version: depth .*run_tokenflow_pnp"),
        ("controlnet", {"sd_version": "tiny", "control": "depth"}, "no depth .*controlnet_key"),
        ("controlnet", {"controlnet_key": "nowhere"}, "nowhere: no such folder"),
    ],
    ids=str,
)
def test_a_technique_s_bad_value_is_refused(place, keys, technique, change, message):
    refused(place, message, {**keys, **change}, technique=technique)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("key", ["data_path", "prompt"])
def test_a_missing_key_is_refused(place, keys, technique, key):
    del keys[key]
    refused(place, rf"\.yaml: {key}: is missing; expected text", keys, technique=technique)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\.yaml: expected a mapping \(key: value\), found nothing"),
        ("prompt: [a\n", r"\.yaml: not valid YAML in line 2"),
        ("prompt: a\nprompt: b\n", r"\.yaml: .*line 2: the key 'prompt' is given twice"),
        ("prompt: !!python/object:os.system {}\n", r"\.yaml: not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(place, text, message):
    refused(place, message, text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "guidance_scale=high"], "--set guidance_scale: expected a number, got 'high'"),
        (["--device", "toaster"], "device: toaster is unknown, expected auto, cpu, cuda"),
        (["--steps", "50"], "unrecognized arguments: --steps 50"),
        (["--over"], "unrecognized arguments: --over"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml: no such file"),
    ],
    ids=" ".join,
)
def test_a_bad_command_line_is_refused(place, keys, argv, message):
    refused(place, message, keys, *argv)


def test_cuda_is_refused_where_there_is_none(place, keys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(place, "device: cuda was asked for.* 0 CUDA.*--device cpu", keys, "--device", "cuda")


@pytest.mark.parametrize("backend", ["xformers", "flash", "_native_cudnn"])
def test_backends_that_need_cuda_are_refused_without(place, keys, backend):
    message = f"attention_backend: {backend} needs a CUDA device, not cpu; use native"
    refused(place, message, {**keys, "attention_backend": backend})


def test_output_that_cannot_be_written_is_refused(place, keys):
    refused(place, r"output_path: .*clip\.mp4", {**keys, "output_path": "clip.mp4"})


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_without_a_cache_the_command_that_makes_it_is_named(place, keys, technique, tiny_model):
    keys["latents_path"] = "some caches"  # in need of quotes
    if technique == "controlnet":
        keys["controlnet_key"] = str(tiny_model / "controlnet")
    message = refused(
        place, "no cache for this clip", keys, technique=technique, error=MissingFileError
    )
    assert "steps_10: no cache for this clip; run: python preprocess.py --data_path" in message
    run_the_command_in(message)
    keys.pop("controlnet_key", None)
    assert open_edit_inputs(PnPConfig(**keys))


def test_a_cache_without_its_manifest_is_none(place, keys, cache):
    (cache / "manifest.yaml").unlink()
    said = r"only a cache that lacks its manifest \(nframes_.*\) for this clip.*--overwrite"
    run_the_command_in(refused(place, said, keys, error=MissingFileError))
    open_edit_inputs(PnPConfig(**keys))


@pytest.mark.parametrize("name", ["steps_20/nframes_5", "steps_10/nframes_9"])
def test_a_cache_whose_folder_was_renamed_is_refused(place, keys, cache, name):
    """Its settings are those of its manifest, and another command would take it for its own."""
    renamed = place / "latents/sd_2.1/clip" / (name + cache.name.removeprefix("nframes_5"))
    renamed.parent.mkdir(exist_ok=True)
    cache.rename(renamed)
    keys["n_inversion_steps"] = None
    said = refused(place, f"{renamed.name}: was renamed: it holds 5 frames of 10 inv", keys)
    assert said.endswith(f"rename it to {cache.relative_to(place)}")


def test_where_the_clip_is_missing_the_advice_says_to_put_it_there(place, keys, cache):
    data = (place / "clip.mp4").read_bytes()
    (place / "clip.mp4").unlink()
    (cache / "latents/clean.safetensors").unlink()
    damaged = refused(place, r"clean\.safetensors: is missing; there is no clip at data_path", keys)
    (cache / "manifest.yaml").unlink()
    absent = refused(place, r"there is no clip at data_path, .*clip\.mp4: put it there", keys)
    (place / "clip.mp4").write_bytes(data)
    run_the_command_in(absent)
    run_the_command_in(damaged)


OTHER_STEPS = r"steps_20: no cache .*\(there is sd_2\.1/clip/steps_10/nframes_5-.*steps 10\)"
OTHER_TIMESTEPS = r"n_timesteps: 2 needs latents .* does not hold \(it was made with save_steps 5\)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_inversion_steps": 20}, OTHER_STEPS),
        ({"H": 64, "W": 64}, "H: 64, but .*nframes_5-.* holds frames of 48"),
        ({"W": 64}, "W: 64, but .*nframes_5-.* holds frames of 80"),
        ({"n_timesteps": 2}, OTHER_TIMESTEPS),  # 501 and 1
    ],
    ids=str,
)
def test_a_cache_that_does_not_fit_is_refused_with_the_command_that_mends(
    place, keys, changes, said
):
    run_the_command_in(refused(place, said, keys | changes))
    open_edit_inputs(PnPConfig(**keys | changes))


def test_a_cache_of_another_model_is_refused(place, keys, tiny_model, tiny_v_model):
    keys["model_key"] = str(tiny_v_model)
    expected = rf"no cache for this clip .*another model: {re.escape(str(tiny_model))}\)"
    run_the_command_in(refused(place, expected, keys))
    open_edit_inputs(PnPConfig(**keys))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("scheduler/scheduler_config.json", "prediction_type"),
        ("unet/config.json", "norm_eps"),
    ],
)
def test_a_model_that_differs_in_its_settings_alone_is_another(place, keys, tiny_model, part, name):
    copy = shutil.copytree(tiny_model, place / "copy")
    open_edit_inputs(PnPConfig(**{**keys, "model_key": str(copy)}))  # a mere copy is no other model
    settings = json.loads((copy / part).read_text())
    settings[name] = {"prediction_type": "v_prediction", "norm_eps": 1e-4}[name]
    (copy / part).write_text(json.dumps(settings))
    refused(place, "another model", {**keys, "model_key": str(copy)})


def test_steps_for_which_no_cache_can_be_made_are_refused(place, keys):
    """Where preprocess.py would refuse the command too, it must not be named."""
    keys["n_timesteps"] = 3
    message = refused(place, "n_timesteps: 3 does not divide n_inversion_steps: 10", keys)
    assert "preprocess.py" not in message


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [LATENTS, "latents/clean.safetensors", "frames/00004.png"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b"cut"), r"\d+ bytes, the manifest says \d+"),
        (flip, "checksum"),
    ],
)
def test_a_damaged_cache_is_refused(place, keys, cache, name, damage, said):
    damage(cache / name)
    refused(place, rf"{re.escape(name)}: .*{said}.*preprocess\.py .*--overwrite", keys)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 4], ""),
        (lambda text: "", ""),
        (lambda text: "- a list\n", ""),
        (lambda text: "{", ""),
        (lambda text: text.replace("save_steps: 5\n", ""), "save_steps: is missing"),
        (lambda text: text.replace("format: 3", "format: 2"), "not a manifest of format 3"),
        (lambda text: text + "more: 1\n", "more: unknown key"),
        (lambda text: text.replace("steps: 10\n", "steps: '10'\n", 1), "steps: expected a whole"),
        (lambda text: text.replace("control: null", "control: {kind: canny}"), "control: key: is"),
        (lambda text: text.replace("files:\n", "files:\n  a: 3\n"), "files: a: "),
    ],
)
def test_a_damaged_manifest_is_refused(place, keys, cache, damage, said):
    path = cache / "manifest.yaml"
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    refused(place, rf"manifest\.yaml: {said}.*; .*preprocess\.py .*--overwrite", keys)


def test_other_folders_beside_the_caches_are_no_matter(place, keys, cache):
    shutil.copytree(cache, cache.with_name(f"{cache.name} (copy)"))
    assert open_edit_inputs(PnPConfig(**keys)).cache.folder.name == cache.name


@pytest.mark.parametrize(
    ("n_frames", "used", "said"),
    [
        (3, 3, ""),
        (40, 5, r"40 asked for, the cache holds 5 \(for more, run: python preprocess.py"),
    ],
)
def test_a_cache_of_another_number_of_frames_serves(place, keys, caplog, n_frames, used, said):
    inputs = open_edit_inputs(PnPConfig(**{**keys, "n_frames": n_frames}))
    assert inputs.n_frames == used
    assert re.search(said, caplog.text) if said else not caplog.text


def test_the_longest_cache_serves_where_none_has_the_number_asked_for(place, keys, tiny_model):
    invert(place / "clip.mp4", place / "latents", tiny_model, n_frames=2)
    for n_frames, served in ((2, "nframes_2-"), (3, "nframes_5-"), (9, "nframes_5-")):
        config = PnPConfig(**{**keys, "n_frames": n_frames})
        assert open_edit_inputs(config).cache.folder.name.startswith(served)


def test_a_short_clip_is_said_to_have_no_more(place, keys, tiny_model, caplog):
    invert(place / "clip.mp4", place / "latents", tiny_model, n_frames=40, overwrite="")
    caplog.clear()
    open_edit_inputs(PnPConfig(**{**keys, "n_frames": 40}))
    assert "40 asked for, the cache holds 5 (the clip has no more)" in caplog.text


def test_the_clip_itself_need_not_be_there(place, keys, caplog):
    caplog.set_level(logging.WARNING)
    (place / "clip.mp4").unlink()
    open_edit_inputs(PnPConfig(**keys))
    assert "data_path: clip.mp4 is not there to compare" in caplog.text


# ---------------------------------------------------------------- the checkpoint


def test_a_checkpoint_that_cannot_be_found_is_refused(place, keys):
    for key in ("nowhere", "no-such-owner/no-such-model"):
        expected = rf"{key}: no such folder, and the Hugging Face hub .*model_key in a config"
        refused(place, expected, {**keys, "model_key": key}, error=MissingFileError)
    keys["model_key"] = "no/such/one"
    refused(place, "no/such/one: no such folder, and not a hub id", keys)


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_checkpoint_that_lacks_a_file_is_refused(place, keys, tiny_model, name):
    copy = shutil.copytree(tiny_model, place / "half")
    (copy / name).unlink()
    expected = f"half: not a whole .* checkpoint in diffusers' format: {name} is missing"
    refused(place, expected, {**keys, "model_key": "half"}, error=MissingFileError)


def test_pnp_alone_refuses_a_unet_without_its_layers(place, keys, cache, tiny_model):
    """Three decoder blocks, as an SDXL-like UNet has."""
    copy = shutil.copytree(tiny_model, place / "short")
    settings = json.loads((copy / "unet" / "config.json").read_text())
    for name in ("down_block_types", "up_block_types", "block_out_channels", "attention_head_dim"):
        settings[name] = settings[name][:3]
    (copy / "unet" / "config.json").write_text(json.dumps(settings))
    manifest = load_yaml(cache / "manifest.yaml")
    manifest["model_revision"] = checkpoint_revision(copy)
    save_yaml(cache / "manifest.yaml", manifest)
    keys["model_key"] = "short"
    expected = r"short: its UNet has no up_blocks\.3\..*\(\d of the layers that PnP injects into"
    refused(place, expected, keys)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        run_tokenflow_sdedit.main(["--config", str(write_config(place, keys))])


# ---------------------------------------------------------------- what the cache says


def test_a_clip_and_a_prompt_are_enough(place, tiny_model):
    """The rest is the cache's, as if it were said: results are the same."""
    said = {"model_key": str(tiny_model), "n_timesteps": 5, "n_frames": 5, "sd_version": "2.1"}
    keys = {"data_path": str(place / "clip.mp4"), "latents_path": str(place / "latents")}
    keys |= {"prompt": "a green star", "device": "cpu"}
    found, named = (open_edit_inputs(PnPConfig(**keys, **more)) for more in ({}, said))
    assert found.config == named.config
    assert (found.checkpoint, found.timesteps) == (named.checkpoint, named.timesteps)
    assert result_folder(found, "pnp") == result_folder(named, "pnp")


def test_caches_of_several_versions_are_a_choice(place, tiny_model):
    keys = {"data_path": "clip.mp4", "prompt": "a", "device": "cpu"}
    invert(place / "clip.mp4", place / "latents", tiny_model, sd_version="1.5")
    with pytest.raises(UserError, match=r"sd_version: clip has caches of .* \(1.5, 2.1\); choose"):
        open_edit_inputs(PnPConfig(**keys))
    keys |= {"sd_version": "1.5", "model_key": str(tiny_model)}
    assert open_edit_inputs(PnPConfig(**keys)).cache.manifest.sd_version == "1.5"


def test_a_model_that_changed_since_is_not_taken(place, tiny_model):
    model = shutil.copytree(tiny_model, place / "model")
    invert(place / "clip.mp4", place / "other", model)
    with (model / "unet" / "config.json").open("a") as file:
        file.write(" ")
    keys = {"data_path": "clip.mp4", "latents_path": "other", "prompt": "a", "device": "cpu"}
    with pytest.raises(UserError, match=r"made with another version of .*model than is there now"):
        open_edit_inputs(PnPConfig(**keys))
