"""The command line of preprocess.py: its options, their defaults and the rules between them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction

from tokenflow.diffusion.checkpoints import DEPTH_ESTIMATOR, MODELS
from tokenflow.storage.video import check_size, frame_rate
from util import MAX_COUNT, MAX_SEED, ArgumentParser, UserError

DEFAULTS = {"steps": 500, "save_steps": 50, "inversion_iters": 1, "inversion_tol": 0.0}
# The cheapest that reconstructs 5 dB better than 500 plain steps sampled with 500: see
# docs/performance.md. Most steps end after their first evaluation, a few take all three.
FAST = {"steps": 50, "save_steps": 50, "inversion_iters": 3, "inversion_tol": 1e-3}
# What the cached features are made for, if nothing else is said: the defaults of edits.
FEATURE_DEFAULTS = {"interval": 8, "keyframe_seed": 1, "pnp_attn_t": 0.5, "pnp_f_t": 0.8}
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
    parser = ArgumentParser(
        description="Inverts a clip with DDIM and writes the cache that every edit of it reads."
    )
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
    add("--allow_pickle", action="store_true",
        help="also load models whose weights are pickled only")  # fmt: skip
    add("--inversion_prompt", default="", help="what the clip shows (default: empty)")
    add("--steps", type=int, help="inversion steps (default: 500)")
    add("--save_steps", type=int, help="sampling steps to save for (default: 50)")
    add("--inversion_iters", type=int,
        help="noise evaluations per step, at most (default: 1)")  # fmt: skip
    add("--inversion_tol", type=float,
        help="a frame's step ends at a residual below this share of its latents (default: 0, "
        "which makes every evaluation; else 0.001 is a good one)")  # fmt: skip
    add("--fast", action="store_true",
        help=f"a tenth of the work and a better reconstruction: {_spelled(FAST)}; "
        "giving one of these too is an error")  # fmt: skip
    add("--recon_steps", type=int, help="steps of the reconstruction (default: save_steps)")
    add("--batch_size", type=_batch_size, metavar="auto|N",
        help="frames evaluated at once; auto: what the GPU's memory holds, 8 on the CPU (default: "
        "auto)")  # fmt: skip
    add("--cache_features", action="store_true", default=True,
        help="also run the source pass of edits and save what it finds (the default)")  # fmt: skip
    add("--no_cache_features", action="store_false", dest="cache_features",
        help="leave that to the edits")  # fmt: skip
    add("--interval", type=int,
        help="frames per keyframe: batch_size of the edits that they serve (default: "
        "8)")  # fmt: skip
    add("--keyframe_seed", type=int, help="of those edits' keyframes (default: 1)")
    add("--pnp_attn_t", type=float,
        help="the most that those edits may set pnp_attn_t to (default: 0.5)")  # fmt: skip
    add("--pnp_f_t", type=float,
        help="the most that those edits may set pnp_f_t to (default: 0.8)")  # fmt: skip
    add("--save_tokens", choices=("keyframes", "all"), default="keyframes",
        help="all: the tokens of every frame, layer and step too, to look at (default: "
        "keyframes)")  # fmt: skip
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
    add(
        "--verify",
        action="store_true",
        help="compare the checksums of all files of a cache that is there",
    )
    parser.set_defaults(**_CONTROL_DEFAULTS, **FEATURE_DEFAULTS)
    args = parser.parse_args(argv)
    _fill_in_settings(args)
    if args.recon_steps is None:
        args.recon_steps = args.save_steps
    _check_args(args)
    return args


def arguments(options: dict[str, object]) -> list[str]:
    """Spells options as a command line; None leaves one out, "" makes it a flag without a value."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        if str(value).startswith("-"):  # as a word of its own it would be taken for an option
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)] if value != "" else [f"--{name}"]
    return words


def _frame_rate(text: str) -> Fraction:
    try:
        return frame_rate(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _batch_size(text: str) -> int | None:
    """None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > len(str(MAX_COUNT)) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected auto or a number of at least 1")
    return int(text)


def _spelled(settings: dict[str, object]) -> str:
    return " ".join(f"--{name} {value:g}" for name, value in settings.items())


def _fill_in_settings(args: argparse.Namespace) -> None:
    """Gives the inversion's settings that were left open the preset's values, or the defaults."""
    for name, value in (FAST if args.fast else DEFAULTS).items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif args.fast:
            raise UserError(
                f"--fast and --{name} {given:g}: --fast sets --{name} {value:g}; leave one of them "
                f"out (--fast stands for {_spelled(FAST)})"
            )


def _check_args(args: argparse.Namespace) -> None:
    at_least_one = ("n_frames", "frame_stride", "steps", "save_steps", "inversion_iters",
                    "recon_steps", "interval")  # fmt: skip
    for name in at_least_one:
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}, expected a number of at least 1")
    for name in (*at_least_one, "frame_start"):
        if getattr(args, name) > MAX_COUNT:
            raise UserError(f"--{name}: {getattr(args, name)}, expected at most {MAX_COUNT}")
    if not 0 <= args.inversion_tol < 1:
        raise UserError(f"--inversion_tol: {args.inversion_tol}, expected 0 or more and below 1")
    if args.keyframe_seed < 0:
        raise UserError(f"--keyframe_seed: {args.keyframe_seed}, expected 0 or more")
    if args.keyframe_seed > MAX_SEED:
        raise UserError(f"--keyframe_seed: {args.keyframe_seed}, expected at most {MAX_SEED}")
    for name in ("pnp_attn_t", "pnp_f_t"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name}: {getattr(args, name)}, expected a number from 0 to 1")
    if args.frame_start < 0:
        raise UserError(f"--frame_start: {args.frame_start}, expected 0 or more")
    for name in ("H", "W"):
        size = getattr(args, name)
        if size is not None and (size < 8 or size % 8):
            nearest = max(8, (size + 4) // 8 * 8)
            raise UserError(f"--{name}: {size} is not a multiple of 8; the nearest is {nearest}")
    if (args.H is None) != (args.W is None):
        raise UserError("--H and --W: give both or neither")
    if args.H is not None:
        check_size(args.H, args.W)
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
