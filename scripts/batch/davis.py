"""The sequences of a DAVIS tree."""

from __future__ import annotations

import re
from pathlib import Path

from tokenflow.storage.images import IMAGE_SUFFIXES
from util import MissingFileError, UserError, existing_file


def sequences(root: Path, resolution: str, image_set: str | None, where: str) -> list[Path]:
    """The folders of a tree's sequences: all that hold images, or those of an image set.

    Args:
        root: the folder that holds JPEGImages/<resolution>.
        image_set: a file that names sequences; its path may be relative to the root.
        where: the place of these settings in a list, for errors.

    Returns:
        the folders; those that an image set names may be missing.

    Raises:
        UserError: there is no such tree, or the image set is none.
    """
    if not _is_name(resolution):
        raise UserError(f"{where}: resolution: expected a folder's name, got {resolution!r:.60}")
    images = root / "JPEGImages" / resolution
    if not images.is_dir():
        raise MissingFileError(f"{where}: {images}: no such folder")
    if image_set is not None:
        file = Path(image_set)
        return [images / name for name in read_image_set(file if file.is_file() else root / file)]
    files = (file for file in images.glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)
    folders = sorted({file.parent for file in files})
    if not folders:
        raise UserError(f"{where}: {images}: holds no folders of images")
    return folders


def read_image_set(file: Path) -> list[str]:
    """The sequences that a file names, one a line: by name, or by the paths of their frames.

    Raises:
        MissingFileError: there is no such file.
        UserError: a line does not name a sequence, or the file is empty.
    """
    try:
        lines = existing_file(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: no image set: not text in UTF-8") from error
    names = []
    for number, line in enumerate(lines, start=1):
        if words := line.split():
            name = re.sub(r"^/?JPEGImages/[^/]+/([^/]+)/[^/]+$", r"\1", words[0])
            if not _is_name(name):
                raise UserError(
                    f"{file}: line {number}: {name!r:.60} is not the name of a sequence"
                )
            names.append(name)
    if not names:
        raise UserError(f"{file}: names no sequences")
    return list(dict.fromkeys(names))


def _is_name(name: str) -> bool:
    """Whether it can only be something within a folder."""
    return bool(name.strip(".")) and not re.search(r"[/\\\0]", name)
