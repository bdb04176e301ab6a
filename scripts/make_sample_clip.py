"""Write a short synthetic clip: a star that turns and travels before a panning texture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

# Scripts in this folder are run from the repository root, which Python does not search by itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util import ArgumentParser, UserError, command_line
from video import save_video

N_WAVES = 24
STAR_COLOUR = np.array([235, 170, 60])  # RGB
EYE_COLOUR = np.array([60, 30, 90])


def render_clip(n_frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Draw the clip; the motion over all of it is the same whatever the number of frames.

    Args:
        n_frames: at least 1.
        height, width: in pixels, at least 16.
        seed: of the background's texture and colours.

    Returns:
        (n_frames, height, width, 3) uint8 RGB.

    Raises:
        UserError: n_frames or a side is too small.
    """
    for name, value, low in (("frames", n_frames, 1), ("size", min(height, width), 16)):
        if value < low:
            raise UserError(f"{name}: expected at least {low}, got {value}")
    rng = np.random.default_rng(seed)
    waves = {
        "frequency": rng.normal(0, 2.5, (N_WAVES, 2)),  # cycles per short side, (y, x)
        "phase": rng.uniform(0, 2 * np.pi, N_WAVES),
        "colour": rng.normal(0, 28 / N_WAVES**0.5, (N_WAVES, 3)),
    }
    base_colour = rng.uniform(80, 150, 3)

    short = min(height, width)
    y, x = np.mgrid[:height, :width] + 0.5
    y, x = y / short, x / short  # the short side is 1
    frames = np.empty((n_frames, height, width, 3), np.uint8)
    for i, time in enumerate(np.linspace(0, 1, n_frames)):
        picture = base_colour + _texture(y, x + 0.25 * time, **waves)
        centre_y = (0.5 + 0.12 * np.sin(2 * np.pi * time)) * height / short
        centre_x = (0.3 + 0.4 * time) * width / short
        star, eye = _star(y - centre_y, x - centre_x, turn=1.5 * time)
        for distance, colour in ((star, STAR_COLOUR), (eye, EYE_COLOUR)):
            # Anti-aliasing: coverage falls from 1 to 0 within a pixel of the outline.
            coverage = np.clip(0.5 - distance * short, 0, 1)[..., None]
            picture = picture * (1 - coverage) + colour * coverage
        frames[i] = picture.clip(0, 255).round()
    return frames


def _texture(
    y: np.ndarray, x: np.ndarray, frequency: np.ndarray, phase: np.ndarray, colour: np.ndarray
) -> np.ndarray:
    """A sum of plane waves: smooth, without seams wherever the camera pans; (H, W, 3)."""
    angle = 2 * np.pi * (y[..., None] * frequency[:, 0] + x[..., None] * frequency[:, 1])
    return np.cos(angle + phase) @ colour


def _star(y: np.ndarray, x: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Approximate signed distances, negative inside, to a star and to an eye off its centre."""
    radius, angle = np.hypot(y, x), np.arctan2(y, x) - turn
    star = radius - 0.2 * (1 + 0.25 * np.cos(5 * angle))
    eye = np.hypot(y - 0.1 * np.sin(turn), x - 0.1 * np.cos(turn)) - 0.05
    return star, eye


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", metavar="OUT.mp4", type=Path, help="video to write")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="height and width, even")
    parser.add_argument("--fps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.size % 2:
        raise UserError(f"--size: video needs an even size, got {args.size}")
    if args.fps < 1:
        raise UserError(f"--fps: expected at least 1, got {args.fps}")
    if args.path.suffix != ".mp4":
        raise UserError(f"{args.path}: expected a name that ends with .mp4")
    frames = render_clip(args.frames, args.size, args.size, args.seed)
    save_video(args.path, frames, Fraction(args.fps))
    print(f"{args.path}: {args.frames} frames of {args.size}x{args.size} pixels")


if __name__ == "__main__":
    command_line(main)
