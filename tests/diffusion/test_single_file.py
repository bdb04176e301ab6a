"""Checkpoints in one file, as Stable Diffusion 1 and 2 were published."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import run_tokenflow_pnp
from tests.helpers import edit, invert, make_clip, no_model_may_load
from tests.original_layout import save_single_file
from tokenflow.diffusion import single_file
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision
from tokenflow.diffusion.models import load_stable_diffusion
from util import MissingFileError, UserError, load_tensors


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def configs(tiny_model, tmp_path_factory):
    """The tiny model without weights."""
    weights = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(tiny_model, tmp_path_factory.mktemp("configs") / "tiny", ignore=weights)


@pytest.mark.parametrize("version", [1, 2])
def test_the_weights_are_those_of_the_folder(models, configs, tmp_path, version):
    path = save_single_file(tmp_path / "mine.safetensors", models, version)
    folder = checkpoint_folder(str(path), architecture_key=str(configs))
    found = load_stable_diffusion(folder, torch.device("cpu"), torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        one, other = getattr(found, part).state_dict(), getattr(models, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert found.schedule.config == models.schedule.config


def test_it_is_converted_once_and_its_revision_is_that_of_its_bytes(
    models, configs, tmp_path, monkeypatch
):
    path = save_single_file(tmp_path / "mine.safetensors", models, 2)
    folder = checkpoint_folder(str(path), architecture_key=str(configs))
    revision = checkpoint_revision(folder)
    copy = tmp_path / "other" / "name.safetensors"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    other = checkpoint_folder(str(copy), architecture_key=str(configs))
    assert checkpoint_revision(other) == revision
    monkeypatch.setattr(single_file, "_convert", no_model_may_load)
    path.touch()
    assert checkpoint_folder(str(path), architecture_key=str(configs)) == folder
    with monkeypatch.context() as context:  # its contents were compared, once
        context.setattr(single_file, "sha256_file", no_model_may_load)
        assert checkpoint_folder(str(path), architecture_key=str(configs)) == folder
    monkeypatch.undo()
    tensors = load_file(path)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, path)
    assert checkpoint_folder(str(path), architecture_key=str(configs)) == folder
    assert checkpoint_revision(folder) != revision
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        folder.name, "mine.safetensors", "other",
    ]  # fmt: skip


def test_an_edit_is_that_of_the_folder(models, tiny_model, tmp_path):
    path = save_single_file(tmp_path / "mine.safetensors", models, 2)
    found = []
    for name, key in (("folder", tiny_model), ("file", path)):
        clip = make_clip(tmp_path / name / "clip.mp4")
        named = {} if key == tiny_model else {"architecture_key": str(tiny_model)}
        invert(clip, clip.parent / "latents", key, **named)
        result = edit(run_tokenflow_pnp, clip, key, **named)
        found.append(load_tensors(result / "edited_latents.safetensors")["latents"])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "first_stage" not in k}, "has no vae"),
        (lambda t: {"lora_unet_x.lora_up.weight": t[next(iter(t))]}, r"has no unet.*not SDXL"),
        (
            lambda t: {k: v[:, :16] if "attn2.to_k" in k else v for k, v in t.items()},
            r"cross_attention_dim is 16, that of .*tiny 32; give the sd_version .*architecture_key",
        ),
        (lambda t: {k: v for k, v in t.items() if ".mid.block_1" not in k}, "its vae does not fit"),
        (
            lambda t: {k: v[:1] if k.endswith(".out.2.bias") else v for k, v in t.items()},
            r"its unet does not fit the configuration of .*tiny",
        ),
        (
            lambda t: {k: v for k, v in t.items() if not k.endswith("ln_final.bias")},
            r"its text_encoder lacks .*final_layer_norm\.bias",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(models, configs, tmp_path, change, message):
    path = save_single_file(tmp_path / "mine.safetensors", models, 2)
    tensors = {name: value.contiguous() for name, value in change(load_file(path)).items()}
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"model_key: {path}: .*{message}"):
        checkpoint_folder(str(path), architecture_key=str(configs))
    assert [each.name for each in tmp_path.iterdir()] == ["mine.safetensors"]


def test_what_a_file_says_of_its_prediction_counts(models, configs, tiny_v_model, tmp_path):
    path = save_single_file(tmp_path / "mine.safetensors", models, 2)
    save_file(load_file(path), path, {"modelspec.prediction_type": "v"})
    with pytest.raises(UserError, match=r"predicts v_prediction, but .*tiny epsilon; name a"):
        checkpoint_folder(str(path), architecture_key=str(configs))
    checkpoint_folder(str(path), architecture_key=str(tiny_v_model))


def test_pickles_and_damage_are_refused_and_no_configuration_is_one_line(tmp_path):
    path = tmp_path / "v1-5.ckpt"
    for name, message in (("v1-5.ckpt", "pickled"), ("x.safetensors", "damaged")):
        path = tmp_path / name
        path.write_bytes(b"not read")
        with pytest.raises((UserError, MissingFileError), match=f"{name}: .*{message}"):
            checkpoint_folder(str(path), architecture_key="models/tiny")
    with pytest.raises(MissingFileError, match=r"hub does not give it.*architecture_key"):
        checkpoint_folder(str(path), architecture_key="owner/name")
