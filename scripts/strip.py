"""Draws clips as labelled rows of frames: README's picture.

python -m scripts.strip OUT.png source=data/star.mp4 PnP=RESULT/edited.mp4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenflow.figures.drawing import DPI, picture_grid, png
from tokenflow.storage.images import MAX_SIDE
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.video import read_clip
from util import ArgumentParser, UserError, at_least, command_line, setup_logging


def main(argv: Sequence[str] | None = None) -> None:
    setup_logging()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add, positive = parser.add_argument, at_least(1)
    add("out", type=Path, help="the PNG to write")
    add("rows", nargs="+", type=_row, metavar="LABEL=CLIP", help="one row each")
    add("--n_frames", type=positive, default=16, help="use the first N frames (default: 16)")
    add("--columns", type=positive, default=6, help="frames per row (default: 6)")
    add("--size", type=positive, default=96, help="frames' side in pixels (default: 96)")
    args = parser.parse_args(argv)
    check_report_path(args.out, "OUT.png")
    if max(args.columns, len(args.rows)) * args.size > MAX_SIDE:
        raise UserError(
            f"--columns, --size: {len(args.rows)} rows of {args.columns} frames of {args.size} "
            f"pixels are too many; at most {MAX_SIDE} pixels a side"
        )
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
