"""Textures of the shapes world's backgrounds: leaves, bricks, stones and waves.

Each is a tone for every place of the plane. Its cells (a leaf, a brick, ...) have places and tones
hashed from their row and column, so that no cell is like the next one and there is no seam wherever
the camera pans.
"""

from __future__ import annotations

import itertools

import numpy as np

TEXTURES = ("leaves", "bricks", "stones", "waves")
SEAM = 0.055  # half the width of the lines between bricks, stones and waves, in cells
LEAF = (0.85, 0.42)  # half a leaf's length and width, in cells
RIB = 0.045  # half the width of the line along its middle
JITTER = 0.27  # how far from its cell's middle a leaf or a stone lies at most, along y and x


def tone(name: str, seed: int, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """The tone of a texture, -1 (dark) to 1 (bright).

    Args:
        name: one of TEXTURES.
        seed: of its cells; another seed gives another plane of the same texture.
        y, x: (H, W) float32, places in cells.
        pixel: a pixel's side in cells; edges are anti-aliased over it.

    Returns:
        (H, W) float32.
    """
    drawn = {"leaves": _leaves, "bricks": _bricks, "stones": _stones, "waves": _waves}
    return drawn[name](seed, y, x, pixel).astype(np.float32)


class _Cells:
    """Random numbers in [0, 1) of the cells around places, a table for each `salt`."""

    def __init__(self, seed: int, row: np.ndarray, column: np.ndarray) -> None:
        self.row, self.column = row.astype(np.int64), column.astype(np.int64)
        self.first = self.row.min() - 1, self.column.min() - 1
        last = self.row.max() + 1, self.column.max() + 1
        ranges = (np.arange(a, b + 1) for a, b in zip(self.first, last, strict=True))
        rows, columns = np.meshgrid(*ranges, indexing="ij")
        self.keys = rows * 0x9E3779B1 + columns * 0x85EBCA77 + seed * 0xC2B2AE3D

    def random(self, salt: int, rows: np.ndarray | int, columns: np.ndarray | int) -> np.ndarray:
        """Of each place's cell, moved by -1, 0 or 1 rows and columns."""
        n = ((self.keys + salt * 0x27D4EB2F) & 0xFFFFFFFF).astype(np.uint32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            n = (n ^ (n >> np.uint32(shift))) * np.uint32(factor)
        table = ((n ^ (n >> np.uint32(16))) / 2**32).astype(np.float32)
        return table[self.row + rows - self.first[0], self.column + columns - self.first[1]]


def _line(distance: np.ndarray, width: float, pixel: float) -> np.ndarray:
    """How much of a pixel is within `width` of a line, 0 to 1, by its distance from the middle."""
    return np.clip(0.5 - (distance - width) / pixel, 0, 1)


def _bricks(seed: int, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Rows half a cell high, every other one moved by half a brick; bright mortar."""
    row = np.floor(2 * y)
    x = x + 0.5 * (row % 2)
    column = np.floor(x)
    to_row = 0.25 - np.abs(y - row / 2 - 0.25)
    to_column = 0.5 - np.abs(x - column - 0.5)
    mortar = _line(np.minimum(to_row, to_column), 0.7 * SEAM, pixel)
    body = 1.5 * _Cells(seed, row, column).random(0, 0, 0) - 1
    return body + mortar * (0.9 - body)


def _stones(seed: int, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """The cells of points that lie near the middles of squares; dark between them."""
    row, column = np.floor(y), np.floor(x)
    cells = _Cells(seed, row, column)
    nearest = second = np.full(y.shape, np.inf, np.float32)
    body = np.zeros(y.shape, np.float32)
    for rows, columns in itertools.product((-1, 0, 1), repeat=2):
        at = [0.5 + JITTER * (2 * cells.random(salt, rows, columns) - 1) for salt in (1, 2)]
        distance = np.hypot(row + rows + at[0] - y, column + columns + at[1] - x)
        is_nearest = distance < nearest
        second = np.where(is_nearest, nearest, np.minimum(second, distance))
        nearest = np.minimum(nearest, distance)
        body = np.where(is_nearest, 1.5 * cells.random(0, rows, columns) - 0.5, body)
    gap = _line((second - nearest) / 2, SEAM, pixel)
    return body - gap * (1 + body)


def _leaves(seed: int, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Leaves turned at random, each over some of its neighbours, with a bright rib; dark ground.

    A leaf reaches into the next cells at most, so that each place can be in one leaf of those with
    a given row and column modulo 3: painted class by class, what is on top is the same everywhere.
    """
    row, column = np.floor(y), np.floor(x)
    cells = _Cells(seed, row, column)
    total = np.full(y.shape, -1, np.float32)
    length, width = LEAF
    for i, j in itertools.product(range(3), repeat=2):
        rows, columns = ((k - n + 1) % 3 - 1 for k, n in ((i, cells.row), (j, cells.column)))
        at = [0.5 + JITTER * (2 * cells.random(salt, rows, columns) - 1) for salt in (1, 2)]
        off_y, off_x = y - row - rows - at[0], x - column - columns - at[1]
        angle = 2 * np.float32(np.pi) * cells.random(3, rows, columns)
        along = np.cos(angle) * off_x + np.sin(angle) * off_y
        across = np.abs(np.cos(angle) * off_y - np.sin(angle) * off_x)
        distance = 0.8 * (across - width * (1 - (along / length) ** 2))
        body = 1.3 * cells.random(0, rows, columns) - 0.7
        body = body + _line(across, RIB, pixel) * 0.5
        total += _line(distance, 0, pixel) * (body - total)
    return total


def _waves(seed: int, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """Bands that wind from left to right, darker downwards, under bright crests."""
    turn = np.float32(2 * np.pi)
    y = y + 0.3 * np.sin(turn * 0.21 * x) + 0.12 * np.sin(turn * (0.57 * x + 0.15 * y))
    band = np.floor(y)
    along = x / 1.6 + 0.37 * band
    piece = np.floor(along)
    share = along - piece
    share = share * share * (3 - 2 * share)  # from one piece's tone to the next, smoothly
    cells = _Cells(seed, band, piece)
    body = cells.random(0, 0, 0) * (1 - share) + cells.random(0, 0, 1) * share
    depth = y - band
    body = 1.6 * body - 0.9 + 0.4 * (0.5 - depth)
    crest = _line(np.minimum(depth, 1 - depth), SEAM, pixel)
    return body + crest * (0.9 - body)
