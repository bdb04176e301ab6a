"""Manifests: what they say of the files in their directory, and checks of these."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from typing_extensions import TypedDict

from tokenflow.storage.schema import M, parse
from tokenflow.storage.yaml_files import load_yaml
from util import MissingFileError, UserError, sha256_file


class FileRecord(TypedDict):
    """What manifests say of a file."""

    bytes: int
    sha256: str


def load_manifest(cls: type[M], path: Path, version: int, fix_hint: str) -> M:
    """Reads a manifest of a format.

    Raises:
        UserError: it is missing, damaged or of another format; says what to do then.
    """
    try:
        data = load_yaml(path)
        data.pop("sha256", None)  # of the file itself, by an earlier version
        if data.get("format") != version:
            raise UserError(f"{path}: not a manifest of format {version}")
        return parse(cls, data, str(path))
    except UserError as error:
        raise type(error)(f"{error}; {fix_hint}") from error


def check_file(
    folder: Path, name: str, files: Mapping[str, FileRecord], fix_hint: str, read: bool = True
) -> None:
    """Refuses a file that is not as its manifest says.

    Args:
        name: the file's path within the manifest's folder.
        files: the manifest's records; a file without one is refused too.
        read: compare the checksum too; else only the size.

    Raises:
        UserError: naming the file, what is wrong with it and the fix (`fix_hint`).
    """
    path, recorded = folder / name, files.get(name)
    if not path.is_file():
        raise MissingFileError(f"{path}: is missing; {fix_hint}")
    if recorded is None:
        raise UserError(f"{path}: the manifest does not know it; {fix_hint}")
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise UserError(f"{path}: {size} bytes, the manifest says {recorded['bytes']}; {fix_hint}")
    if read and sha256_file(path) != recorded["sha256"]:
        raise UserError(f"{path}: damaged (its checksum is not the manifest's); {fix_hint}")


def refuse_unexpected_files(folder: Path, expected: Iterable[str], apart: str = "") -> None:
    """Refuses visible files in a directory that are not expected: a UserError names the first.

    Args:
        expected: paths within the directory.
        apart: a directory in it that has a manifest of its own.
    """
    expected = {folder / name for name in expected}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        shown = parts[0] != apart and not any(part.startswith(".") for part in parts)
        if shown and path not in expected and not path.is_dir():
            raise UserError(f"{path}: does not belong there; run: rm {shlex.quote(str(path))}")
