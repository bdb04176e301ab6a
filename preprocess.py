"""Inverts a clip with DDIM and writes the source cache that every edit of it reads.

python preprocess.py --data_path clip.mp4 --inversion_prompt "a woman running"

From Python: preprocess(parse_args(["--data_path", "clip.mp4"])) returns the cache's folder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.cache.options import PreprocessOptions, edit_command, parse_args
from tokenflow.ops.launch import started
from util import command_line

if TYPE_CHECKING:
    from tokenflow.diffusion.models import Loader

log = logging.getLogger("tokenflow")


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Runs the script; returns the cache's folder, or None with --estimate."""
    with started(partial(parse_args, argv)) as (group, options):
        if options.estimate:
            from tokenflow.cache.simulation import estimate

            needed = estimate(options, group)
            if group.is_main:
                print(needed)
            return None
        folder = preprocess(options, group=group)
        if group.is_main:
            print(f"cache: {folder}", flush=True)
            log.info("edit it: %s", edit_command(options))
    return folder


def preprocess(options: PreprocessOptions, load: Loader | None = None, **arguments: Any) -> Path:
    """Inverts a clip, unless that is done; returns the cache's folder: `build.build_cache`."""
    from tokenflow.cache.build import build_cache  # slow to import

    return build_cache(options, load, **arguments)


if __name__ == "__main__":
    command_line(main)
