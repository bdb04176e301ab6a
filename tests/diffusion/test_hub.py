"""Which revision and which files of a hub's repository are read, by a stand-in of its cache."""

import shutil
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.original_layout import save_single_file
from tokenflow.diffusion import checkpoints
from tokenflow.diffusion.checkpoints import (
    checkpoint_folder,
    checkpoint_revision,
    single_model_folder,
)
from tokenflow.diffusion.model_names import CONTROLNETS, MODELS, REVISIONS
from tokenflow.diffusion.models import load_stable_diffusion
from util import MissingFileError

KEY, COMMIT = MODELS["2.1"], REVISIONS[MODELS["2.1"]]
UNET = "unet/diffusion_pytorch_model"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """The cache, as huggingface_hub lays it out; nothing is fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(hub, key, commit, revision=None):
    """The folder of a commit, to which a branch or a pull request may lead."""
    repository = hub / f"models--{key.replace('/', '--')}"
    if revision is not None:
        ref = repository / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return repository / "snapshots" / commit


def test_the_pinned_revision_is_read_unless_another_is_named(hub, tiny_model):
    folders = {}
    for commit, revision in ((COMMIT, None), ("a" * 40, "main"), ("b" * 40, "refs/pr/7")):
        folders[revision] = shutil.copytree(tiny_model, snapshot(hub, KEY, commit, revision))
    assert checkpoint_folder(KEY) == folders[None]
    assert checkpoint_folder(f"{KEY}@main") == folders["main"]
    assert checkpoint_folder(f"{KEY}@{'b' * 40}") == folders["refs/pr/7"]
    assert checkpoint_folder(f"{KEY}@refs/pr/7") == folders["refs/pr/7"]
    for part in ("controlnet", "controlnet@main"):
        found = single_model_folder(f"{KEY}/{part}", "controlnet_key")
        assert found == folders["main" if "@" in part else None] / "controlnet"
    with pytest.raises(MissingFileError, match=rf"{KEY}@v2: no such folder, and the .* hub"):
        checkpoint_folder(f"{KEY}@v2")


@pytest.mark.parametrize("kind", ["canny", "depth"])
def test_the_controlnets_of_sd_2_have_safetensors_in_their_revision(hub, tiny_model, kind):
    key = CONTROLNETS["2.1", kind]
    pickled = snapshot(hub, key, "c" * 40, "main")
    pickled.mkdir(parents=True)
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"")
    revision = REVISIONS[key]
    commit, revision = ("d" * 40, revision) if "/" in revision else (revision, None)
    folder = shutil.copytree(tiny_model / "controlnet", snapshot(hub, key, commit, revision))
    assert single_model_folder(key, "controlnet_key") == folder


@pytest.fixture
def remote(tiny_model, tmp_path, hub, monkeypatch):
    """A repository with float16 files for all but the text encoder; lists what is fetched."""
    folder = shutil.copytree(tiny_model, tmp_path / "remote")
    for part in ("unet", "vae"):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    fetched = []

    def download(key, revision, allow_patterns):
        target = snapshot(hub, key, revision)
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_file() and wanted and not (target / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
                fetched.extend([name.removesuffix(".safetensors")] * path.match("*.safetensors"))
        return str(target)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    return fetched


def test_a_float16_run_fetches_float16_files_where_there_are_any(remote, models):
    vae, text = UNET.replace("unet", "vae"), "text_encoder/model"
    folder = checkpoint_folder(KEY, half=True)
    assert sorted(remote) == [text, f"{UNET}.fp16", f"{vae}.fp16"]
    revision = checkpoint_revision(folder, half=True)
    found = load_stable_diffusion(folder, CPU, torch.float16)
    for one, other in zip(found.unet.parameters(), models.unet.parameters(), strict=True):
        assert torch.equal(one, other.half())
    remote.clear()
    assert checkpoint_folder(KEY, half=True) == folder
    assert not remote

    assert checkpoint_folder(KEY) == folder  # in float32
    assert sorted(remote) == [UNET, vae]
    assert checkpoint_revision(folder) != revision
    assert checkpoint_revision(folder, half=True) == revision  # its caches are still found
    found = load_stable_diffusion(folder, CPU, torch.float32)
    for one, other in zip(found.unet.parameters(), models.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_single_file_takes_configurations_from_the_hub_and_no_weights(remote, models, tmp_path):
    path = save_single_file(tmp_path / "mine.safetensors", models, 2)
    folder = checkpoint_folder(str(path), architecture_key=KEY, half=True)
    assert (folder / "unet" / "config.json").is_file()
    assert not remote


def test_files_that_were_fetched_before_serve_a_float16_run(remote):
    folder = checkpoint_folder(KEY)
    revision = checkpoint_revision(folder)
    remote.clear()
    assert checkpoint_folder(KEY, half=True) == folder
    assert not remote
    assert checkpoint_revision(folder, half=True) == revision


def test_a_folder_with_both_is_read_as_before_and_one_with_float16_files_alone_too(
    remote, tmp_path, tiny_model
):
    folder = tmp_path / "remote"
    revision = checkpoint_revision(tiny_model)
    assert checkpoint_revision(folder, half=True) == checkpoint_revision(folder) == revision
    (folder / f"{UNET}.safetensors").unlink()
    assert checkpoint_folder(str(folder)) == folder
    found = load_stable_diffusion(folder, CPU, torch.float32).unet
    assert all(torch.equal(each, each.half().float()) for each in found.parameters())
