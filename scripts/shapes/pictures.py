"""The pictures that the small model learns from: scenes of the shapes world, rendered once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.shapes.world import random_scene, render
from util import MissingFileError, atomic_file

SIZE = 256  # of the pictures; their latents are 32x32
CHUNK = 512  # pictures per file
HELD_OUT = 1_000_000  # the first seed of scenes that nothing is trained on


def picture(seed: int, size: int) -> tuple[np.ndarray, str]:
    """The picture of a seed: a scene at a random time; (size, size, 3) uint8, and its caption."""
    scene = random_scene(seed)
    time = np.random.default_rng([seed, 1]).random()  # so that all of a clip's poses are seen
    return render(scene, time, (size, size))[0], scene.caption


def world_version() -> str:
    """12 hex digits that change when scenes are drawn, described or rendered in another way."""
    digest = hashlib.sha256()
    for seed in range(16):
        pixels, caption = picture(seed, 32)
        digest.update(pixels.tobytes() + caption.encode())
    return digest.hexdigest()[:12]


def render_pictures(folder: Path, count: int, sizes: Sequence[int]) -> int:
    """Render pictures 0, 1, ... `count` - 1 in each size to `folder`, in files of CHUNK.

    Returns:
        The number of files that were missing and are made.
    """
    tasks = [
        (path, first, min(CHUNK, count - first), size)
        for size in sizes
        for first, path in _files(folder, count, size)
        if not path.exists()
    ]
    if tasks:
        processes = min(len(tasks), os.cpu_count() or 1)
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in tqdm(pool.imap_unordered(_render_file, tasks), "pictures", total=len(tasks)):
                pass
    return len(tasks)


def _render_file(task: tuple[Path, int, int, int]) -> None:
    path, first, count, size = task
    with atomic_file(path) as temporary:
        np.save(temporary, np.stack([picture(first + i, size)[0] for i in range(count)]))


def _files(folder: Path, count: int, size: int) -> Iterator[tuple[int, Path]]:
    for first in range(0, count, CHUNK):
        yield first, folder / f"{size}_{first:06d}_{min(CHUNK, count - first)}.npy"


class Pictures:
    """The rendered pictures of one size, read as they are needed; uint8 (size, size, 3) each.

    Raises:
        MissingFileError: they are not rendered.
    """

    def __init__(self, folder: Path, count: int, size: int = SIZE) -> None:
        self.size = size
        self.count = count
        files = [path for _, path in _files(folder, count, size)]
        for path in files:
            if not path.exists():
                raise MissingFileError(
                    f"{path}: missing; run `python -m scripts.tiny_model.train pictures` first"
                )
        self.chunks = [np.load(path, mmap_mode="r") for path in files]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        return self.chunks[number // CHUNK][number % CHUNK]

    def captions(self) -> list[str]:
        """The caption of every picture."""
        return [random_scene(seed).caption for seed in range(self.count)]


def held_out_pictures(count: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of scenes that are not trained on: (count, SIZE, SIZE, 3) uint8, and captions."""
    frames, captions = zip(*(picture(HELD_OUT + i, SIZE) for i in range(count)), strict=True)
    return np.stack(frames), list(captions)


def to_pixels(frames: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 to (n, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """(n, 3, H, W) in [-1, 1] to (n, H, W, 3) uint8."""
    pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(path: Path, frames: np.ndarray, columns: int) -> None:
    """Write (n, H, W, 3) uint8 frames as a PNG of rows of `columns`, of which n is a multiple."""
    rows = [np.concatenate(list(row), axis=1) for row in np.split(frames, len(frames) // columns)]
    with atomic_file(path) as temporary:
        cv2.imwrite(str(temporary), np.concatenate(rows)[:, :, ::-1])
