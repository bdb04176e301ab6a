"""Inverts a clip with DDIM and writes the source cache that every edit of it reads.

python preprocess.py --data_path clip.mp4 --inversion_prompt "a woman running"
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import (
    DEPTH_ESTIMATOR,
    MODELS,
    check_controlnet_fits,
    checkpoint_folder,
    checkpoint_revision,
    controlnet_key_for,
    load_unet_skeleton,
    model_key_for,
    single_model_folder,
)
from conditions import ControlSettings, estimate_depth
from diffusion import (
    Denoiser,
    NoiseSchedule,
    decode_latents,
    encode_frames,
    load_stable_diffusion,
    make_denoiser,
    psnr,
    resolve_device,
    resolve_dtype,
)
from inversion import InversionTimesteps, inversion_timesteps, invert, reconstruct
from run_info import Stopwatch, versions
from source_cache import (
    CLEAN_LATENTS,
    MANIFEST,
    Manifest,
    cache_folder,
    describe_difference,
    finish_cache,
    identity,
    open_cache,
    save_latents,
    save_source,
)
from util import (
    ArgumentParser,
    UserError,
    check_writable,
    command_line,
    replacing_folder,
    setup_logging,
)
from video import (
    MAX_FPS,
    MAX_FPS_DENOMINATOR,
    Clip,
    clip_name,
    read_clip,
    resolve_clip,
    save_video,
    source_sha256,
)

log = logging.getLogger("tokenflow")

# A reconstruction this far below the VAE's own makes visibly worse edits.
WARN_GAP_DB = 3.0
_CONTROL_DEFAULTS = {
    "control": "canny",
    "controlnet_key": None,
    "controlnet_scale": 1.0,
    "canny_low": 100,
    "canny_high": 200,
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line.

    Raises:
        UserError: if an option is unknown, mistyped or out of range.
    """
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True, help="video, GIF or folder of images")
    add("--save_dir", default="latents", help="where caches go (default: latents)")
    add("--frame_start", type=int, default=0, help="first frame to use (default: 0)")
    add("--frame_stride", type=int, default=1, help="use every N-th frame (default: 1)")
    add("--n_frames", type=int, default=40, help="frames to use, at most (default: 40)")
    add("--H", type=int, help="height; multiple of 8 (default: 512 square, 384 or 672 otherwise)")
    add("--W", type=int, help="width; multiple of 8 (default: 512 square, 672 or 384 otherwise)")
    add("--fit", choices=("stretch", "crop"), default="stretch", help="how frames take that size")
    add(
        "--fps",
        type=_frame_rate,
        help="frame rate (default: the clip's; 24 for images)",
    )
    add("--sd_version", choices=tuple(MODELS), default="2.1", help="model (default: 2.1)")
    add("--model_key", help="hub id or local folder of a checkpoint; wins over --sd_version")
    add("--inversion_prompt", default="", help="what the clip shows (default: empty)")
    add("--steps", type=int, default=500, help="inversion steps (default: 500)")
    add("--save_steps", type=int, default=50, help="sampling steps to save for (default: 50)")
    add("--inversion_iters", type=int, default=1, help="noise evaluations per step (default: 1)")
    add("--recon_steps", type=int, help="steps of the reconstruction (default: save_steps)")
    add("--batch_size", type=int, default=8, help="frames evaluated at once (default: 8)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="auto is float16 on CUDA, float32 elsewhere")  # fmt: skip
    add("--control", choices=("canny", "depth"),
        help="what the ControlNet of --sd_version ControlNet follows (default: canny)")  # fmt: skip
    add("--controlnet_key", help="hub id or local folder of that ControlNet")
    add("--controlnet_scale", type=float, help="its strength (default: 1)")
    add("--canny_low", type=int, help="lower Canny threshold (default: 100)")
    add("--canny_high", type=int, help="upper Canny threshold (default: 200)")
    add("--depth_model", default=DEPTH_ESTIMATOR, help="DPT model (default: Intel/dpt-large)")
    add("--seed", type=int, default=1,
        help="for released command lines; nothing here is random")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a cache made with other settings")
    parser.set_defaults(**_CONTROL_DEFAULTS)
    args = parser.parse_args(argv)
    if args.recon_steps is None:
        args.recon_steps = args.save_steps
    _check_args(args)
    return args


def _frame_rate(text: str) -> Fraction:
    try:
        rate = Fraction(text).limit_denominator(MAX_FPS_DENOMINATOR)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= MAX_FPS:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected a number or a fraction above 0 and at most {MAX_FPS}"
        )
    return rate


def _check_args(args: argparse.Namespace) -> None:
    at_least_one = ("n_frames", "frame_stride", "steps", "save_steps", "inversion_iters",
                    "recon_steps", "batch_size")  # fmt: skip
    for name in at_least_one:
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}, expected a number of at least 1")
    if args.frame_start < 0:
        raise UserError(f"--frame_start: {args.frame_start}, expected 0 or more")
    for name in ("H", "W"):
        size = getattr(args, name)
        if size is not None and (size < 8 or size % 8):
            nearest = max(8, round(size / 8) * 8)
            raise UserError(f"--{name}: {size} is not a multiple of 8; the nearest is {nearest}")
    if (args.H is None) != (args.W is None):
        raise UserError("--H and --W: give both or neither")
    for name in ("save_steps", "recon_steps"):
        if args.steps % getattr(args, name):
            raise UserError(
                f"--{name}: {getattr(args, name)} does not divide --steps {args.steps}; "
                "the timesteps of the one must be among the other's"
            )
    if not 0 <= args.controlnet_scale < math.inf:
        raise UserError(f"--controlnet_scale: {args.controlnet_scale}, expected 0 or more")
    if args.sd_version != "ControlNet":
        for name, default in _CONTROL_DEFAULTS.items():
            if getattr(args, name) != default:
                raise UserError(f"--{name}: goes with --sd_version ControlNet only")
    if not 0 <= args.canny_low <= args.canny_high <= 255:
        raise UserError(
            f"--canny_low {args.canny_low} and --canny_high {args.canny_high}: "
            "expected 0 <= low <= high <= 255"
        )


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessInputs:
    """A checked command line with what it refers to.

    Attributes:
        manifest: the cache's, but for the figures of its making.
        folder: the cache's.
    """

    clip: Clip
    checkpoint: Path
    timesteps: InversionTimesteps
    device: torch.device
    dtype: torch.dtype
    manifest: Manifest
    folder: Path


def open_inputs(args: argparse.Namespace) -> PreprocessInputs:
    """Reads the clip, and checks all that can go wrong before a model is loaded.

    Raises:
        UserError: naming what is missing or does not fit, and what mends it.
    """
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    source = resolve_clip(args.data_path)
    clip = read_clip(
        source,
        args.n_frames,
        start=args.frame_start,
        stride=args.frame_stride,
        size=(args.H, args.W) if args.H else None,
        fit=args.fit,
        fps=args.fps,
    )
    checkpoint = checkpoint_folder(model_key_for(args.sd_version, args.model_key))
    schedule = NoiseSchedule.of_checkpoint(checkpoint)
    timesteps = inversion_timesteps(schedule, args.steps, args.save_steps, args.recon_steps)
    control, depth_model = _conditions(args, checkpoint)
    n_frames, height, width, _ = clip.frames.shape
    manifest = Manifest(
        clip=clip_name(source),
        source_name=source.name,
        source_sha256=source_sha256(source),
        frame_start=args.frame_start,
        frame_stride=args.frame_stride,
        n_frames=n_frames,
        frames_asked=args.n_frames,
        height=height,
        width=width,
        fit=args.fit,
        fps=str(clip.fps),
        sd_version=args.sd_version,
        model_key=model_key_for(args.sd_version, args.model_key),
        model_revision=checkpoint_revision(checkpoint),
        inversion_prompt=args.inversion_prompt,
        steps=args.steps,
        save_steps=args.save_steps,
        inversion_iters=args.inversion_iters,
        recon_steps=args.recon_steps,
        timesteps=timesteps.saved,
        dtype=str(dtype).removeprefix("torch."),
        control=control,
        depth_model=depth_model,
    )
    folder = cache_folder(args.save_dir, args.sd_version, manifest.clip, args.steps, n_frames)
    check_writable(folder, "--save_dir")
    return PreprocessInputs(clip, checkpoint, timesteps, device, dtype, manifest, folder)


def _conditions(
    args: argparse.Namespace, checkpoint: Path
) -> tuple[ControlSettings | None, str | None]:
    """The inversion's ControlNet (with --sd_version ControlNet) and depth estimator, if any."""
    in_channels = load_unet_skeleton(checkpoint).config.in_channels
    if in_channels not in (4, 5):
        raise UserError(
            f"{checkpoint}: its UNet takes {in_channels} channels, expected 4, or 5 with depth; an "
            "inpainting or upscaling checkpoint cannot be inverted"
        )
    control = None
    if args.sd_version == "ControlNet":
        key = controlnet_key_for(args.sd_version, args.control, args.controlnet_key)
        check_controlnet_fits(checkpoint, key)
        control = ControlSettings(
            args.control, key, args.controlnet_scale, args.canny_low, args.canny_high
        )
    if in_channels == 5 or (control is not None and control.kind == "depth"):
        single_model_folder(args.depth_model, "depth_model")
        return control, args.depth_model
    return control, None


def is_made(inputs: PreprocessInputs) -> bool:
    """Whether the cache is there already, made with the same settings.

    Raises:
        UserError: if it is there, made with others (named) or damaged.
    """
    if not (inputs.folder / MANIFEST).is_file():
        return False
    found = open_cache(inputs.folder).manifest
    difference = describe_difference(identity(found), identity(inputs.manifest))
    if difference:
        raise UserError(
            f"{inputs.folder}: made with other settings ({difference}); add --overwrite"
        )
    return True


def make_cache(inputs: PreprocessInputs, batch_size: int) -> Manifest:
    """Inverts the clip and writes its cache, the manifest last.

    Args:
        batch_size: frames evaluated at once.

    Returns:
        the manifest with the figures of the reconstruction.
    """
    clip, manifest = inputs.clip, inputs.manifest
    watch = Stopwatch(inputs.device)
    with watch("load"):
        models = load_stable_diffusion(inputs.checkpoint, inputs.device, inputs.dtype)
    depth = None
    if manifest.depth_model is not None:
        with watch("depth"):
            depth = estimate_depth(clip.frames, manifest.depth_model, inputs.device, batch_size)
    denoiser = make_denoiser(
        models, clip.frames, manifest.inversion_prompt, manifest.control, depth
    )

    with replacing_folder(inputs.folder) as partial:
        return _fill_cache(partial, inputs, denoiser, depth, batch_size, watch)


def _fill_cache(
    folder: Path,
    inputs: PreprocessInputs,
    denoiser: Denoiser,
    depth: Tensor | None,
    batch_size: int,
    watch: Stopwatch,
) -> Manifest:
    clip, timesteps, models = inputs.clip, inputs.timesteps, denoiser.models
    save_source(folder, clip.frames, inputs.manifest.inversion_prompt, depth)
    with watch("vae"):
        clean = encode_frames(models, clip.frames, batch_size)
        vae_psnr = psnr(decode_latents(models, clean, batch_size), clip.frames)
    save_latents(folder, CLEAN_LATENTS, clean)
    with watch("inversion"):
        keep = {*timesteps.saved, timesteps.reconstruction[0]}
        iterations = inputs.manifest.inversion_iters
        inverted = invert(denoiser, clean, timesteps.inversion, iterations, batch_size, keep)
    for t in timesteps.saved:
        save_latents(folder, t, inverted[t])
    with watch("reconstruction"):
        start = inverted[timesteps.reconstruction[0]]
        latents = reconstruct(denoiser, start, timesteps.reconstruction, batch_size)
        frames = decode_latents(models, latents, batch_size)
    save_video(folder / "inverted.mp4", frames, clip.fps)
    return finish_cache(
        folder,
        inputs.manifest,
        psnr=round(psnr(frames, clip.frames), 3),
        vae_psnr=round(vae_psnr, 3),
        seconds=watch.seconds,
        versions=versions(),
    )


def preprocess(args: argparse.Namespace) -> Path:
    """Makes the cache of one clip, or finds it made.

    Returns:
        the cache's folder.

    Raises:
        UserError: see `parse_args`, `open_inputs` and `is_made`.
    """
    inputs = open_inputs(args)
    if not args.overwrite and is_made(inputs):
        log.info("%s is there already, made with these settings", inputs.folder)
    else:
        report_reconstruction(make_cache(inputs, args.batch_size))
    return inputs.folder


def report_reconstruction(manifest: Manifest) -> None:
    """Says how good the inversion is, and what to do where it is not."""
    log.info(
        "reconstruction: %.2f dB PSNR; the VAE alone, which a good inversion reaches: %.2f dB",
        manifest.psnr,
        manifest.vae_psnr,
    )
    gap = manifest.vae_psnr - manifest.psnr
    if gap > WARN_GAP_DB:
        log.warning(
            "the reconstruction is %.1f dB below the VAE's: edits will be worse for it; try "
            "--inversion_iters %d, or an --inversion_prompt that says what the clip shows",
            gap,
            manifest.inversion_iters + 2,
        )


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns the cache's folder."""
    setup_logging()
    folder = preprocess(parse_args(argv))
    print(f"cache: {folder}")
    return folder


if __name__ == "__main__":
    command_line(main)
