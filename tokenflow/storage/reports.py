"""Reports: to a file, a device or pipe, or standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from util import UserError, atomic_file, check_writable, is_special_file

# By its other name too: redirected to a file, it would be a link to that file, and replaced.
STDOUT = (Path("-"), Path("/dev/stdout"))


def check_report_path(path: Path, name: str) -> None:
    """Refuse a path that `write_reports` cannot write to, before the work that is reported.

    Args:
        name: the option that it comes from.

    Raises:
        UserError: naming the option and what is in the way.
    """
    if path in STDOUT:
        return
    target = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"{name}: {path}: is a folder, expected a file")
    if target.is_symlink():
        raise UserError(f"{name}: {path}: is a link that leads to itself")
    if not is_special_file(path):
        check_writable(target.parent, name)
    elif path.is_socket() or not os.access(path, os.W_OK):
        raise UserError(f"{name}: {path}: cannot be written to")


def write_reports(text: str, reports: Sequence[tuple[Path, str | bytes]]) -> None:
    """Print a script's text, then write its reports, even if nobody reads the text.

    Args:
        text: goes to standard error if a report goes to standard output, so that another program
            can read the report from a pipe.
        reports: paths with what to write to each. A new or regular file, also one that a link leads
            to, is replaced at once; a device or pipe is written to; "-" is standard output.
    """
    to_stdout = any(path in STDOUT for path, _ in reports)
    try:
        print(text, file=sys.stderr if to_stdout else sys.stdout, flush=True)
    finally:
        for path, content in reports:
            write_report(path, content)


def write_report(path: Path, content: str | bytes) -> None:
    """Write one report, as `write_reports` does."""
    content = content.encode() if isinstance(content, str) else content
    if path in STDOUT:
        sys.stdout.buffer.write(content)
    elif is_special_file(path):
        path.write_bytes(content)
    else:
        with atomic_file(os.path.realpath(path)) as temporary:
            temporary.write_bytes(content)
