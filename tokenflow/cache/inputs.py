"""What preprocess.py is asked for, checked before a model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenflow.cache.options import PreprocessOptions
from tokenflow.cache.source_cache import FEATURES, Manifest, cache_folder
from tokenflow.cache.source_features import FeatureSettings, feature_bytes
from tokenflow.diffusion.adapters import Adapters, check_adapters_fit, find_adapters
from tokenflow.diffusion.checkpoints import (
    check_controlnet_fits,
    checkpoint_folder,
    checkpoint_revision,
    depth_estimator_folders,
    load_unet_skeleton,
)
from tokenflow.diffusion.ddim import NoiseSchedule
from tokenflow.diffusion.inversion import InversionTimesteps, inversion_timesteps
from tokenflow.diffusion.model_names import MODELS, ControlSettings, control_settings
from tokenflow.diffusion.models import resolve_device, resolve_dtype
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.ops.profiling import Stopwatch, free_disk
from tokenflow.storage.video import (
    MAX_FPS,
    Clip,
    clip_name,
    read_clip,
    resolve_clip,
    source_sha256,
)
from tokenflow.storage.work_dir import unfinished_bytes
from util import UserError, check_writable

log = logging.getLogger("tokenflow")

VAE_FACTOR = 8  # pixels per latent cell along one side, of every Stable Diffusion


@dataclass(frozen=True)
class PreprocessInputs:
    """Checked options with what they refer to."""

    options: PreprocessOptions
    clip: Clip
    checkpoint: Path
    timesteps: InversionTimesteps
    device: torch.device
    dtype: torch.dtype
    adapters: Adapters
    manifest: Manifest  # the cache's, but for the figures of its making
    folder: Path  # the cache's
    features: FeatureSettings | None  # None with --no_cache_features
    watch: Stopwatch
    group: ProcessGroup = SINGLE_PROCESS  # the processes that make this cache together


def open_preprocess_inputs(
    options: PreprocessOptions,
    group: ProcessGroup = SINGLE_PROCESS,
    watch: Stopwatch | None = None,
) -> PreprocessInputs:
    """Reads the clip, and checks all that can go wrong before a model is loaded.

    Args:
        group, watch: as in `build.build_cache`.

    Raises:
        UserError: naming what is missing or does not fit, and how to fix it.
    """
    device = resolve_device(options.device, group, must_exist=not options.estimate)
    dtype = resolve_dtype(options.dtype, device)
    watch = watch or Stopwatch(device)
    with watch("read"):
        source, sha256, clip = _read(options)
    known = MODELS[options.sd_version]
    model_key, architecture = options.model_key or known, options.architecture_key or known
    half = dtype is torch.float16
    checkpoint = checkpoint_folder(
        model_key, options.allow_pickle, architecture, options.depth_model, half
    )
    schedule = NoiseSchedule.of_checkpoint(checkpoint)
    adapters = find_adapters(options)
    check_adapters_fit(adapters, checkpoint)
    timesteps = inversion_timesteps(
        schedule, options.steps, options.save_steps, options.recon_steps
    )
    control, depth_model = _conditions(options, checkpoint)
    found = _clip_facts(source, sha256, clip) | dict(
        frames_asked=options.n_frames,
        model_key=model_key,
        model_revision=checkpoint_revision(checkpoint, half),
        timesteps=timesteps.saved,
        dtype=str(dtype).removeprefix("torch."),
        control=control,
        depth_model=depth_model,
        adapters=adapters.digest,
    )
    recorded = options.model_dump(include=set(Manifest.model_fields))
    manifest = Manifest(**recorded | found)
    check_writable(cache_folder(options.save_dir, manifest), "--save_dir")
    return PreprocessInputs(
        options=options,
        clip=clip,
        checkpoint=checkpoint,
        timesteps=timesteps,
        device=device,
        dtype=dtype,
        adapters=adapters,
        manifest=manifest,
        folder=cache_folder(options.save_dir, manifest),
        features=_feature_settings(options, manifest) if options.cache_features else None,
        watch=watch,
        group=group,
    )


def _read(options: PreprocessOptions) -> tuple[Path, str, Clip]:
    """The clip's path, its checksum, and its frames."""
    source = resolve_clip(options.data_path)
    sha256 = source_sha256(source)
    clip = read_clip(
        source,
        options.n_frames,
        start=options.frame_start,
        stride=options.frame_stride,
        size=(options.H, options.W) if options.H else None,
        fit=options.fit,
        fps=options.fps,
    )
    if source_sha256(source) != sha256:  # its frames would go by the name of others
        raise UserError(f"{source}: changed while it was read; run the same command again")
    if clip.fps > MAX_FPS:
        raise UserError(
            f"{source}: {float(clip.fps):g} frames per second, at most {MAX_FPS} are written; give "
            "the rate of the inversion and its edits: --fps 30"
        )
    return source, sha256, clip


def _clip_facts(source: Path, sha256: str, clip: Clip) -> dict[str, object]:
    """What the manifest says of the clip."""
    n_frames, height, width, _ = clip.frames.shape
    return dict(
        clip=clip_name(source),
        source_name=source.name,
        source_sha256=sha256,
        n_frames=n_frames,
        native_size=list(clip.native_size),
        height=height,
        width=width,
        fps=str(clip.fps),
    )


def _feature_settings(options: PreprocessOptions, manifest: Manifest) -> FeatureSettings:
    return FeatureSettings(
        n_frames=manifest.n_frames,
        keyframe_interval=options.keyframe_interval,
        keyframe_seed=options.keyframe_seed,
        n_timesteps=manifest.save_steps,
        attention_steps=int(manifest.save_steps * options.pnp_attn_t),
        feature_steps=int(manifest.save_steps * options.pnp_f_t),
        dtype=manifest.dtype,
        save_tokens=options.save_tokens,
        correspondence="flow" if options.correspondence == "flow" else "nn",
    )


def _conditions(
    options: PreprocessOptions, checkpoint: Path
) -> tuple[ControlSettings | None, str | None]:
    """The inversion's ControlNet (with --sd_version ControlNet) and depth estimator, if any."""
    in_channels = load_unet_skeleton(checkpoint).config.in_channels
    if in_channels not in (4, 5):
        raise UserError(
            f"{checkpoint}: its UNet takes {in_channels} channels, expected 4, or 5 with depth; an "
            "inpainting or upscaling checkpoint cannot be inverted"
        )
    control = None
    if options.sd_version == "ControlNet":
        control = control_settings(options)
        check_controlnet_fits(checkpoint, control.key, options.allow_pickle)
    if in_channels == 5 or (control is not None and control.kind == "depth"):
        depth_estimator_folders(options.depth_model, checkpoint, options.allow_pickle)
        return control, options.depth_model
    return control, None


def needed_disk(inputs: PreprocessInputs, inverted: bool = False) -> dict[str, float]:
    """The most bytes that will be written, by part: inversion and features.

    Args:
        inverted: whether all but the features exists.
    """
    manifest, unet, needed = inputs.manifest, load_unet_skeleton(inputs.checkpoint), {}
    if not inverted:  # frames/ at most, depth, and latents of four channels; these in float32
        depth = 4 * (manifest.depth_model is not None)
        a_pixel = 3 + depth + 4 * 4 * (len(manifest.timesteps) + 1) / VAE_FACTOR**2
        needed["inversion"] = manifest.n_frames * manifest.height * manifest.width * a_pixel
    if inputs.features is not None:
        grid = manifest.height // VAE_FACTOR, manifest.width // VAE_FACTOR
        needed["features"] = feature_bytes(unet, grid, inputs.features)
    return needed


def check_disk(inputs: PreprocessInputs, inverted: bool) -> None:
    """Logs how large the cache will be; a UserError refuses to begin if the disk has no room.

    Args:
        inverted: whether all but the features exists.
    """
    parts, fix_hint = needed_disk(inputs, inverted), "make room, or use --save_dir on another disk"
    if "features" in parts:
        log.info("source features: %.1f MB", parts["features"] / 1e6)
        fix_hint += ", or --no_cache_features"
    # What an interrupted run left is resumed, or makes room.
    left = unfinished_bytes(inputs.folder) + unfinished_bytes(inputs.folder / FEATURES)
    needed, free = sum(parts.values()) - left, free_disk(inputs.folder)
    if needed > free:
        megabytes = f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        raise UserError(f"{inputs.folder}: {megabytes}; {fix_hint}")
