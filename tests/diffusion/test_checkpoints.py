"""What checkpoint folders may do: be read as weights, and nothing else."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import run_tokenflow_sdedit
from tests.helpers import edit_keys, invert, make_clip, no_model_may_load
from tokenflow.cache import build
from tokenflow.diffusion import checkpoints
from tokenflow.diffusion.checkpoints import (
    checkpoint_folder,
    checkpoint_revision,
    load_model,
    single_model_folder,
    uses_safetensors,
)
from tokenflow.diffusion.conditions import estimate_depth
from tokenflow.diffusion.model_names import CONTROLNETS
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.evaluation.metrics import ClipEmbedder, model_folder
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import MissingFileError, UserError

CPU = torch.device("cpu")
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "controlnet": "diffusion_pytorch_model",
    "depth_estimator": "model",
}


def pickled_name(part):
    return checkpoints.WEIGHTS[f"{WEIGHTS[part]}.safetensors"]


def pickle_weights(folder, part):
    """Replace a part's safetensors by the same tensors, pickled; returns the file."""
    source = folder / part / f"{WEIGHTS[part]}.safetensors"
    target = folder / part / pickled_name(part)
    torch.save(load_file(source), target)
    source.unlink()
    return target


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model, with nothing on the hub."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def load(model, allow_pickle=False):
    folder = checkpoint_folder(str(model), allow_pickle)
    return load_stable_diffusion(folder, CPU, torch.float32, allow_pickle)


def load_part(model, part, allow_pickle=False):
    """Load one model as the scripts do."""
    if part == "controlnet":
        return replace(load(model), allow_pickle=allow_pickle).controlnet(str(model / part))
    if part == "depth_estimator":
        frames = np.zeros((1, 32, 32, 3), np.uint8)
        return estimate_depth(frames, str(model / part), model, CPU, allow_pickle=allow_pickle)
    return getattr(load(model, allow_pickle), part)


def assert_same_weights(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- pickled weights


@pytest.mark.parametrize("part", WEIGHTS)
def test_pickled_weights_are_refused_unless_allowed(model, part):
    expected = load_part(model, part)
    path = pickle_weights(model, part)
    message = rf"{path}: pickled weights can run code .*convert it .*--allow_pickle"
    with pytest.raises(UserError, match=message):
        load_part(model, part)
    found = load_part(model, part, allow_pickle=True)
    if part == "depth_estimator":
        assert torch.equal(found, expected)
    else:
        assert_same_weights(found, expected)


def test_safetensors_win_over_pickles_beside_them(model):
    """The pickle is not read at all: it is no pickle."""
    before = checkpoint_revision(model)
    for part in WEIGHTS:
        (model / part / pickled_name(part)).write_bytes(b"not read")
    (model / "v1-5-pruned.ckpt").write_bytes(b"not read")
    for allow_pickle in (False, True):
        assert uses_safetensors(model / "unet", allow_pickle)
        load(model, allow_pickle)
    assert checkpoint_revision(model) == before


@pytest.mark.parametrize(
    ("part", "form"), [*((part, "zip") for part in WEIGHTS), ("unet", "legacy"), ("vae", "plain")]
)
def test_a_pickle_that_runs_code_is_refused_even_where_pickles_are_allowed(
    model, tmp_path, part, form
):
    marker = tmp_path / "was-run"
    path = pickle_weights(model, part)
    tensors = {**torch.load(path, weights_only=True), "evil": Evil(marker)}
    if form == "plain":
        path.write_bytes(pickle.dumps(tensors, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    assert marker.exists()  # so it would run, were it not refused
    marker.unlink()
    with pytest.raises(UserError, match=f"{part}: its pickled weights are damaged or hold more"):
        load_part(model, part, allow_pickle=True)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.ckpt", "weights.pt", "weights.pth", "unet.pkl"])
def test_pickles_of_other_formats_are_refused_in_any_case(model, name):
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / name)
    for allow_pickle in (False, True):
        with pytest.raises(UserError, match=rf"unet/{name}: no weights in diffusers' .*convert it"):
            checkpoint_folder(str(model), allow_pickle)


@pytest.mark.parametrize("name", ["v1-5.ckpt", "v1-5.safetensors"])
def test_a_single_file_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingFileError, match=rf"{name}: a file, .*convert it"):
        checkpoint_folder(str(tmp_path / name), allow_pickle=True)


def test_the_revision_covers_pickled_weights(model):
    path = pickle_weights(model, "unet")
    before = checkpoint_revision(model)
    tensors = torch.load(path, weights_only=True)
    next(iter(tensors.values())).view(-1)[0] += 1
    torch.save(tensors, path)
    assert checkpoint_revision(model) != before
    path.unlink()
    assert checkpoint_revision(model) != before


def test_a_hub_checkpoint_s_pickles_are_fetched_only_if_allowed_and_needed(
    tiny_model, tmp_path, monkeypatch
):
    folder = shutil.copytree(tiny_model, tmp_path / "hub")
    asked = []

    def download(key, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)

    def pickles():
        return {p for patterns in asked for p in patterns if p.endswith(".bin")}

    checkpoint_folder("owner/name", allow_pickle=True)
    assert not pickles()  # safetensors are there
    path = pickle_weights(folder, "vae")
    hidden = path.rename(folder / "elsewhere")
    with pytest.raises(MissingFileError, match=r"safetensors is missing; .* with --allow_pickle"):
        checkpoint_folder("owner/name")
    assert not pickles()
    hidden.rename(path)
    checkpoint_folder("owner/name", allow_pickle=True)
    assert pickles() == {"vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model-*.bin"}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A folder with a clip and its cache."""
    folder = tmp_path_factory.mktemp("made")
    invert(make_clip(folder / "clip.mp4"), folder / "latents", tiny_model)
    return folder


def test_the_scripts_take_pickles_with_a_flag(made, model, monkeypatch):
    """One cache and one result: made from safetensors, found with pickles, but not without."""
    keys = edit_keys(made, model, output_path=str(model.parent / "out"), start=0.2)
    save_yaml(model.parent / "config.yaml", keys)
    argv = ["--config", str(model.parent / "config.yaml")]
    result = run_tokenflow_sdedit.main(argv)
    words = ["--allow_pickle", "--set=allow_pickle=true"]
    assert load_yaml(result / "config.yaml")["allow_pickle"] is False
    for word in words:
        assert run_tokenflow_sdedit.main([*argv, word]) == result
    pickle_weights(model, "unet")
    with pytest.raises(UserError, match="pickled weights"):
        run_tokenflow_sdedit.main(argv)
    with pytest.raises(UserError, match="another model"):  # other files, to be sure
        run_tokenflow_sdedit.main([*argv, "--allow_pickle"])
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    with pytest.raises(UserError, match="pickled weights"):
        invert(made / "clip.mp4", model.parent / "new", model)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        invert(made / "clip.mp4", model.parent / "new", model, allow_pickle="")
    monkeypatch.undo()
    cache = invert(made / "clip.mp4", model.parent / "new", model, allow_pickle="")
    assert (cache / "manifest.yaml").is_file()
    keys["latents_path"] = str(model.parent / "new")
    save_yaml(model.parent / "config.yaml", {**keys, "allow_pickle": True})
    assert (run_tokenflow_sdedit.main(argv) / "edited.mp4").is_file()


# ---------------------------------------------------------------- files that lead elsewhere


def shard(folder, part):
    """Split a part's weights into two files and an index."""
    name = WEIGHTS[part]
    path = folder / part / f"{name}.safetensors"
    tensors = sorted(load_file(path).items())
    half = len(tensors) // 2
    weight_map = {}
    for number, some in ((1, tensors[:half]), (2, tensors[half:])):
        file = f"{name}-0000{number}-of-00002.safetensors"
        save_file(dict(some), folder / part / file, metadata={"format": "pt"})
        weight_map |= {key: file for key, _ in some}
    path.unlink()
    index = folder / part / f"{name}.safetensors.index.json"
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_in_several_files_are_read_and_covered(model, part):
    whole = load_part(model, part)
    index = shard(model, part)
    assert_same_weights(load_part(model, part), whole)
    before = checkpoint_revision(model)
    last = index.parent / sorted(set(json.loads(index.read_text())["weight_map"].values()))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    assert checkpoint_revision(model) != before


@pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "/tmp/evil.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(model, name):
    """A pickled file in an index of safetensors would be unpickled."""
    (model / "evil.safetensors").write_bytes(b"")
    (model / "unet" / "evil.bin").write_bytes(b"")
    index = shard(model, "unet")
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    message = r"index\.json: lists .*expected \.safetensors files in the same folder"
    with pytest.raises(UserError, match=message):
        checkpoint_folder(str(model))


def test_a_damaged_index_is_refused(model):
    index = shard(model, "unet")
    for content in ("[]", '{"weight_map": 5}', "{}", '{"weight_map": {"a": []}}'):
        index.write_text(content)
        with pytest.raises(UserError, match="damaged, not an index"):
            checkpoint_folder(str(model))
    index.write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(MissingFileError, match=r"lists 'b\.safetensors', which is missing"):
        checkpoint_folder(str(model))


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "owner/kernel"},
        {"vision_config": {"_attn_implementation": "owner/kernel"}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"transformers_weights": "adapter_model.bin"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("part", ["unet", "text_encoder", "controlnet"])
def test_a_configuration_that_loads_from_elsewhere_is_refused(model, part, change):
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"config\.json: \w+ may load code or files from elsewhere"):
        if part == "controlnet":
            single_model_folder(str(model / part), "controlnet_key")
        else:
            checkpoint_folder(str(model))


def test_an_adapter_is_refused(model):
    (model / "text_encoder" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}'
    )
    with pytest.raises(UserError, match=r"adapter_config\.json: an adapter"):
        checkpoint_folder(str(model))


# ---------------------------------------------------------------- code in a folder


def plant_code(folder, marker):
    """Fill a checkpoint with everything by which folders bring code along."""
    code = f"open({str(marker)!r}, 'a').write(__name__)\nclass Evil: pass\n"
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    for place in places:
        for name in ("modeling_evil.py", "__init__.py", "setup.py", "pipeline.py", "conftest.py"):
            (place / name).write_text(code)
        for path in [*place.glob("*config.json"), place / "model_index.json"]:
            if path.is_file():
                content = json.loads(path.read_text())
                names = ("AutoModel", "AutoConfig", "AutoTokenizer", "AutoImageProcessor")
                names += ("CLIPTextModel", "UNet2DConditionModel", "DDIMScheduler")
                content["auto_map"] = {name: "modeling_evil.Evil" for name in names}
                content["auto_map"]["AutoTokenizer"] = ["modeling_evil.Evil", None]
                content |= {
                    "custom_pipeline": "pipeline",
                    "trust_remote_code": True,
                    "custom_pipelines": {"evil": {"impl": "pipeline.py"}},
                    "_class_name": ["pipeline", "Evil"],
                    "_name_or_path": "owner/evil",
                }
                if path.name == "config.json":
                    content["architectures"] = ["Evil"]
                path.write_text(json.dumps(content))


def test_no_code_of_a_checkpoint_is_run(model, tmp_path, monkeypatch):
    marker = tmp_path / "was-run"
    plant_code(model, marker)
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    for part in WEIGHTS:
        load_part(model, part)
    load_model(UNet2DConditionModel, single_model_folder(str(model / "unet"), "controlnet_key"))
    assert not marker.exists()


def test_no_code_of_a_clip_model_is_run_and_nobody_is_asked(model, tmp_path, monkeypatch):
    """AutoTokenizer asks at the terminal whether to run a folder's code, unless it is told."""
    folder, marker = tmp_path / "clip", tmp_path / "was-run"
    CLIPModel(
        CLIPConfig(
            text_config={"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
                         "num_attention_heads": 1, "vocab_size": 600},
            vision_config={"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
                           "num_attention_heads": 1, "image_size": 32, "patch_size": 16},
            projection_dim=8,
        )
    ).save_pretrained(folder)  # fmt: skip
    shutil.copytree(model / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32}'
    )
    plant_code(folder, marker)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked the user"))
    ClipEmbedder(model_folder(str(folder), "clip"), CPU)
    assert not marker.exists()
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickled weights .*--clip"):
        model_folder(str(folder), "clip")


def test_the_table_s_local_models_pass():
    root = Path(checkpoints.__file__).parents[2] / "models"
    if (root / "tiny").is_dir():
        checkpoint_folder(str(root / "tiny"))
        single_model_folder(CONTROLNETS["tiny", "canny"], "controlnet_key")


# ---------------------------------------------------------------- lookup and fingerprint


def test_revision_is_of_the_content_not_of_the_path(tiny_model, tiny_v_model, tmp_path):
    link = tmp_path / "elsewhere"
    link.symlink_to(tiny_model)
    assert checkpoint_revision(link) == checkpoint_revision(checkpoint_folder(str(tiny_model)))
    assert checkpoint_revision(tiny_v_model) != checkpoint_revision(link)
