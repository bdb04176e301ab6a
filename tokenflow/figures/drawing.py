"""The drawing of visualize.py: arrays in, labelled pictures out; nothing here knows a model.

Pictures are (H, W, 3) uint8 RGB on white paper, and readable when printed in grey: what a colour
says is said by brightness, arrows or text too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util import atomic_file

PAPER, INK = 255, (0, 0, 0)
TEXT_SIZE, TITLE_SIZE = 16, 18  # of letters, in pixels
GAP = 6  # between panels
ARROW_SPACING = 24  # pixels between the arrows of a field, at least
PANEL_SIDE = 256  # of the frames of Figure 2, at most
XT_HEIGHT = 160  # of an x-t slice at least, in pixels, where a clip has few frames
LONGEST_SIDE = 1600  # of a grid of keyframes, in pixels

# ---------------------------------------------------------------------------------------------
# Feature tokens as colours


@dataclass(frozen=True)
class Components:
    """The principal components of tokens.

    Attributes:
        mean: (c,) float64.
        basis: (c, k) float64, orthonormal columns, by descending variance; of each, the entry of
            the largest magnitude is positive.
        explained: (k,) float64, the share of the variance along each.
    """

    mean: Tensor
    basis: Tensor
    explained: Tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Coordinates (..., k) float32 of tokens (..., c)."""
        return torch.cat([
            ((piece.double() - self.mean) @ self.basis).float()
            for piece in tokens.flatten(0, -2).split(1 << 16)
        ]).unflatten(0, tokens.shape[:-1])  # fmt: skip


def principal_components(tokens: Tensor, n_components: int = 3) -> Components:
    """The principal components of (N, c) tokens, from the exact eigenvectors of their covariance.

    Float64 throughout, so that a second run and another machine find the same colours.
    """
    pieces = tokens.split(1 << 16)  # a copy in float64 of all would be large
    mean = sum(piece.double().sum(0) for piece in pieces) / len(tokens)
    covariance = sum((piece.double() - mean).T @ (piece.double() - mean) for piece in pieces)
    covariance /= len(tokens)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    basis = vectors[:, -n_components:].flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))  # (1, k)
    explained = values[-n_components:].flip(0) / values.sum().clamp(min=1e-300)
    return Components(mean, basis * largest.sign(), explained)


def component_colours(coordinates: np.ndarray) -> np.ndarray:
    """Three components as colours, on one scale for all that is given.

    The first component is green, the second red, the third blue: in this order they weigh in a
    colour's brightness, so that a print in grey shows mostly the first.

    Args:
        coordinates: (..., 3) float; the 1st to the 99th percentile of each becomes 0 to 255.

    Returns:
        (..., 3) uint8 RGB.
    """
    flat = coordinates.reshape(-1, 3)
    low, high = np.percentile(flat, [1, 99], axis=0)
    scaled = (coordinates - low) / np.maximum(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)[..., [1, 0, 2]]


def feature_colours(
    tokens: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]
) -> tuple[list[np.ndarray], float]:
    """The three principal components of tokens in colour, in one basis and on one scale for all.

    Args:
        tokens: of each video, (n, L, c).
        grid: (h, w), h * w = L.
        size: (H, W) of the pictures.

    Returns:
        of each video (n, H, W, 3) uint8; and the share of the variance that they show.
    """
    together = torch.stack(list(tokens))  # (videos, n, L, c)
    components = principal_components(together.flatten(0, 2))
    colours = component_colours(components.project(together).numpy())
    cells = colours.reshape(*colours.shape[:2], *grid, 3)
    return [to_pixels(video, size) for video in cells], float(components.explained.sum())


def token_grid(latent_grid: tuple[int, int], n_tokens: int) -> tuple[int, int]:
    """The (h, w) of a layer with this many tokens: the UNet halves the latents' grid, rounding up.

    Raises:
        ValueError: if no such grid has that many.
    """
    h, w = latent_grid
    while h * w > n_tokens and h * w > 1:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != n_tokens:
        raise ValueError(f"{n_tokens} tokens fit no grid of latents of {latent_grid}")
    return h, w


def cells_of_pixels(grid: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The cell that each pixel lies in: rows (H, 1) and columns (1, W) of the grid."""
    y, x = ((np.arange(n) * 2 + 1) * cells // (2 * n) for n, cells in zip(size, grid, strict=True))
    return y[:, None], x[None]


def to_pixels(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells (..., h, w, k) enlarged to (..., H, W, k): a pixel shows the cell that it lies in."""
    y, x = cells_of_pixels(cells.shape[-3:-1], size)
    return cells[..., y, x, :]


def xt_slice(frames: np.ndarray, row: int) -> np.ndarray:
    """One image row over time, (n, W, 3): x to the right, time down."""
    return frames[:, row]


# ---------------------------------------------------------------------------------------------
# Correspondences


def displacements(match: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """How far away the counterpart of each cell lies, (h, w, 2) float: right and down, in pixels.

    Args:
        match: (h * w,) int, the cell of the other frame that each cell corresponds to.
        grid: (h, w).
        size: (H, W) of the frames.
    """
    h, w = grid
    here_y, here_x = np.divmod(np.arange(h * w), w)
    there_y, there_x = np.divmod(match, w)
    moved = np.stack([(there_x - here_x) * (size[1] / w), (there_y - here_y) * (size[0] / h)], -1)
    return moved.reshape(h, w, 2)


def warp_by_cells(other: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A frame rebuilt from the pixels of another at the counterparts of its cells.

    Args:
        other: (H, W, 3), where the pixels are taken from.
        field: (h, w, 2) of `displacements`; a pixel moves as its cell does, to whole pixels, and
            no further than the frame's edge.
    """
    height, width = other.shape[:2]
    moved = np.rint(to_pixels(field, (height, width))).astype(int)
    y = (np.arange(height)[:, None] + moved[..., 1]).clip(0, height - 1)
    x = (np.arange(width) + moved[..., 0]).clip(0, width - 1)
    return other[y, x]


def field_colours(field: np.ndarray, longest: float) -> np.ndarray:
    """Displacements as colours: hue is the direction; paler and brighter is shorter.

    Args:
        field: (h, w, 2), right and down. Right is red, down yellow-green, left cyan, up violet.
        longest: the displacement of full colour; longer ones have it too.

    Returns:
        (h, w, 3) uint8 RGB; white where nothing moves.
    """
    angle = np.arctan2(field[..., 1], field[..., 0]) % (2 * np.pi)
    length = np.minimum(np.hypot(field[..., 0], field[..., 1]) / max(longest, 1e-12), 1.0)
    hsv = np.stack([np.degrees(angle), length, 1.0 - 0.4 * length], axis=-1).astype(np.float32)
    return (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).round().astype(np.uint8)


def longest_shown(field: np.ndarray, size: tuple[int, int]) -> float:
    """The displacement of full colour: twice the median, and no less than a cell's side.

    The largest would do worse: in flat regions any token is like any other, and some of them find
    theirs far off, which would fade all true motion.
    """
    lengths = np.hypot(field[..., 0], field[..., 1])
    cell = size[0] / field.shape[0], size[1] / field.shape[1]
    return float(max(2 * np.median(lengths), *cell))


def flow_wheel(side: int) -> np.ndarray:
    """The legend of `field_colours`: a colour's place, seen from the middle, is its direction."""
    offsets = (np.arange(side) + 0.5 - side / 2) / (side / 2 - 2)
    field = np.stack(np.meshgrid(offsets, offsets), axis=-1)  # (side, side, 2)
    wheel = field_colours(field, 1.0)
    wheel[np.hypot(field[..., 0], field[..., 1]) > 1] = PAPER
    for angle in np.arange(0, 2 * np.pi, np.pi / 4):
        way = np.array([np.cos(angle), np.sin(angle)])
        _arrow(wheel, side / 2 + way * side * 0.28, way * side * 0.16)
    return wheel


def field_picture(field: np.ndarray, size: tuple[int, int], longest: float) -> np.ndarray:
    """A field in colour with arrows, (H, W, 3).

    An arrow is centred on its cell; the longest is as long as arrows are apart, and a dot stays.
    """
    picture = np.ascontiguousarray(to_pixels(field_colours(field, longest), size))
    h, w = field.shape[:2]
    cell = np.array([size[1] / w, size[0] / h])  # width and height of a cell
    every_x, every_y = np.maximum(1, np.ceil(ARROW_SPACING / cell).astype(int))
    apart = min(every_x * cell[0], every_y * cell[1])
    for y in range(every_y // 2, h, every_y):
        for x in range(every_x // 2, w, every_x):
            way = field[y, x] * (apart / max(np.hypot(*field[y, x]), longest, 1e-12))
            _arrow(picture, (np.array([x, y]) + 0.5) * cell - way / 2, way)
    return picture


def _arrow(picture: np.ndarray, start: np.ndarray, way: np.ndarray) -> None:
    """Draws an arrow, or a dot where it has no length, on the picture itself."""
    tail, tip = (tuple(np.rint(point).astype(int).tolist()) for point in (start, start + way))
    if tail == tip:
        cv2.circle(picture, tail, 1, INK, -1, cv2.LINE_AA)
    else:
        head = 5.0 / float(np.hypot(*way))
        cv2.arrowedLine(picture, tail, tip, INK, 1, cv2.LINE_AA, tipLength=min(head, 0.5))


def distance_picture(field: np.ndarray, size: tuple[int, int], longest: float) -> np.ndarray:
    """The length of each displacement in grey, (H, W, 3): white stays, black is `longest`."""
    length = np.hypot(field[..., 0], field[..., 1]) / max(longest, 1e-12)
    grey = (255 * (1 - length.clip(0, 1))).round().astype(np.uint8)
    return to_pixels(np.repeat(grey[..., None], 3, axis=-1), size)


# ---------------------------------------------------------------------------------------------
# Keyframes


def keyframe_cells(chosen: np.ndarray, interval: int, cell: int) -> np.ndarray:
    """A grid of cells: black where chosen, light grey where not, on white lines.

    Args:
        chosen: (steps, n) bool.
        interval: frames between two dark lines.
        cell: side of a cell with its line, in pixels.

    Returns:
        (steps * cell, n * cell, 3).
    """
    grey = np.where(chosen, 0, 225).astype(np.uint8)
    picture = grey.repeat(cell, axis=0).repeat(cell, axis=1)
    picture[::cell] = PAPER
    picture[:, ::cell] = PAPER
    picture[:, :: interval * cell] = 120
    return np.repeat(picture[..., None], 3, axis=-1)


def keyframe_picture(
    chosen: np.ndarray, first_step: int, interval: int, title: str, note: str
) -> np.ndarray:
    """The keyframes of every step: a labelled grid, steps down, frames to the right.

    Args:
        chosen: (steps, n) bool.
        first_step: the number of the first row's step.
        interval: frames per interval; dark lines lie between intervals.
        title, note: above the grid.
    """
    steps, n = chosen.shape
    cell = int(np.clip(LONGEST_SIDE // max(steps, n), 5, 18))
    grid = keyframe_cells(chosen, interval, cell)
    font = _font(TEXT_SIZE)
    left = int(max(font.getlength(str(first_step + steps)), font.getlength("step"))) + 2 * GAP
    top = 2 * TEXT_SIZE + GAP
    right = int(font.getlength(str(n)))
    canvas = np.full((top + len(grid) + GAP, left + grid.shape[1] + right, 3), PAPER, np.uint8)
    canvas[top : top + len(grid), left : left + grid.shape[1]] = grid
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    draw.text((left, 0), "frame", INK, font)
    draw.text((0, TEXT_SIZE), "step", INK, font)
    across = _label_every(cell, font.getlength(str(n - 1)) + GAP)
    for x in range(0, n, across):
        draw.text((left + (x + 0.5) * cell, top - 2), str(x), INK, font, anchor="mb")
    for y in range(0, steps, _label_every(cell, TEXT_SIZE)):
        where = (left - GAP, top + (y + 0.5) * cell)
        draw.text(where, str(first_step + y), INK, font, anchor="rm")
    return above(text_image(title, TITLE_SIZE), text_image(note), np.asarray(image))


def _label_every(cell: int, room: float) -> int:
    """Label every so many cells that a label has room: 1, 2, 5, 10, 20, ..."""
    return next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n * cell >= room)


# ---------------------------------------------------------------------------------------------
# Text and layout


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_image(text: str, size: int = TEXT_SIZE) -> np.ndarray:
    """Text as a picture just as large as it needs; lines are split at newlines."""
    font, lines = _font(size), text.split("\n")
    height = size * 5 // 4  # of a line, whatever letters are in it: labels of a row align
    width = int(max(font.getlength(line) for line in lines)) + 2
    image = Image.new("RGB", (width, height * len(lines)), (PAPER,) * 3)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((0, i * height), line, INK, font)
    return np.asarray(image)


def above(*pictures: np.ndarray) -> np.ndarray:
    """Pictures one above the other, aligned left, on white."""
    width = max(picture.shape[1] for picture in pictures)
    return np.concatenate(
        [_pad(picture, picture.shape[0] + GAP // 2, width) for picture in pictures]
    )


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture under its caption, in a thin frame (a white panel has edges too)."""
    framed = np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=120)
    return above(text_image(caption), framed)


def table(
    cells: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> np.ndarray:
    """Pictures in rows and columns on white, under a title, with a margin all around.

    Args:
        cells: the pictures, row by row; a cell is as large as the largest of its row and column.
        rows: labels to the left of the rows, if any.
        columns: headings over the columns, if any.
    """
    grid = [list(line) for line in cells]
    if columns:
        grid.insert(0, [text_image(text) for text in columns])
    if rows:
        labels = [""] * (len(grid) - len(rows)) + list(rows)
        grid = [
            [_centred(text_image(text), max(cell.shape[0] for cell in line)), *line]
            for text, line in zip(labels, grid, strict=True)
        ]
    heights = [max(cell.shape[0] for cell in line) for line in grid]
    widths = [max(line[i].shape[1] for line in grid) for i in range(len(grid[0]))]
    lines = []
    for line, height in zip(grid, heights, strict=True):
        padded = map(_pad, line, [height + GAP] * len(line), [width + GAP for width in widths])
        lines.append(np.concatenate(list(padded), axis=1))
    body = np.concatenate(lines)
    picture = above(text_image(title, TITLE_SIZE), body) if title else body
    return np.pad(picture, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=PAPER)


def stretched(slice_: np.ndarray) -> np.ndarray:
    """An x-t slice with its rows repeated, so that a few frames are seen too."""
    return slice_.repeat(max(1, -(-XT_HEIGHT // len(slice_))), axis=0)


def shrunk(picture: np.ndarray) -> np.ndarray:
    """A picture made smaller, where it is larger than the panels of a figure of many."""
    scale = PANEL_SIDE / max(picture.shape[:2])
    if scale >= 1:
        return picture
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def even(picture: np.ndarray) -> np.ndarray:
    """A picture with a white line more where a side is odd, as video needs."""
    height, width = picture.shape[:2]
    return _pad(picture, height + height % 2, width + width % 2)


def save_picture(path: Path, picture: np.ndarray) -> Path:
    """Writes a PNG; returns its path."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(png(picture))
    return path


def png(picture: np.ndarray) -> bytes:
    """A picture's PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _centred(label: np.ndarray, height: int) -> np.ndarray:
    return np.pad(
        label,
        ((max(0, height - len(label)) // 2, 0), (0, GAP), (0, 0)),
        constant_values=PAPER,
    )


def _pad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    room = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, room, constant_values=PAPER)
