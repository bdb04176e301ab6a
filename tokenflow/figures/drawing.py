"""Draws pictures in rows and columns, flow fields and keyframes with matplotlib; knows no model.

Figures are readable when printed in grey: brightness, arrows or text say what a colour says.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torchvision.utils import flow_to_image

from util import atomic_file

DPI = 100
PANEL = 2.56  # inches that a panel is wide
TEXT = 0.25  # inches of a line of text
CELL = 0.18  # inches that a frame and step of a keyframe figure is wide, at most
ARROWS = 20  # along the longer side of a field, at most


def picture_grid(
    pictures: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    width: float = PANEL,
    caption_lines: int = 0,
) -> Figure:
    """Pictures in rows and columns; their axes are `figure.axes`, row by row.

    Args:
        pictures: (H, W, 3) uint8; those of a row have one height, all have one width.
        rows: labels to the left of the rows, if any.
        columns: headings over the columns, if any.
        width: inches that a picture is wide.
        caption_lines: to leave room for above each picture.
    """
    heights = [width * len(line[0]) / line[0].shape[1] for line in pictures]
    text = TEXT * (2 + title.count("\n") + bool(columns) + caption_lines * len(pictures))
    size = width * (len(pictures[0]) + bool(rows) * 0.6), sum(heights) + text
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(
        len(pictures), len(pictures[0]), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, images in zip(axes, pictures, strict=True):
        for axis, image in zip(line, images, strict=True):
            show(axis, image)
    for axis, label in zip(axes[0], columns, strict=False):
        axis.set_title(label, fontsize="medium", parse_math=False)  # names may hold a "$"
    for axis, label in zip(axes[:, 0], rows, strict=False):
        axis.set_ylabel(label, rotation="horizontal", ha="right", va="center", parse_math=False)
    figure.suptitle(title, fontsize="medium", parse_math=False)
    return figure


def show(axis: Axes, image: np.ndarray, caption: str = "") -> None:
    """Show an (H, W, 3) uint8 picture in an axis, in place of what was there."""
    axis.clear()
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    axis.set_title(caption, fontsize="medium")


def xt_slice(frames: np.ndarray, row: int, least: int = 160) -> np.ndarray:
    """One image row over time, (>= least, W, 3): x to the right, time down.

    Rows are repeated, so that a few frames are seen too.
    """
    return frames[:, row].repeat(max(1, -(-least // len(frames))), axis=0)


# ---------------------------------------------------------------------------------------------
# Flow fields


def longest_shown(field: np.ndarray, size: tuple[int, int]) -> float:
    """The displacement of full colour: twice the median, at least a cell, at most the largest.

    The largest alone would do worse: in flat regions any token is like any other, and some find
    theirs far off, which would fade all true motion.

    Args:
        field: (h, w, 2), right and down, in pixels.
        size: (H, W) of the frames.
    """
    lengths = np.hypot(field[..., 0], field[..., 1])
    cell = size[0] / field.shape[0], size[1] / field.shape[1]
    return float(min(lengths.max(), max(2 * np.median(lengths), *cell)))


def field_colours(field: np.ndarray, longest: float) -> np.ndarray:
    """Displacements (h, w, 2) as colours, (h, w, 3) uint8: hue is the direction, white is none.

    Those of `longest` and more have full colour.
    """
    # flow_to_image divides by the longest displacement: one more column holds it.
    column = np.full((len(field), 1, 2), [longest, 0.0])
    flow = np.concatenate([_clipped(field, longest), column], axis=1).astype(np.float32)
    image = flow_to_image(torch.from_numpy(flow).permute(2, 0, 1))
    return image.permute(1, 2, 0).numpy()[:, :-1]


def _clipped(field: np.ndarray, longest: float) -> np.ndarray:
    """A field whose displacements are at most so long."""
    lengths = np.hypot(field[..., 0], field[..., 1])
    return field * np.minimum(1, longest / np.maximum(lengths, 1e-12))[..., None]


def draw_field(axis: Axes, field: np.ndarray, longest: float, caption: str) -> None:
    """Show a field in colour, with arrows that are as long as they are apart at `longest`."""
    show(axis, field_colours(field, longest), caption)
    every = -(-max(field.shape[:2]) // ARROWS)
    y, x = np.mgrid[every // 2 : len(field) : every, every // 2 : field.shape[1] : every]
    arrows = _clipped(field, longest)[y, x] * (every / max(longest, 1e-12))
    axis.quiver(x, y, arrows[..., 0], arrows[..., 1], angles="xy", scale_units="xy", scale=1)


def draw_lengths(axis: Axes, field: np.ndarray, longest: float, caption: str) -> None:
    """Show the length of each displacement in grey: white is 0, black is `longest`."""
    show(axis, np.zeros((*field.shape[:2], 3), np.uint8), caption)
    lengths = np.hypot(field[..., 0], field[..., 1])
    axis.imshow(lengths, cmap="Greys", vmin=0, vmax=max(longest, 1e-12), interpolation="nearest")


def draw_wheel(axis: Axes, side: int, caption: str) -> None:
    """Show the legend of `field_colours`: a colour's place in the disc is its direction."""
    ramp = np.linspace(-1, 1, side)
    field = np.stack(np.meshgrid(ramp, ramp), axis=-1)  # (side, side, 2)
    wheel = field_colours(field, 1.0)
    wheel[np.hypot(field[..., 0], field[..., 1]) > 1] = 255
    show(axis, wheel, caption)


# ---------------------------------------------------------------------------------------------
# Keyframes


def keyframe_figure(chosen: np.ndarray, first_step: int, interval: int, title: str) -> Figure:
    """The keyframes of every step: a grid, steps down, frames to the right, black where chosen.

    Args:
        chosen: (steps, n) bool.
        first_step: the number of the first row's step.
        interval: frames between two lines.
    """
    steps, n = chosen.shape
    cell = min(CELL, 16 / max(steps, n))
    figure = Figure((max(6.5, n * cell + 0.8), steps * cell + 1.2), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    box = (-0.5, n - 0.5, first_step + steps - 0.5, first_step - 0.5)
    axis.imshow(chosen, cmap="Greys", vmin=0, vmax=1, extent=box, interpolation="nearest")
    axis.vlines(np.arange(0, n, interval) - 0.5, box[3], box[2], color="tab:blue", linewidth=1)
    axis.set(xlabel="frame", ylabel="step")
    for along in (axis.xaxis, axis.yaxis):
        along.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(title, fontsize="medium")
    return figure


# ---------------------------------------------------------------------------------------------
# Files


def png(figure: Figure) -> bytes:
    """The PNG file of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as PNG; returns the path."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(png(figure))
    return path


def video_frames(figure: Figure, update: Callable[[int], None], n: int) -> Iterator[np.ndarray]:
    """A figure over time: (H, W, 3) uint8 frames of one size, with even sides.

    Args:
        update: changes the figure to moment i; the layout stays that of moment 0.
    """
    canvas = FigureCanvasAgg(figure)
    for i in range(n):
        update(i)
        canvas.draw()
        if i == 0:
            figure.set_layout_engine("none")
        frame = np.asarray(canvas.buffer_rgba())[..., :3]
        yield frame[: len(frame) // 2 * 2, : frame.shape[1] // 2 * 2].copy()
