"""Draws clips as labelled rows of frames: README's picture.

python -m scripts.strip OUT.png source=data/star.mp4 PnP=RESULT/edited.mp4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from tokenflow.figures.drawing import png
from tokenflow.storage.video import read_clip
from util import (
    ArgumentParser,
    UserError,
    check_report_path,
    command_line,
    setup_logging,
    write_reports,
)

FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
PADDING = 6  # left and right of a label


def label_width(labels: Sequence[str]) -> int:
    """Pixels that the longest label takes."""
    return 2 * PADDING + max(cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0] for text in labels)


def strip_row(label: str, width: int, frames: np.ndarray) -> np.ndarray:
    """One row: the label in a margin, then the frames side by side; (H, width + k * W, 3) uint8."""
    height = frames.shape[1]
    margin = np.full((height, width, 3), 255, np.uint8)
    where = (PADDING, height // 2 + 5)
    cv2.putText(margin, label, where, FONT, FONT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([margin, *frames], axis=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    setup_logging()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("rows", nargs="+", type=_row, metavar="LABEL=CLIP", help="one row each")
    parser.add_argument("--n_frames", type=int, default=16, help="of these first (default: 16)")
    parser.add_argument("--columns", type=int, default=6, help="frames per row (default: 6)")
    parser.add_argument("--size", type=int, default=96, help="frames' side in pixels (default: 96)")
    args = parser.parse_args(argv)
    for name in ("n_frames", "columns", "size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    check_report_path(args.out, "OUT.png")
    width = label_width([label for label, _ in args.rows])
    rows = []
    for label, path in args.rows:
        frames = read_clip(path, args.n_frames, size=(args.size, args.size)).frames
        picks = np.linspace(0, len(frames) - 1, args.columns).round().astype(int)
        rows.append(strip_row(label, width, frames[picks]))
    write_reports(f"wrote {args.out}", [(args.out, png(np.concatenate(rows)))])


def _row(text: str) -> tuple[str, str]:
    label, separator, path = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=CLIP")
    return label, path


if __name__ == "__main__":
    command_line(main)
