"""Finding checkpoints (local folders, the hub), checking their files and loading models."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from tokenflow.diffusion.model_names import REVISIONS
from tokenflow.diffusion.single_file import converted_folder, source_sha256
from tokenflow.ops.simulated_gpu import is_simulated
from util import MissingFileError, UserError

# The names of a model's weights file, and of its pickled form.
WEIGHTS = {
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.bin",
    "model.safetensors": "pytorch_model.bin",
}
# The files of a checkpoint in diffusers' format, by folder.
PIPELINE_FILES = {
    "unet": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("config.json", "model.safetensors"),
    "tokenizer": ("tokenizer_config.json",),
    "scheduler": ("scheduler_config.json",),
}
# The depth estimator of a checkpoint that is conditioned on depth (`depth_model: checkpoint`).
OWN_DEPTH = "checkpoint"
DEPTH_FILES = {
    "depth_estimator": ("config.json", "model.safetensors"),
    "feature_extractor": ("preprocessor_config.json",),
}
HALF = ".fp16.safetensors"  # suffix of weights in float16, next to others or alone
INDEX = ".index.json"  # suffix of the index of weights in several files
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
# Keys of a model's config.json by which transformers and diffusers would load other files than its
# own, or code: kernels from the hub, adapters, other programs' quantised weights.
LOADS_OTHERS = (
    "_attn_implementation",
    "attn_implementation",
    "experts_implementation",
    "kernel_config",
    "quantization_config",
    "transformers_weights",
)


def checkpoint_folder(
    key: str,
    allow_pickle: bool = False,
    architecture_key: str | None = None,
    depth_model: str | None = None,
    half: bool = False,
) -> Path:
    """The local folder of a whole Stable Diffusion checkpoint, fetched from the hub if need be.

    Args:
        key: a local folder in diffusers' format, a hub id (owner/name, with the revision of
            `REVISIONS`, or owner/name@revision), or a safetensors file in the original layout,
            which is converted to a folder once (`single_file.converted_folder`).
        allow_pickle: use a part's pickled weights if it has no safetensors.
        architecture_key: for a file: the folder or hub id whose configurations it has.
        depth_model: "checkpoint" if its own depth estimator is needed, else anything.
        half: for a run in float16: of the hub's weights the float16 files are fetched, where there
            are such and no others were fetched before.

    Raises:
        MissingFileError: if the folder or one of its files is missing, or the hub has no such
            checkpoint, or it cannot be reached and no copy is cached.
        UserError: if one of its files is damaged, or a part's weights are pickled only.
    """
    path = Path(os.path.expanduser(key))
    wanted = PIPELINE_FILES | (DEPTH_FILES if depth_model == OWN_DEPTH else {})
    if path.suffix == ".safetensors" and not os.path.exists(path):
        raise MissingFileError(f"model_key: {key}: no such file")
    if os.path.isfile(path) and path.suffix != ".safetensors":
        raise MissingFileError(
            f"model_key: {path}: a file, expected a folder in diffusers' format, or one "
            ".safetensors file (pickled ones can run code when they are read: convert it)"
        )
    if architecture_key is None or not os.path.isfile(path):
        return _pipeline_folder(key, "model_key", wanted, allow_pickle, half)
    files = {
        part: tuple(name for name in names if name not in WEIGHTS)
        for part, names in PIPELINE_FILES.items()
    }
    configs = _pipeline_folder(architecture_key, "architecture_key", files, allow_pickle=True)
    folder = converted_folder(path, configs, architecture_key)
    return _pipeline_folder(str(folder), "model_key", wanted, allow_pickle)


def _pipeline_folder(
    key: str,
    option: str,
    files: Mapping[str, Sequence[str]],
    allow_pickle: bool,
    half: bool = False,
) -> Path:
    """The checked folder of a Stable Diffusion checkpoint with these files of each part."""
    extra = ["model_index.json", "tokenizer/merges.txt"]
    folder = _find(key, option, files, allow_pickle, extra, half)
    where = f"{key}: not a whole Stable Diffusion checkpoint in diffusers' format"
    for part, names in files.items():
        if part in DEPTH_FILES:
            where = f"depth_model: {OWN_DEPTH}: {key} has no depth estimator of its own"
        if part == "tokenizer" and not (folder / part / "tokenizer.json").is_file():
            names = (*names, "vocab.json", "merges.txt")
        _check_part(folder, part, names, allow_pickle, where)
    return folder


def single_model_folder(key: str, option: str, allow_pickle: bool = False) -> Path:
    """The local folder of one model (a ControlNet, a depth estimator); see `checkpoint_folder`.

    Args:
        key: a local folder, a hub id, or a hub id's folder (owner/name/folder), of which
            @revision may follow.
        option: the option that names it, for errors: controlnet_key, depth_model or decoder_key.
    """
    is_local = key[:1] in "/.~" or os.path.exists(key)
    repository, part = (key, "") if is_local else _split_hub_key(key)
    folder = _find(repository, option, {part: tuple(WEIGHTS)}, allow_pickle) / part
    weights = next((name for name in WEIGHTS if _exists(folder / name)), next(iter(WEIGHTS)))
    where = f"{key}: not a model in diffusers' or transformers' format"
    _check_part(folder, "", ("config.json", weights), allow_pickle, where)
    return folder


def depth_estimator_folders(
    key: str, checkpoint: Path, allow_pickle: bool = False
) -> tuple[Path, Path]:
    """The local folders of a depth estimator and of its image processor.

    Args:
        key: as of `single_model_folder`; or "checkpoint" for the checkpoint's own, of which
            `checkpoint_folder` has checked the files.
    """
    if key == OWN_DEPTH:
        return checkpoint / "depth_estimator", checkpoint / "feature_extractor"
    folder = single_model_folder(key, "depth_model", allow_pickle)
    return folder, folder


def weights_file(key: str, option: str, name: str) -> Path:
    """The local safetensors file of a LoRA or an embedding, fetched from the hub if need be.

    Args:
        key: a file, a folder that holds `name`, or a hub id: owner/name or owner/name/file.
        option: the option that names it, for errors: lora or embeddings.

    Raises:
        UserError: it is missing, damaged or pickled.
    """
    path = Path(os.path.expanduser(key))
    is_file = path.suffix in (".safetensors", *PICKLED)  # owner/name/file, or of a local folder
    if os.path.isdir(path):
        path = path / name
    elif not os.path.exists(path) and key[:1] not in "/.~" and key.count("/") > is_file:
        repository, named = _split_hub_key(key)
        path = _download(repository, option, [named or name]) / (named or name)
    if path.suffix != ".safetensors":
        raise UserError(f"{option}: {path}: expected a .safetensors file (pickles are not read)")
    if not os.path.isfile(path):
        raise MissingFileError(f"{option}: {path}: no such file")
    _check_header(path)
    return path


def uses_safetensors(folder: Path, allow_pickle: bool = False) -> bool:
    """Whether a model is loaded from safetensors: true unless it only has pickled weights.

    Args:
        folder: of one model: a ControlNet's, or a checkpoint's unet/.

    Raises:
        UserError: the weights are pickled only and not allowed, or are of a format that diffusers
            and transformers do not read; names the file.
    """
    pickled = sorted(path for path in folder.glob("*") if path.suffix in PICKLED)
    if any(folder.glob("*.safetensors")) or not pickled:
        return True
    convert = "convert it (in diffusers: from_pretrained, then save_pretrained)"
    if not any(_exists(folder / name) for name in WEIGHTS.values()):
        raise UserError(
            f"{pickled[0]}: no weights in diffusers' format, and pickled ones can run code when "
            f"they are read; {convert}"
        )
    if not allow_pickle:
        raise UserError(
            f"{pickled[0]}: pickled weights can run code when they are read, and there are no "
            f"safetensors next to them; {convert}, or, if you trust their source, add "
            "--allow_pickle (of preprocess.py and the run scripts; allow_pickle: true in a config)"
        )
    return False


Model = TypeVar("Model", bound=torch.nn.Module)


def load_model(cls: type[Model], folder: Path, allow_pickle: bool = False, **options: Any) -> Model:
    """Loads a diffusers or transformers model from its own folder; nothing in it is run as code.

    Pickled weights, where they are allowed, are read by these libraries with an unpickler that
    makes tensors and plain values only. On a simulated GPU no weights are read.

    Args:
        cls: the model's class, which the folder's files do not choose.
        folder: one model's, checked by `single_model_folder` or `checkpoint_folder`.
        options: of from_pretrained.

    Raises:
        UserError: see `uses_safetensors`; or pickled weights hold anything but tensors.
    """
    safe = uses_safetensors(folder, allow_pickle)
    if is_simulated():
        return _without_weights(cls, folder, options.get("torch_dtype", torch.float32))
    if _reads_half(folder, options.get("torch_dtype") is torch.float16):
        options["variant"] = "fp16"
    try:
        return cls.from_pretrained(folder, use_safetensors=safe, local_files_only=True, **options)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        if safe:
            raise
        raise UserError(
            f"{folder}: its pickled weights are damaged or hold more than tensors, and are not "
            f"read ({error})"[:400]
        ) from error


def _without_weights(cls: type[Model], folder: Path, dtype: torch.dtype) -> Model:
    """A model of a folder's config.json on the CPU, whose weights are never written or read."""
    with torch.device("meta"):
        if hasattr(cls, "load_config"):  # of diffusers
            model = cls.from_config(cls.load_config(folder))
        elif hasattr(cls, "config_class"):  # of transformers
            model = cls(cls.config_class.from_pretrained(folder))
        else:  # one of its classes that choose another by the configuration
            model = cls.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    # torch's `to`: diffusers' own warns of what `from_pretrained` would do.
    return torch.nn.Module.to(model, dtype).to_empty(device="cpu")


def check_controlnet_fits(checkpoint: Path, key: str, allow_pickle: bool = False) -> None:
    """Refuses a ControlNet that is missing or was trained for another kind of UNet.

    Args:
        checkpoint: the Stable Diffusion checkpoint's folder.
        key, allow_pickle: of the ControlNet; see `checkpoint_folder`, for errors too.
    """
    unet = UNet2DConditionModel.load_config(checkpoint, subfolder="unet")
    folder = single_model_folder(key, "controlnet_key", allow_pickle)
    controlnet = ControlNetModel.load_config(folder)
    for field in ("in_channels", "cross_attention_dim"):
        if controlnet[field] != unet[field]:
            raise UserError(
                f"{key}: this ControlNet does not fit {checkpoint}: its {field} is "
                f"{controlnet[field]}, the UNet's {unet[field]}; name one made for this model with "
                "controlnet_key"
            )


def checkpoint_revision(folder: Path, half: bool = False) -> str:
    """A short fingerprint of a checkpoint: equal for copies of it, whatever their path.

    A hash of the configurations and of each weights file's first and last MiB: cheap, and different
    for checkpoints that differ in training. The first MiB of safetensors holds names, shapes and
    offsets; the last MiB of a pickled file holds its tensors' checksums. Of a folder that was
    converted from a single file, that file's checksum stands for the weights.
    """
    digest, source = hashlib.sha256(), source_sha256(folder)
    digest.update((source or "").encode())
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        for path in sorted((folder / part).glob("*config.json")):
            digest.update(path.read_bytes())
        for path in [] if source else _weights_files(folder / part, half):
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


def for_inference(
    model: torch.nn.Module,
    device: torch.device,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.nn.Module:
    """Moves a model to a device, in evaluation mode and without gradients."""
    model = model.to(device, memory_format=memory_format)
    return model.eval().requires_grad_(False)


def _find(
    key: str,
    option: str,
    parts: Mapping[str, Sequence[str]],
    allow_pickle: bool,
    extra: Sequence[str] = (),
    half: bool = False,
) -> Path:
    """A local folder, or one of the hub's files: pickles only if allowed and needed, and float16
    weights of a Stable Diffusion's parts if asked for.
    """
    folder = Path(os.path.expanduser(key))
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise MissingFileError(
            f"{key}: a file, but {_spelled(option)} expects a folder in diffusers' "
            "format; convert it (in diffusers: from_single_file, then save_pretrained)"
        )
    weights = [(part, name) for part, names in parts.items() for name in names if name in WEIGHTS]
    patterns = [f"{part}/*.json".lstrip("/") for part in parts]
    patterns += extra
    halves = [each for each in weights if half and each[0] in PIPELINE_FILES]
    if halves := [each for each in halves if not _cached(key, *each)]:
        patterns += [os.path.join(part, _half(name)) for part, name in halves]
        folder = _download(key, option, patterns)
        weights = [each for each in weights if not (folder / each[0] / _half(each[1])).is_file()]
    patterns += [pattern for each in weights for pattern in _patterns(*each)]
    if weights or not halves:
        folder = _download(key, option, patterns)
    pickles = [
        pattern
        for part, name in weights
        if not any((folder / part).glob("*.safetensors"))
        for pattern in _patterns(part, WEIGHTS[name])
    ]
    if pickles and allow_pickle:
        folder = _download(key, option, patterns + pickles)
    return folder


def _split_hub_key(key: str) -> tuple[str, str]:
    """The repository of owner/name or owner/name/path, with @revision, and the path within it."""
    place, at, revision = key.partition("@")
    owner, _, rest = place.partition("/")
    name, _, path = rest.partition("/")
    return (f"{owner}/{name}" if rest else owner) + at + revision, path


def _pinned(key: str) -> tuple[str, str | None]:
    """A repository and its revision: the one that is given, else the one that is known."""
    repository, _, revision = key.partition("@")
    return repository, revision or REVISIONS.get(repository)


def _cached(key: str, part: str, name: str) -> bool:
    """Whether a weights file of the hub was fetched before."""
    repository, revision = _pinned(key)
    return isinstance(try_to_load_from_cache(repository, f"{part}/{name}", revision=revision), str)


def _spelled(option: str) -> str:
    """An option with where it is given."""
    if option in ("clip_model", "dino_model"):  # evaluate.py's
        return f"--{option}"
    flag = "" if option in ("decoder_key", "preview_vae") else f"--{option} of preprocess.py, "
    return f"{flag}{option} in a config"


def _download(key: str, option: str, patterns: list[str]) -> Path:
    try:
        repository, revision = _pinned(key)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise MissingFileError(
            f"{key}: no such folder, and not a hub id of the form owner/name"
        ) from error
    except OSError as error:  # the hub's errors: no network, no such repository, no access
        reason = str(error).strip().splitlines()[0]
        raise MissingFileError(
            f"{key}: no such folder, and the Hugging Face hub does not give it ({reason}); "
            f"name a local folder of it with {_spelled(option)}"
        ) from error


def _patterns(part: str, name: str) -> list[str]:
    stem, suffix = os.path.splitext(name)
    return [os.path.join(part, name), os.path.join(part, f"{stem}-*{suffix}")]


def _exists(path: Path) -> bool:
    return path.is_file() or path.with_name(path.name + INDEX).is_file()


def _half(name: str) -> str:
    return name.replace(".safetensors", HALF)


def _reads_half(folder: Path, half: bool) -> bool:
    """Whether a model's float16 file is read: if it has no other; or of the hub's, in a run in
    float16, so that files that are fetched later change nothing.
    """
    found = any((folder / _half(name)).is_file() for name in WEIGHTS)
    others = any(_exists(folder / name) for name in WEIGHTS)
    return found and (not others or (half and folder.parent.parent.name == "snapshots"))


def _weights_files(folder: Path, half: bool) -> list[Path]:
    names = WEIGHTS if any(folder.glob("*.safetensors")) else WEIGHTS.values()
    if _reads_half(folder, half):
        names = map(_half, WEIGHTS)
    found = [folder / name for name in names if (folder / name).is_file()]
    for index in (folder / f"{name}{INDEX}" for name in names):
        if index.is_file():
            found += [folder / name for name in _shards_of(index)]
    return found


def _shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists, all in its folder and of its format."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index}: damaged, not an index of weights; download the model again"
        ) from error
    suffix = Path(index.name.removesuffix(INDEX)).suffix
    for name in names:
        # An index of safetensors that names a pickled file would have it read.
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(suffix):
            raise UserError(
                f"{index}: lists {name!r:.80}, expected {suffix} files in the same folder"
            )
        if not (index.parent / name).is_file():
            raise MissingFileError(f"{index}: lists {name!r:.80}, which is missing")
    return names


def _check_part(
    folder: Path, part: str, names: Sequence[str], allow_pickle: bool, where: str
) -> None:
    """Refuses missing files, damaged JSON, JSON by which other files or code would be loaded, and
    weights whose header or length is wrong.
    """
    safe = uses_safetensors(folder / part, allow_pickle)
    for name in names:
        found = _exists(folder / part / name) or (folder / part / _half(name)).is_file()
        if not found and (safe or name not in WEIGHTS):
            hint = "; pickled weights of the hub are fetched with --allow_pickle only"
            hint = hint if name in WEIGHTS else ""
            raise MissingFileError(f"{where}: {os.path.join(part, name)} is missing{hint}")
    for path in (folder / part).glob("*.json"):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: damaged, not JSON ({error}); download the model again"
            ) from error
        if path.name.endswith(INDEX):
            _shards_of(path)
        if path.name == "adapter_config.json":
            raise UserError(f"{path}: an adapter, which would load another model; remove it")
        if path.name == "config.json":
            key = next((key for key in LOADS_OTHERS if _has_key(content, key)), None)
            if key is not None:
                raise UserError(f"{path}: {key} may load code or files from elsewhere; remove it")
    for path in (folder / part).glob("*.safetensors"):
        _check_header(path)


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); download it again") from error


def _has_key(content: Any, key: str) -> bool:
    """Whether JSON has a key with a value, at any depth."""
    if not isinstance(content, dict):
        return False
    return content.get(key) is not None or any(_has_key(v, key) for v in content.values())
