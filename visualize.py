"""Draws what an edit is made from: the paper's Figures 2 and 3, and the keyframes of each step.

python visualize.py features --result RESULT --per_frame RESULT --out figures
python visualize.py correspondence --result RESULT --frame 5 --keyframe 2 --out figures
python visualize.py keyframes --result RESULT --out figures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from run_tokenflow_controlnet import ControlNetConfig
from run_tokenflow_pnp import PnPConfig
from run_tokenflow_sdedit import SDEditConfig, steps_from
from tokenflow.cache.source_cache import SourceCache, open_cache
from tokenflow.diffusion.inversion import reconstruct
from tokenflow.diffusion.vae import decode_latents, psnr
from tokenflow.editing.config import EditConfig
from tokenflow.editing.loop import keyframes_of_steps
from tokenflow.editing.results import TECHNIQUES, Result, read_result
from tokenflow.figures.drawing import (
    captioned,
    displacements,
    distance_picture,
    even,
    feature_colours,
    field_picture,
    flow_wheel,
    keyframe_picture,
    longest_shown,
    save_picture,
    shrunk,
    stretched,
    table,
    token_grid,
    warp_by_cells,
    xt_slice,
)
from tokenflow.figures.features import (
    LAYER,
    View,
    edit_tokens,
    open_view,
    rebuilt_from_keyframe,
    source_denoiser,
    source_tokens,
)
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.storage.schema import load_config
from tokenflow.storage.video import load_frames, save_video
from util import (
    ArgumentParser,
    UserError,
    check_writable,
    command_line,
    setup_logging,
)

CONFIGS = {"pnp": PnPConfig, "sdedit": SDEditConfig, "controlnet": ControlNetConfig}

# ---------------------------------------------------------------------------------------------
# The figures


@dataclass(frozen=True)
class Row:
    """One video of a figure, (n, H, W, 3) uint8, with its features in colour, of that size."""

    label: str
    frames: np.ndarray
    features: np.ndarray


def draw_features(args: argparse.Namespace) -> list[Path]:
    """Figure 2: frames, features and x-t slices of the source and of edits of it.

    Returns:
        the files: features.png, features_xt.png, features.mp4.
    """
    edits = [read_result(folder) for folder in (args.per_frame, args.result) if folder]
    cache = edits[-1].cache()
    for other in edits[:-1]:
        _check_same_clip(other, cache)
    n_frames = _frames_to_draw(args.n_frames, edits)
    height, size = cache.manifest.height, (cache.manifest.height, cache.manifest.width)
    y = height // 2 if args.row is None else args.row
    if not 0 <= y < height:
        raise UserError(f"--row: {y}, expected 0 to {height - 1}: frames are {height} high")
    if args.columns < 1:
        raise UserError(f"--columns: {args.columns}, expected a number of at least 1")
    videos = [cache.frames(n_frames), *(_edited_frames(edit, n_frames, size) for edit in edits)]
    view = open_view(args, cache)
    check_writable(args.out, "--out")

    rows, title = _feature_rows(view, edits, videos)
    picks = np.linspace(0, n_frames - 1, min(args.columns, n_frames)).round().astype(int)
    video = args.out / "features.mp4"
    save_video(video, (_moment(rows, i) for i in range(n_frames)), cache.fps)
    return [
        save_picture(args.out / "features.png", _frames_and_features(rows, picks, title)),
        save_picture(args.out / "features_xt.png", _slices(rows, y, title)),
        video,
    ]


def _feature_rows(
    view: View, edits: Sequence[Result], videos: Sequence[np.ndarray]
) -> tuple[list[Row], str]:
    """The source's and the edits' frames with their features; and what these are."""
    models = view.load()
    tokens = [source_tokens(view, models, range(len(videos[0])))]
    for edit, frames in zip(edits, videos[1:], strict=True):
        tokens.append(edit_tokens(view, models, frames, edit.prompt or ""))
    size = height, width = videos[0].shape[1:3]
    grid = token_grid((height // models.vae_factor, width // models.vae_factor), tokens[0].shape[1])
    colours, explained = feature_colours(tokens, grid, size)
    labels = ["source", *(edit.method.replace(", ", "\n", 1) for edit in edits)]
    rows = [Row(*row) for row in zip(labels, videos, colours, strict=True)]
    return rows, (
        f"PCA of {view.describe(grid)}\n"
        f"3 components with {explained:.0%} of the variance, one basis for all"
    )


def _frames_and_features(rows: Sequence[Row], picks: np.ndarray, title: str) -> np.ndarray:
    """Frames over time and, below them, their features."""
    return table(
        [[*map(shrunk, shown[picks])] for row in rows for shown in (row.frames, row.features)],
        [text for row in rows for text in (row.label, f"{row.label}\nfeatures")],
        [f"frame {i}" for i in picks],
        title,
    )


def _slices(rows: Sequence[Row], y: int, title: str) -> np.ndarray:
    """One image row over time, of frames and of features."""
    n_frames, height = rows[0].frames.shape[:2]
    return table(
        [[stretched(xt_slice(shown, y)) for shown in (row.frames, row.features)] for row in rows],
        [row.label for row in rows],
        ["RGB", "features"],
        f"x-t slices: image row {y} of {height}; time runs down, {n_frames} frames\n{title}",
    )


def _moment(rows: Sequence[Row], frame: int) -> np.ndarray:
    """One frame of the video: the videos side by side, their features below them."""
    return even(
        table(
            [[row.frames[frame] for row in rows], [row.features[frame] for row in rows]],
            ["RGB", "features"],
            [row.label.replace("\n", " ") for row in rows],
            f"frame {frame}",
        )
    )


def _frames_to_draw(n_frames: int | None, edits: Sequence[Result]) -> int:
    if n_frames is not None and n_frames < 1:
        raise UserError(f"--n_frames: {n_frames}, expected a number of at least 1")
    lengths = {edit.n_frames for edit in edits}
    if n_frames is None and len(lengths) > 1:
        raise UserError(
            f"{edits[0].folder} has {edits[0].n_frames} frames, {edits[1].folder} "
            f"{edits[1].n_frames}; choose a common part: --n_frames {min(lengths)}"
        )
    if n_frames is not None and n_frames > min(lengths):
        raise UserError(f"--n_frames: {n_frames}, but there are only {min(lengths)} frames")
    return n_frames or min(lengths)


def _check_same_clip(edit: Result, cache: SourceCache) -> None:
    """Refuses a result of other frames; it may be of another cache of the same ones."""
    other, mine = edit.cache().manifest, cache.manifest
    for key in ("source_sha256", "frame_start", "frame_stride", "height", "width", "fit"):
        if getattr(other, key) != getattr(mine, key):
            raise UserError(
                f"{edit.folder}: a result of another clip ({other.source_name}: {key} "
                f"{getattr(other, key)}) than {cache.folder} ({mine.source_name}: {key} "
                f"{getattr(mine, key)})"
            )


def _edited_frames(edit: Result, n_frames: int, size: tuple[int, int]) -> np.ndarray:
    frames = load_frames(edit.folder / "frames", n_frames)
    if frames.shape[1:3] != size:
        raise UserError(
            f"{edit.folder}: its frames are of {frames.shape[1]} x {frames.shape[2]}, the source's "
            f"of {size[0]} x {size[1]}"
        )
    return frames


# ---------------------------------------------------------------------------------------------


def draw_correspondence(args: argparse.Namespace) -> list[Path]:
    """Figure 3: a frame rebuilt from another one's pixels, and from its tokens.

    Returns:
        the file: correspondence.png.
    """
    if args.result is not None:
        result = read_result(args.result)
        cache, n_frames = result.cache(), result.n_frames
    else:
        cache = open_cache(args.cache)
        n_frames = cache.manifest.n_frames
    chosen = [args.frame, args.keyframe]
    for name, number in zip(("frame", "keyframe"), chosen, strict=True):
        if not 0 <= number < n_frames:
            raise UserError(f"--{name}: {number}, expected 0 to {n_frames - 1}")
    view = open_view(args, cache)
    check_writable(args.out, "--out")

    models = view.load()
    frame, keyframe = cache.frames(max(chosen) + 1)[chosen]
    size = frame.shape[:2]
    tokens = source_tokens(view, models, chosen)
    grid = token_grid(tuple(n // models.vae_factor for n in size), tokens.shape[1])
    match = nearest_tokens(tokens[:1], tokens[1:], torch.zeros(1, 1, dtype=torch.long))[0, 0]
    field = displacements(match.numpy(), grid, size)

    denoiser = source_denoiser(view, models, chosen)
    start = cache.latents(view.sampling[0], max(chosen) + 1)[chosen]
    latents = torch.cat([
        reconstruct(denoiser, start, view.sampling, batch_size=1)[:1],
        rebuilt_from_keyframe(denoiser, start, view.sampling),
    ])  # fmt: skip
    own, swapped = decode_latents(models, latents)

    rebuilt = {
        f"keyframe {args.keyframe}": keyframe,
        "own reconstruction": own,
        "(a) keyframe's pixels": warp_by_cells(keyframe, field),
        "(c) keyframe's tokens": swapped,
    }
    print(f"PSNR to frame {args.frame}:")
    panels = [captioned(frame, f"frame {args.frame},\nto be rebuilt")]
    for name, picture in rebuilt.items():
        score = decibels(psnr(picture, frame))
        print(f"    {name:24}{score:>9}")
        panels.append(captioned(picture, f"{name}\nPSNR: {score}"))
    target, as_it_is, own, warped, swapped = panels
    title = (
        f"Frame {args.frame} rebuilt from keyframe {args.keyframe}\n"
        f"(a), (b): by {view.describe(grid)}; (c): all layers, all {len(view.sampling)} steps"
    )
    fields = _field_panels(field, size, f"frame {args.frame}", f"keyframe {args.keyframe}")
    picture = table([[target, as_it_is, own, swapped], [warped, *fields]], title=title)
    return [save_picture(args.out / "correspondence.png", picture)]


def _field_panels(
    field: np.ndarray, size: tuple[int, int], frame: str, keyframe: str
) -> list[np.ndarray]:
    """A field as colours with arrows, its lengths in grey, and the colours' legend."""
    longest = longest_shown(field, size)
    limit = f"{longest:.0f} px or more"
    return [
        captioned(
            field_picture(field, size, longest),
            f"(b) where cells of {frame}\nlie in {keyframe}",
        ),
        captioned(distance_picture(field, size, longest), f"(b) how far: white 0,\nblack {limit}"),
        captioned(flow_wheel(min(size)), f"(b) colours of directions,\nrim: {limit}"),
    ]


def decibels(score: float) -> str:
    """A PSNR as text; pictures that do not differ have none."""
    return "identical" if score > 100 else f"{score:.2f} dB"


# ---------------------------------------------------------------------------------------------


def draw_keyframes(args: argparse.Namespace) -> list[Path]:
    """The keyframes of each step of a result.

    Returns:
        the file: keyframes.png.
    """
    result = read_result(args.result)
    technique = result.run.get("technique")
    if technique not in CONFIGS:
        raise UserError(f"{args.result}: a result of {technique}, which has no keyframes")
    config = load_config(CONFIGS[technique], args.result / "config.yaml")
    if config.consistency != "tokenflow":
        raise UserError(
            f"{args.result}: made with consistency: {config.consistency}, which has no keyframes; "
            "expected a result of consistency: tokenflow"
        )
    check_writable(args.out, "--out")
    chosen, first_step = chosen_keyframes(config, result.n_frames)
    name, last_step = TECHNIQUES[technique], config.n_timesteps
    picture = keyframe_picture(
        chosen,
        first_step,
        config.batch_size,
        f"{name}: {config.keyframes} keyframes (black) of steps {first_step} to {last_step}",
        f"one in each interval of {config.batch_size} frames (dark lines); seed "
        f"{config.keyframe_seed}; the noisiest step is at the top",
    )
    return [save_picture(args.out / "keyframes.png", table([[picture]]))]


def chosen_keyframes(config: EditConfig, n_frames: int) -> tuple[np.ndarray, int]:
    """Which frames are keyframes at the steps that an edit takes.

    Returns:
        (steps, n) bool; and the number of the first of these steps in the schedule, from 1.
        SDEdit takes the schedule's last steps.
    """
    taken = list(range(config.n_timesteps))
    if isinstance(config, SDEditConfig):
        taken = steps_from(taken, config.start, config.propagation)
    keyframes = keyframes_of_steps(config, n_frames, len(taken))
    chosen = torch.zeros(len(taken), n_frames, dtype=torch.bool).scatter_(1, keyframes, True)
    return chosen.numpy(), taken[0] + 1


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; `draw` is the command's function.

    Raises:
        UserError: if an option is unknown, missing or mistyped.
    """
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    features = commands.add_parser("features", help="Figure 2: features of source and edits")
    features.set_defaults(draw=draw_features)
    add = features.add_argument
    add("--result", type=Path, required=True, help="the edit's folder")
    add("--per_frame", type=Path, help="of another edit, to compare: consistency: none")
    add("--row", type=int, help="image row of the x-t slices (default: the middle)")
    add("--n_frames", type=int, help="of these first (default: all)")
    add("--columns", type=int, default=6, help="frames that features.png shows (default: 6)")

    field = commands.add_parser("correspondence", help="Figure 3: a frame rebuilt from another")
    field.set_defaults(draw=draw_correspondence)
    of = field.add_mutually_exclusive_group(required=True)
    of.add_argument("--cache", type=Path, help="the clip's cache, as preprocess.py prints it")
    of.add_argument("--result", type=Path, help="an edit's folder: its cache")
    field.add_argument("--frame", type=int, required=True, help="the frame to rebuild, from 0")
    field.add_argument("--keyframe", type=int, required=True, help="the frame to rebuild it from")

    keyframes = commands.add_parser("keyframes", help="the keyframes of each step")
    keyframes.set_defaults(draw=draw_keyframes)
    keyframes.add_argument("--result", type=Path, required=True, help="the edit's folder")

    for command in (features, field):
        add = command.add_argument
        add("--layer", default=LAYER, help=f"a self-attention layer (default: {LAYER})")
        add("--timestep", type=int, help="of the inversion's (default: the middle of sampling)")
        add("--what", choices=("input", "output"), default="input",
            help="the self-attention's input tokens or its output (default: input)")  # fmt: skip
        add("--model_key", help="the checkpoint, if it is not where the cache says")
        add("--batch_size", type=int, default=8, help="frames evaluated at once (default: 8)")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
        add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
            help="auto is float16 on CUDA, float32 elsewhere")  # fmt: skip
    for command in (features, field, keyframes):
        command.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Runs the script; returns the files that it wrote."""
    setup_logging()
    args = parse_args(argv)
    written = args.draw(args)
    for path in written:
        print(f"wrote {path}")
    return written


if __name__ == "__main__":
    command_line(main)
