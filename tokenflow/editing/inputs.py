"""The configuration of an edit, and the checks of what it refers to, before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models.attention_dispatch import attention_backend

from tokenflow.cache.options import default
from tokenflow.cache.source_cache import Manifest, SourceCache, find_cache, preprocess_command
from tokenflow.cache.source_features import find_features
from tokenflow.diffusion.checkpoints import (
    check_controlnet_fits,
    checkpoint_folder,
    checkpoint_revision,
    model_key_for,
)
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import NoiseSchedule, resolve_device, resolve_dtype
from tokenflow.ops.distributed import ALONE, Team
from tokenflow.storage.video import MAX_FPS, MAX_SIDE, clip_name, resolve_clip, source_sha256
from util import (
    MAX_COUNT,
    MAX_SEED,
    ArgumentParser,
    MissingFileError,
    UserError,
    check_path,
    check_writable,
    load_config,
    option,
)

log = logging.getLogger("tokenflow")

# Backends that need nothing from the hub at run time.
CPU_BACKENDS = ("native", "_native_math")
CUDA_BACKENDS = ("xformers", "flash", "sage", "flex", "_native_flash", "_native_efficient")
CUDA_BACKENDS += ("_native_cudnn",)
# Keys of a config that cached features depend on, and the options of preprocess.py that set them.
FEATURE_OPTIONS = {
    "batch_size": "interval",
    "keyframe_seed": "keyframe_seed",
    "pnp_attn_t": "pnp_attn_t",
    "pnp_f_t": "pnp_f_t",
}
CONSISTENCIES = ("tokenflow", "extended_attention", "first_frame", "none")


# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class EditConfig:
    """The keys that all techniques share; each is explained in configs/."""

    # what to edit
    data_path: str = option()
    prompt: str = option()
    negative_prompt: str = option("")
    latents_path: str = option("latents")
    output_path: str = option("tokenflow-results")
    n_inversion_steps: int = option(500, low=1, high=MAX_COUNT)
    n_frames: int = option(40, low=1, high=MAX_COUNT)
    H: int | None = option(None, low=8, high=MAX_SIDE)
    W: int | None = option(None, low=8, high=MAX_SIDE)
    fps: float | None = option(None, low=0.1, high=MAX_FPS)
    # model
    sd_version: str = option("2.1", choices=tuple(MODELS))
    model_key: str | None = option(None)
    allow_pickle: bool = option(False)
    device: str = option("auto")
    dtype: str = option("auto", choices=("auto", "float32", "float16", "bfloat16"))
    attention_backend: str = option("native", choices=CPU_BACKENDS + CUDA_BACKENDS)
    compile: bool = option(False)
    # running
    checkpoint_every: int = option(5, low=1)
    verify: bool = option(False)
    # sampling
    seed: int = option(1, low=0, high=MAX_SEED)
    n_timesteps: int = option(50, low=1, high=1000)
    guidance_scale: float = option(7.5, low=0)
    # TokenFlow
    batch_size: int = option(8, low=1, high=MAX_COUNT)
    chunk_size: int | None = option(None, low=1, high=MAX_COUNT)
    source_features: str = option("auto", choices=("auto", "live"))
    max_keyframes: int | None = option(None, low=2, high=MAX_COUNT)
    keyframe_seed: int = option(1, low=0, high=MAX_SEED)
    consistency: str = option("tokenflow", choices=CONSISTENCIES)
    keyframes: str = option("random", choices=("random", "fixed"))
    propagation: str = option("paper", choices=("paper", "released"))
    blend: str = option("sigmoid", choices=("sigmoid", "linear"))
    correspondence: str = option("nn", choices=("nn", "flow"))

    def __post_init__(self) -> None:
        if (self.H is None) != (self.W is None) or (self.H or 0) % 8 or (self.W or 0) % 8:
            raise UserError(f"H: {self.H}, W: {self.W}; expected both or neither, multiples of 8")
        if self.propagation == "released" and self.blend != "sigmoid":
            raise UserError("blend: linear goes with propagation: paper; released has its own")
        if self.n_inversion_steps % self.n_timesteps:
            raise UserError(
                f"n_timesteps: {self.n_timesteps} does not divide n_inversion_steps: "
                f"{self.n_inversion_steps}; the timesteps of the one must be among the other's"
            )


Config = TypeVar("Config", bound=EditConfig)


def read_config(
    cls: type[Config], argv: Sequence[str] | None, default: str, about: str
) -> tuple[Config, bool]:
    """Reads a run script's command line and its YAML config.

    Args:
        cls: the script's configuration.
        argv: the command line without the program's name; None for sys.argv's.
        default: the config file used where none is named.
        about: the script's one-line description.

    Returns:
        the configuration, and whether a finished result is to be made anew (--overwrite).

    Raises:
        UserError: if the command line, the file or one of its values is wrong.
    """
    parser = ArgumentParser(description=about)
    parser.add_argument(
        "--config",
        "--config_path",
        default=Path(__file__).parents[2] / default,
        help=f"YAML file (default: {default})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the file; any number of times",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; the same as --set device=...")
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="also load models whose weights are pickled only; the same as --set allow_pickle=true",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished result")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all checksums of the cache, its features and a finished result first; the "
        "same as --set verify=true",
    )
    args = parser.parse_args(argv)
    overrides = args.set + ([f"device={args.device}"] if args.device else [])
    overrides += ["verify=true"] if args.verify else []
    overrides += ["allow_pickle=true"] if args.allow_pickle else []
    return load_config(cls, args.config, overrides), args.overwrite


# ---------------------------------------------------------------------------------------------
# Inputs: everything that can be checked before a model is loaded


@dataclass(frozen=True)
class EditInputs:
    """A checked configuration with what it refers to."""

    config: EditConfig
    cache: SourceCache
    n_frames: int
    checkpoint: Path
    timesteps: list[int]  # of the sampling schedule, noisiest first
    device: torch.device
    dtype: torch.dtype
    team: Team = ALONE  # the processes that make this edit together


def open_inputs(config: EditConfig, team: Team = ALONE) -> EditInputs:
    """Finds and checks the cache, the checkpoint and the device of a configuration.

    Raises:
        UserError: naming what is missing or does not fit, and the command that mends it.
    """
    device = resolve_device(config.device, team)
    if config.compile and team.size > 1:
        raise UserError(
            f"compile: true, but {team.size} processes exchange tokens inside of the UNet, which "
            "cannot be compiled whole; use compile: false, or one process"
        )
    _check_backend(config.attention_backend, device)
    check_writable(config.output_path, "output_path")
    check_path(config.latents_path, "latents_path")
    cache = find_cache(
        config.latents_path,
        config.sd_version,
        clip_name(config.data_path),
        config.n_inversion_steps,
        config.n_frames,
        partial(remedy, config),
        config.verify,
    )
    manifest = cache.manifest
    if config.verify:
        features = find_features(cache, features_remedy(config, manifest))
        if features is not None:
            features.verify()
    remake = f"{remedy(config, manifest)} --overwrite"
    _check_source(config, cache, remake)
    model_key = model_key_for(config.sd_version, config.model_key)
    checkpoint = checkpoint_folder(model_key, config.allow_pickle)
    if checkpoint_revision(checkpoint) != manifest.model_revision:
        raise UserError(
            f"{cache.folder}: made with another model ({manifest.model_key}) than {checkpoint}; "
            + remake
        )
    if manifest.control is not None:  # the source pass runs under the inversion's ControlNet
        check_controlnet_fits(checkpoint, manifest.control.key, config.allow_pickle)
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
        timesteps=timesteps,
        device=device,
        dtype=resolve_dtype(config.dtype, device),
        team=team,
    )


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
    if manifest is None:
        there = _source(config) is not None
        command = _preprocess_command(config, {"H": config.H, "W": config.W})
        return f"run: {command}" if there else f"data_path is not there either; {command}"
    settings = _made_with(manifest) | {
        "H": config.H or manifest.height,
        "W": config.W or manifest.width,
    }
    return f"run: {_preprocess_command(config, settings)}"


def features_remedy(config: EditConfig, manifest: Manifest) -> str:
    """The preprocess command that adds the features that a config needs to its cache, as advice.

    Args:
        manifest: the cache's. Its inversion is not made again.
    """
    settings = _made_with(manifest) | {
        "H": manifest.height,
        "W": manifest.width,
        "steps": manifest.steps,
        "save_steps": manifest.save_steps,
        "recon_steps": manifest.recon_steps,
        "n_frames": manifest.frames_asked,
    }
    return f"run: {_preprocess_command(config, settings)}"


def _made_with(manifest: Manifest) -> dict[str, object]:
    """The options that a cache was made with, but for those that a config names too."""
    control = manifest.control
    settings = {
        "frame_start": manifest.frame_start,
        "frame_stride": manifest.frame_stride,
        "fit": manifest.fit,
        "inversion_prompt": manifest.inversion_prompt,
        "inversion_iters": manifest.inversion_iters,
        "inversion_tol": manifest.inversion_tol or None,  # None: the option is left out
        "dtype": manifest.dtype,
        "depth_model": manifest.depth_model,
    }
    if control is not None:
        settings |= {
            "control": control.kind,
            "controlnet_key": control.key,
            "controlnet_scale": control.scale,
            "canny_low": control.low,
            "canny_high": control.high,
        }
    return settings


def _preprocess_command(config: EditConfig, settings: dict[str, object]) -> str:
    """The command for a config; settings win over what it names."""
    named = {
        "data_path": config.data_path,
        "sd_version": config.sd_version,
        "model_key": config.model_key,
        "steps": config.n_inversion_steps,
        "save_steps": config.n_timesteps,
        "n_frames": config.n_frames,
        "save_dir": config.latents_path,
    }
    features = {
        option: getattr(config, key)
        for key, option in FEATURE_OPTIONS.items()
        if getattr(config, key, default(option)) != default(option)
    }
    return preprocess_command(**{**named, **settings, **features})


def _source(config: EditConfig) -> Path | None:
    """The clip, where it still is."""
    try:
        return resolve_clip(config.data_path)
    except MissingFileError:
        return None


def _check_source(config: EditConfig, cache: SourceCache, remake: str) -> None:
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
    source = _source(config)
    if source is None:
        log.warning(
            "data_path: %s is not there to compare; using the frames of %s",
            config.data_path,
            cache.folder,
        )
        return
    if source_sha256(source) != manifest.source_sha256:
        raise UserError(
            f"{cache.folder}: made from another clip of the same name ({manifest.source_name}) "
            f"than {source}; {remake}"
        )
