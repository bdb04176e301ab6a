"""Inverts a clip with DDIM and writes the source cache that every edit of it reads.

python preprocess.py --data_path clip.mp4 --inversion_prompt "a woman running"

From Python: preprocess(parse_args(["--data_path", "clip.mp4"])) returns the cache's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenflow.cache.build import build_cache as preprocess
from tokenflow.cache.options import parse_args
from tokenflow.ops.distributed import start_process_group
from util import command_line, setup_logging


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns the cache's folder."""
    with start_process_group() as group:
        setup_logging(quiet=not group.is_main)
        with group.raise_together():
            options = parse_args(argv)
        folder = preprocess(options, group=group)
        if group.is_main:
            print(f"cache: {folder}")
    return folder


if __name__ == "__main__":
    command_line(main)
