"""Draws clips as labelled rows of frames: README's picture.

python -m scripts.strip OUT.png source=data/star.mp4 PnP=RESULT/edited.mp4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenflow.figures.drawing import DPI, picture_grid, png
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.video import read_clip
from util import ArgumentParser, UserError, command_line, setup_logging


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
    rows = []
    for _, path in args.rows:
        frames = read_clip(path, args.n_frames, size=(args.size, args.size)).frames
        rows.append(frames[np.linspace(0, len(frames) - 1, args.columns).round().astype(int)])
    labels = [label for label, _ in args.rows]
    figure = picture_grid(rows, labels, width=args.size / DPI)
    write_reports(f"wrote {args.out}", [(args.out, png(figure))])


def _row(text: str) -> tuple[str, str]:
    label, separator, path = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=CLIP")
    return label, path


if __name__ == "__main__":
    command_line(main)
