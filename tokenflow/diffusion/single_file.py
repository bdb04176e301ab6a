"""Checkpoints in one file, as Stable Diffusion 1 and 2 were published (the "ldm" layout).

Such a file holds no configuration, no tokenizer and no schedule. They are taken from another
checkpoint of the same architecture, and the file is converted once to a folder in diffusers' format
next to it, <stem>-<8 hex of those configurations>, which all else reads.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from tokenflow.storage.schema import Model, parse
from tokenflow.storage.work_dir import locked, resumable_dir
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError, check_writable, save_tensors, sha256_file

log = logging.getLogger("tokenflow")

RECORD = "single_file.yaml"
UNET = "model.diffusion_model."
# What a whole checkpoint's tensors are called.
PREFIXES = {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
# Sizes by which the file's UNet must fit: the tensor, its dimension, and the key of config.json.
FIRST_LAYER, KEYS = f"{UNET}input_blocks.0.0.weight", "transformer_blocks.0.attn2.to_k.weight"
SIZES = {
    "in_channels": (FIRST_LAYER, 1),
    "cross_attention_dim": (f"{UNET}input_blocks.1.1.{KEYS}", 1),
}


class Source(Model):
    """The file that a folder was converted from."""

    name: str
    bytes: int
    mtime_ns: int
    sha256: str


def converted_folder(path: Path, configs: Path, config_key: str) -> Path:
    """The folder of a single-file checkpoint, converted if it was not yet, or has changed since.

    Args:
        path: safetensors.
        configs: a checkpoint's folder whose configurations, tokenizer and schedule it has.
        config_key: how the user named that one, for errors.

    Raises:
        UserError: the file is damaged, not a whole checkpoint in the ldm layout or of another
            architecture, or the folder cannot be written.
    """
    dtype = _check(path, configs, config_key)
    texts = config_texts(configs)
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()
    folder = path.with_name(f"{path.stem}-{digest[:8]}")
    if _is_current(folder, path):
        return folder
    check_writable(folder, "model_key")
    if shutil.disk_usage(path.parent).free < path.stat().st_size:
        raise UserError(
            f"model_key: {path}: is converted to diffusers' format in {folder}, for which its disk "
            "has no room; make room, or copy the file to another disk"
        )
    with locked(folder):
        if not _is_current(folder, path):  # another process may just have converted it
            log.info("%s: converting it to diffusers' format, once, in %s", path, folder)
            source = _source(path)
            with resumable_dir(folder, {}) as work:
                _convert(path, texts, work.folder, dtype, config_key)
                save_yaml(work.folder / RECORD, source.model_dump())
    return folder


def source_sha256(folder: Path) -> str | None:
    """The checksum of the file that a checkpoint's folder was converted from; None: of none."""
    record = folder / RECORD
    return parse(Source, load_yaml(record), str(record)).sha256 if record.is_file() else None


def config_texts(folder: Path) -> dict[str, bytes]:
    """A checkpoint's configurations, tokenizer and schedule, by the path within its folder."""
    parts = (*PREFIXES, "tokenizer", "scheduler")
    paths = [path for part in parts for path in (folder / part).glob("*.json")]
    paths += [folder / "tokenizer" / "merges.txt"]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.is_file() and not path.name.endswith(".index.json")
    }


def _is_current(folder: Path, path: Path) -> bool:
    if not (folder / RECORD).is_file():
        return False
    source, stat = parse(Source, load_yaml(folder / RECORD), str(folder / RECORD)), path.stat()
    if (source.bytes, source.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return True
    if source.bytes != stat.st_size or source.sha256 != (now := _source(path)).sha256:
        return False
    if os.access(folder, os.W_OK):  # touched or copied only: the next run need not read it whole
        save_yaml(folder / RECORD, now.model_dump())
    return True


def _source(path: Path) -> Source:
    stat = path.stat()
    return Source(
        name=path.name, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256_file(path)
    )


def _check(path: Path, configs: Path, config_key: str) -> torch.dtype:
    """Refuses a file that cannot be converted; returns its UNet's dtype."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            _check_whole(path, names)
            _check_prediction(path, file.metadata() or {}, configs, config_key)
            config = UNet2DConditionModel.load_config(configs, subfolder="unet")
            for key, (name, dimension) in SIZES.items():
                size = file.get_slice(name).get_shape()[dimension] if name in names else "missing"
                if size != config[key]:
                    raise UserError(
                        f"model_key: {path}: its UNet's {key} is {size}, that of {config_key} "
                        f"{config[key]}; give the sd_version that it was made from (1.5 for all of "
                        "SD 1), or name a checkpoint of its architecture with architecture_key"
                    )
            return file.get_tensor(FIRST_LAYER).dtype
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); download the model again") from error


def _check_prediction(
    path: Path, metadata: Mapping[str, str], configs: Path, config_key: str
) -> None:
    """Compares what the UNet predicts, where the file says it, with the schedule's."""
    said = metadata.get("modelspec.prediction_type")
    said = {"v": "v_prediction"}.get(said, said)
    config = DDIMScheduler.load_config(configs, subfolder="scheduler")
    known = config.get("prediction_type", "epsilon")
    if said is not None and said != known:
        raise UserError(
            f"model_key: {path}: predicts {said}, but {config_key} {known}; name a checkpoint that "
            "predicts the same with architecture_key"
        )


def _check_whole(path: Path, names: Sequence[str]) -> None:
    for part, prefix in PREFIXES.items():
        if not any(name.startswith(prefix) for name in names):
            raise UserError(
                f"model_key: {path}: has no {part} ({prefix}...); expected a whole checkpoint of "
                "Stable Diffusion 1 or 2 in the original layout (not SDXL, a LoRA or one part)"
            )


def _convert(
    path: Path, texts: Mapping[str, bytes], folder: Path, dtype: torch.dtype, config_key: str
) -> None:
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    tensors = load_file(path)
    options = {"config": str(folder), "local_files_only": True}
    load = {
        "unet/diffusion_pytorch_model": UNet2DConditionModel.from_single_file,
        "vae/diffusion_pytorch_model": AutoencoderKL.from_single_file,
        "text_encoder/model": _load_text_encoder,
    }
    for name, loads in load.items():
        part = name.partition("/")[0]
        own = {name: value for name, value in tensors.items() if name.startswith(PREFIXES[part])}
        try:
            state = loads(own, subfolder=part, **options).state_dict()
        except (ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
            raise UserError(
                f"model_key: {path}: its {part} does not fit the configuration of {config_key} "
                f"({error})"[:400]
                + "; name a checkpoint of its architecture with architecture_key"
            ) from error
        missing = [key for key, value in state.items() if value.is_meta]
        if missing:
            raise UserError(f"model_key: {path}: its {part} lacks {missing[0]}; download it again")
        # transformers 5 drops this prefix, and reads weights with it; transformers 4 needs it.
        prefix = "text_model." if part == "text_encoder" else ""
        state = {prefix + key.removeprefix(prefix): v.to(dtype) for key, v in state.items()}
        save_tensors(folder / f"{name}.safetensors", state, {"format": "pt"})


def _load_text_encoder(tensors: dict[str, torch.Tensor], **options: object) -> CLIPTextModel:
    return create_diffusers_clip_model_from_ldm(CLIPTextModel, checkpoint=tensors, **options)
