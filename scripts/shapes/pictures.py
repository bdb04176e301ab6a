"""The pictures that the small model learns from: scenes of both worlds of shapes, rendered once."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.shapes import world, world2
from util import MissingFileError, atomic_file

SIZE = 256  # of the pictures; their latents are 32x32
AT_ONCE = 64  # pictures that a process renders before it asks for more
HELD_OUT = 1_000_000  # the first seed of scenes that nothing is trained on


def scene_of_picture(number: int) -> world.Scene:
    """Of world.py where the number is even, of world2.py where it is odd."""
    return (world2 if number % 2 else world).random_scene(number)


def picture(number: int, size: int) -> tuple[np.ndarray, str]:
    """A picture: a scene at a random time; (size, size, 3) uint8, and its caption."""
    scene = scene_of_picture(number)
    time = np.random.default_rng([number, 1]).random()  # so that all of a clip's poses are seen
    return world.render(scene, time, (size, size))[0], scene.caption


def world_version() -> str:
    """12 hex digits that change when scenes are drawn, described or rendered in another way."""
    digest = hashlib.sha256()
    for seed in range(16):
        pixels, caption = picture(seed, 32)
        digest.update(pixels.tobytes() + caption.encode())
    return digest.hexdigest()[:12]


def render_pictures(folder: Path, count: int, sizes: Sequence[int]) -> list[int]:
    """Render pictures 0, 1, ... `count` - 1 in each size, to a file for each.

    Returns:
        The sizes that were missing.
    """
    missing = [size for size in sizes if not _file(folder, count, size).exists()]
    if missing:
        processes = min(os.cpu_count() or 1, math.ceil(count / AT_ONCE))
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for size in missing:
                work = pool.imap(partial(picture, size=size), range(count), AT_ONCE)
                with atomic_file(_file(folder, count, size)) as path:
                    frames = np.lib.format.open_memmap(path, "w+", np.uint8, (count, size, size, 3))
                    for number, (frame, _) in enumerate(tqdm(work, f"pictures at {size}", count)):
                        frames[number] = frame
                    frames.flush()
    return missing


def _file(folder: Path, count: int, size: int) -> Path:
    return folder / f"{size}_{count}.npy"


def open_pictures(folder: Path, count: int, size: int) -> np.ndarray:
    """The rendered pictures, read as they are needed; (count, size, size, 3) uint8.

    Raises:
        MissingFileError: they are not rendered.
    """
    path = _file(folder, count, size)
    if not path.exists():
        raise MissingFileError(
            f"{path}: missing; run `python -m scripts.tiny_model.train pictures` first"
        )
    return np.load(path, mmap_mode="r")


def held_out_pictures(count: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of scenes that are not trained on: (count, SIZE, SIZE, 3) uint8, and captions."""
    frames, captions = zip(*(picture(HELD_OUT + i, SIZE) for i in range(count)), strict=True)
    return np.stack(frames), list(captions)


def to_pixels(frames: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 to (n, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_sheet(path: Path, frames: np.ndarray, columns: int = 8) -> None:
    """Write (n, H, W, 3) uint8 frames as a PNG of rows of `columns`, of which n is a multiple."""
    rows = [np.concatenate(list(row), axis=1) for row in np.split(frames, len(frames) // columns)]
    with atomic_file(path) as temporary:
        cv2.imwrite(str(temporary), np.concatenate(rows)[:, :, ::-1])
