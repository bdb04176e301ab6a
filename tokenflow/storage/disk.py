"""Free disk space."""

from __future__ import annotations

import shutil
from pathlib import Path

from util import UserError


def check_free_space(folder: Path, needed: int, fix_hint: str) -> None:
    """Refuses work whose result does not fit on the disk.

    Args:
        folder: the output directory; need not exist yet.
        needed: bytes.
        fix_hint: what would make the result smaller.

    Raises:
        UserError: saying what is needed and what is free.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free; "
            f"{fix_hint}"
        )


def format_bytes(n_bytes: float) -> str:
    """A number of bytes for people: 12 kB, 3.4 MB, 2.9 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 or unit == "bytes" else f"{n_bytes:.1f} {unit}"
