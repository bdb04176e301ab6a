"""Finds and checks what the configuration of an edit refers to, before a model is loaded."""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_dispatch import attention_backend

from tokenflow.cache.options import ADAPTER_OPTIONS, FEATURE_OPTIONS, default, preprocess_command
from tokenflow.cache.source_cache import (
    MANIFEST,
    Manifest,
    SourceCache,
    clip_folder,
    find_cache,
)
from tokenflow.cache.source_features import find_features
from tokenflow.diffusion.adapters import (
    NO_ADAPTERS,
    Adapters,
    check_adapters_fit,
    find_adapters,
    recorded_adapters,
)
from tokenflow.diffusion.checkpoints import (
    check_controlnet_fits,
    checkpoint_folder,
    checkpoint_revision,
)
from tokenflow.diffusion.ddim import NoiseSchedule
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import (
    Loader,
    StableDiffusion,
    compile_unet,
    resolve_device,
    resolve_dtype,
)
from tokenflow.diffusion.optical_flow import (
    DIS_LEAST_SIDE,
    cached_raft_weights,
    find_raft_weights,
)
from tokenflow.diffusion.temporal_decoder import check_decoder_fits
from tokenflow.editing.config import CUDA_BACKENDS, EditConfig
from tokenflow.editing.preview import check_preview_vae
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.storage.images import check_proportions, find_masks, read_masks
from tokenflow.storage.schema import parse
from tokenflow.storage.video import clip_name, read_clip, resolve_clip, source_sha256
from util import MissingFileError, UserError, check_path, check_writable

log = logging.getLogger("tokenflow")

# Options of preprocess.py that a manifest has under their own names, and that tell an inversion
# from others of the clip and model.
MADE_WITH = (
    "steps", "frame_start", "frame_stride", "fit", "inversion_prompt", "inversion_iters",
    "inversion_tol", "dtype", "depth_model",
)  # fmt: skip
OF_MODEL = ("sd_version", "model_key", "architecture_key", *ADAPTER_OPTIONS)


@dataclass(frozen=True)
class EditInputs:
    """A checked configuration with what it refers to."""

    config: EditConfig
    cache: SourceCache
    n_frames: int
    checkpoint: Path
    adapters: Adapters  # of the edit
    timesteps: list[int]  # of the sampling schedule, noisiest first
    device: torch.device
    dtype: torch.dtype
    group: ProcessGroup = SINGLE_PROCESS  # the processes that make this edit together
    flow_weights: Path | None = None  # of RAFT; None: DIS estimates the optical flow
    masks: np.ndarray | None = None  # (n, H, W) bool, where to edit; None: everywhere
    output_size: tuple[int, int] | None = None  # (height, width) of the result; None: the cache's

    @property
    def source_adapters(self) -> Adapters:
        """Of the inversion and the source pass."""
        return NO_ADAPTERS if self.config.lora_for == "edit" else self.adapters

    def load_models(self, load: Loader, adapters: Adapters) -> StableDiffusion:
        """The checkpoint's models with what is added to it, compiled if the config says so."""
        allow = self.config.allow_pickle
        models = load(self.checkpoint, self.device, self.dtype, allow, adapters)
        if self.config.compile:
            compile_unet(models.unet)
        return models

    @property
    def flow_model(self) -> str | None:
        """What estimates the optical flow, "raft" or "dis"; None if the edit uses none."""
        if not self.config.uses_flow:
            return None
        return "raft" if self.flow_weights else "dis"


def open_edit_inputs(config: EditConfig, group: ProcessGroup = SINGLE_PROCESS) -> EditInputs:
    """Finds and checks the cache, the checkpoint and the device of a configuration.

    Raises:
        UserError: naming what is missing or does not fit, and the command that fixes it.
    """
    device = resolve_device(config.device, group, must_exist=not config.estimate)
    if config.compile and group.size > 1:
        raise UserError(
            f"compile: true, but {group.size} processes exchange tokens inside of the UNet, which "
            "cannot be compiled whole; use compile: false, or one process"
        )
    _check_backend(config.attention_backend, device)
    check_writable(config.output_path, "output_path")
    check_path(config.latents_path, "latents_path")
    dtype = resolve_dtype(config.dtype, device)
    config, cache, checkpoint, adapters = _find_cache(config, dtype is torch.float16)
    manifest = cache.manifest
    if config.verify:
        features = find_features(cache, features_remedy(config, manifest))
        if features is not None:
            features.verify()
    remake = f"{remedy(config, manifest)} --overwrite"
    _check_frames(config, cache, remake)
    if manifest.control is not None:  # the source pass runs under the inversion's ControlNet
        check_controlnet_fits(checkpoint, manifest.control.key, config.allow_pickle)
    if config.temporal_decoder is not None:
        check_decoder_fits(checkpoint, config.temporal_decoder, config.allow_pickle)
    if config.preview_every is not None and config.preview_vae is not None:
        check_preview_vae(config.preview_vae, config.allow_pickle)
    timesteps = NoiseSchedule.of_checkpoint(checkpoint).timesteps(config.n_timesteps)
    if not set(timesteps) <= set(manifest.timesteps):
        raise UserError(
            f"n_timesteps: {config.n_timesteps} needs latents at timesteps that {cache.folder} "
            f"does not hold (it was made with save_steps {manifest.save_steps}); {remake}"
        )
    n_frames = min(config.n_frames, manifest.n_frames)
    cache.check_source({*timesteps, max(manifest.timesteps)}, n_frames)
    return EditInputs(
        config=config,
        cache=cache,
        n_frames=n_frames,
        checkpoint=checkpoint,
        adapters=adapters,
        timesteps=timesteps,
        device=device,
        dtype=dtype,
        group=group,
        flow_weights=_flow_weights(config, cache),
        masks=_masks(config, manifest, n_frames),
        output_size=_output_size(config, cache),
    )


def _output_size(config: EditConfig, cache: SourceCache) -> tuple[int, int] | None:
    """The clip's own (height, width) in even numbers, as H.264 needs, if the result is to have it.

    A cache that an earlier version wrote does not tell it: the clip does.
    """
    if config.output_size == "model":
        return None
    if cache.manifest.fit == "crop":
        raise UserError(
            f"output_size: source, but {cache.folder} holds frames that were cropped (fit: crop), "
            "which cannot be undone; use output_size: model, or preprocess.py --fit stretch"
        )
    native = cache.manifest.native_size
    if native is None:
        clip = _source(config)
        if clip is None:
            raise UserError(
                f"output_size: source, but {cache.folder} does not tell the clip's size, and there "
                f"is no clip at data_path, {config.data_path}: put it there, or use "
                "output_size: model"
            )
        native = read_clip(clip, 1, start=cache.manifest.frame_start, own_size=True).native_size
    height, width = (max(side - side % 2, 2) for side in native)
    return height, width


def _masks(config: EditConfig, manifest: Manifest, n_frames: int) -> np.ndarray | None:
    """The masks of the edited frames, resized as they were."""
    if config.mask is None:
        return None
    start, stride = manifest.frame_start, manifest.frame_stride
    numbers = range(start, start + n_frames * stride, stride)
    files = find_masks("mask", config.mask, manifest.clip, numbers)
    size = manifest.height, manifest.width
    if manifest.native_size is not None:  # of the clip, or drawn on the cache's frames
        check_proportions("mask", files, [manifest.native_size, size])
    masks = read_masks(files, size, manifest.fit)
    if not masks.any():
        raise UserError(
            f"mask: {config.mask}: is 0 in all of the {n_frames} frames, so nothing would be "
            "edited; what is not 0 is edited"
        )
    return masks


def _flow_weights(config: EditConfig, cache: SourceCache) -> Path | None:
    """RAFT's weights if the edit estimates optical flow by it; None for DIS, or no flow."""
    if not config.uses_flow:
        return None
    if config.flow_model == "raft" or (
        config.flow_model == "auto" and cached_raft_weights().is_file()
    ):
        return find_raft_weights(None)
    side = min(cache.manifest.height, cache.manifest.width)
    if side < DIS_LEAST_SIDE:
        raise UserError(
            f"correspondence, smooth_steps, noise, deflicker: optical flow by DIS needs "
            f"{DIS_LEAST_SIDE} pixels a side, but {cache.folder} holds frames of {side}; use "
            "flow_model: raft"
        )
    return None


def _find_cache(config: EditConfig, half: bool) -> tuple[EditConfig, SourceCache, Path, Adapters]:
    """The cache of a config, the checkpoint with what is added to it, and the config with what it
    leaves to the cache.
    """
    source, clip, revision = _source(config), clip_name(config.data_path), None
    version = config.sd_version or _version(config, clip)
    model_key = config.model_key or (config.sd_version and MODELS[version])
    architecture_key = config.architecture_key or MODELS[version]
    depth_model = getattr(config, "depth_model", None)
    find = partial(
        checkpoint_folder,
        allow_pickle=config.allow_pickle,
        depth_model=depth_model,
        half=half,
    )
    if model_key is not None:
        checkpoint = find(model_key, architecture_key=architecture_key)
        revision = checkpoint_revision(checkpoint, half)
    adapters, said = find_adapters(config), [config.lora, config.embeddings] != [None, None]
    wanted = {
        "source_sha256": source and source_sha256(source),
        "model_revision": revision,
        "adapters": "" if config.lora_for == "edit" else adapters.digest if said else None,
        "steps": config.n_inversion_steps,
        "frame_start": config.frame_start,
        "frame_stride": config.frame_stride,
    }
    folder = clip_folder(config.latents_path, version, clip)
    cache = find_cache(folder, wanted, config.n_frames, partial(remedy, config), config.verify)
    manifest = cache.manifest
    if model_key is None:
        model_key = manifest.model_key
        architecture_key = manifest.architecture_key or architecture_key
        checkpoint = find(model_key, architecture_key=architecture_key)
        if checkpoint_revision(checkpoint, half) != manifest.model_revision:
            raise UserError(
                f"{cache.folder}: made with another version of {model_key} than is there now; name "
                f"that one by model_key, or {remedy(config, manifest)} --overwrite"
            )
    if source is None:
        log.warning(
            "data_path: %s is not there to compare; using the frames of %s",
            config.data_path,
            cache.folder,
        )
    found = {"sd_version": manifest.sd_version, "n_timesteps": manifest.save_steps}
    found |= {"n_frames": manifest.n_frames}
    if model_key != MODELS[manifest.sd_version]:
        found |= {"model_key": model_key, "architecture_key": manifest.architecture_key}
    if not said and config.lora_for == "both":
        advice = f"{remedy(config, manifest)} --overwrite"
        adapters = recorded_adapters(manifest, manifest.adapters, cache.folder, advice)
        found |= {key: getattr(manifest, key) for key in ADAPTER_OPTIONS}
    check_adapters_fit(adapters, checkpoint)
    given = {key: value for key, value in config.model_dump().items() if value is not None}
    config = parse(type(config), config.model_dump() | found | given, str(cache.folder))
    return config, cache, checkpoint, adapters


def _version(config: EditConfig, clip: str) -> str:
    """The only sd_version that a clip has a cache of; preprocess.py's default if it has none."""
    pattern = f"sd_*/{glob.escape(clip)}/steps_*/nframes_*/{MANIFEST}"
    names = {path.parts[-5] for path in Path(config.latents_path).glob(pattern)}
    versions = sorted(MODELS.keys() & {name.removeprefix("sd_") for name in names})
    if len(versions) > 1:
        listed = ", ".join(versions)
        raise UserError(f"sd_version: {clip} has caches of several versions ({listed}); choose one")
    return versions[0] if versions else default("sd_version")


def _check_backend(name: str, device: torch.device) -> None:
    if name in CUDA_BACKENDS and device.type != "cuda":
        raise UserError(f"attention_backend: {name} needs a CUDA device, not {device}; use native")
    try:
        with attention_backend(name):
            pass
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"attention_backend: {name} cannot be used here ({error}); use native, or install it "
            "(requirements-optional.txt)"
        ) from error


def remedy(config: EditConfig, manifest: Manifest | None) -> str:
    """The preprocess command that makes the cache that a config needs, as advice.

    Args:
        manifest: of a cache that does not fit; what the config leaves open is taken from it.
    """
    settings = config.model_dump(include={"n_frames", "frame_start", "frame_stride", "H", "W"})
    settings |= {"save_dir": config.latents_path, "save_steps": config.n_timesteps}
    settings["steps"] = config.n_inversion_steps
    found = {} if manifest is None else _made_with(manifest)
    settings = found | {key: value for key, value in settings.items() if value is not None}
    if config.n_inversion_steps is None and config.n_timesteps is not None:
        # A number near the usual one that preprocess.py takes.
        near = round(settings.get("steps", default("steps")) / config.n_timesteps)
        settings["steps"] = max(near, 1) * config.n_timesteps
    return _advice(config, settings)


def features_remedy(config: EditConfig, manifest: Manifest) -> str:
    """The preprocess command that adds the features that a config needs to its cache, as advice.

    Args:
        manifest: the cache's. Its inversion is kept.
    """
    settings = _made_with(manifest) | manifest.model_dump(include={"save_steps", "recon_steps"})
    settings |= {"save_dir": config.latents_path, "n_frames": manifest.frames_asked}
    return _advice(config, settings)


def _made_with(manifest: Manifest) -> dict[str, object]:
    """The options that tell an inversion from others of the clip and model; None: left out."""
    control = manifest.control
    settings = {name: getattr(manifest, name) or None for name in MADE_WITH}
    if manifest.reconstruction != default("reconstruction"):
        settings["reconstruction"] = manifest.reconstruction
    settings |= {"H": manifest.height, "W": manifest.width}
    if control is not None:
        settings |= {
            "control": control.kind,
            "controlnet_key": control.key,
            "controlnet_scale": control.scale,
            "canny_low": control.low,
            "canny_high": control.high,
        }
    return settings


def _advice(config: EditConfig, settings: dict[str, object]) -> str:
    """Names the command for the clip, model and features of a config, with these settings."""
    of_config = {key: getattr(config, key) for key in ("data_path", *OF_MODEL)}
    if config.lora_for == "edit":
        of_config |= dict.fromkeys(ADAPTER_OPTIONS)
    features = {
        option: getattr(config, option)
        for option in FEATURE_OPTIONS
        if getattr(config, option, default(option)) != default(option)
    }
    missing = _source(config) is None
    first = f"there is no clip at data_path, {config.data_path}: put it there, then " * missing
    return f"{first}run: {preprocess_command(of_config | settings | features)}"


def _source(config: EditConfig) -> Path | None:
    """The clip, where it still is."""
    try:
        return resolve_clip(config.data_path)
    except MissingFileError:
        return None


def _check_frames(config: EditConfig, cache: SourceCache, remake: str) -> None:
    manifest = cache.manifest
    for key, have in (("H", manifest.height), ("W", manifest.width)):
        want = getattr(config, key)
        if want is not None and want != have:
            raise UserError(f"{key}: {want}, but {cache.folder} holds frames of {have}; {remake}")
    if manifest.n_frames < config.n_frames:
        short = manifest.frames_asked >= config.n_frames
        reason = "the clip has no more" if short else f"for more, {remake}"
        log.warning(
            "n_frames: %d asked for, the cache holds %d (%s)",
            config.n_frames,
            manifest.n_frames,
            reason,
        )
