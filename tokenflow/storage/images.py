"""Image files: reading one safely, folders of them, masks, and the frames of results."""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling

from util import MissingFileError, UserError, atomic_file, is_special_file

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"))

# Pillow goes by a file's content and would hand some kinds to other programs (EPS to Ghostscript).
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
MAX_SIDE, MAX_PIXELS = 16384, 64_000_000
_MAX_IMAGE_BYTES = 1 << 30  # of a file: no image of MAX_PIXELS has more

# What Pillow's decoders raise for broken files; TypeError and struct.error for broken EXIF.
_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


def check_kind(path: Path) -> None:
    """Refuses pipes, sockets and devices: opening or reading one may never end."""
    if is_special_file(path):
        raise UserError(f"{path}: neither a file nor a folder, but a pipe, a socket or a device")


def check_size(where: object, height: int, width: int) -> None:
    """Refuses a frame's size above the limits, by a UserError that names them."""
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise UserError(
            f"{where}: {width}x{height} pixels are too many; at most {MAX_SIDE} a side and "
            f"{MAX_PIXELS // 10**6} megapixels"
        )


def folder_images(folder: Path) -> list[Path]:
    """A folder's visible images in natural order.

    Raises:
        UserError: there are none, or one is a link out of the folder or to no file, a pipe or a
            device.
    """
    images = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.suffix.lower() in IMAGE_SUFFIXES
        and not entry.name.startswith(".")
        and (entry.is_symlink() or not entry.is_dir())
    ]
    if not images:
        raise UserError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    inside = os.path.realpath(folder)
    for image in images:
        if not Path(os.path.realpath(image)).is_relative_to(inside):
            raise UserError(f"{image}: is a link that points outside of its folder; copy the file")
        if not os.path.isfile(image):
            kind = "a link to no file" if image.is_symlink() else "a pipe, a socket or a device"
            raise UserError(f"{image}: is no image, but {kind}; remove it")
    return sorted(images, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def read_image(path: Path) -> Image.Image:
    """Read one image file as RGB, turned as its EXIF orientation says."""
    with opened_image(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def opened_image(path: Path, kind: str = "an image") -> Iterator[Image.Image]:
    """Yield an image file whose header was checked; its pixels are not read yet.

    Args:
        kind: what the file is, for errors.

    Raises:
        UserError: it cannot be read or is too large; also if using the image in the block fails
            because the file is broken.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_IMAGE_BYTES:
            raise ValueError(f"expected a file of at most {_MAX_IMAGE_BYTES >> 30} GB")
        with warnings.catch_warnings():
            # Pillow's warnings do not matter here; sizes are checked below.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_IMAGE_FORMATS) as image:
                check_size(path, image.height, image.width)
                yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(_IMAGE_FORMATS)
        raise UserError(f"{path}: {kind} that cannot be read (it is none of {known})") from error
    except _IMAGE_ERRORS as error:
        raise UserError(f"{path}: {kind} that cannot be read ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image mode to RGB: 16 bits are scaled, transparency is laid over white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels of more than 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def default_size(height: int, width: int) -> tuple[int, int]:
    """Choose (height, width) to work at: 512x512, landscape 384x672, portrait 672x384."""
    if height == width:
        return 512, 512
    return (384, 672) if width > height else (672, 384)


def fit_frame(
    image: Image.Image, size: tuple[int, int], fit: str, how: Resampling = Resampling.LANCZOS
) -> Image.Image:
    """Resize to (height, width).

    Args:
        image: an RGB image.
        size: (height, width) in pixels.
        fit: "stretch" ignores the aspect ratio; "crop" scales to cover, then cuts the centre out.
    """
    height, width = size
    resize = ImageOps.fit if fit == "crop" else Image.Image.resize
    return resize(image, (width, height), how)


def find_masks(key: str, place: str | Path, clip: str, numbers: Sequence[int]) -> list[Path]:
    """The PNG files of a clip's masks, one a frame.

    Args:
        key: the option that names `place`, for errors.
        place: one file for all frames; a folder of files that are numbered like the clip's frames,
            from 0; or a folder with a folder `<clip>` of them inside.
        numbers: which of the clip's frames, ascending.

    Raises:
        UserError: there are none for the clip, or not enough.
    """
    place = Path(place)
    if place.is_file() and place.suffix.lower() == ".png":
        return [place] * len(numbers)
    folder = next((f for f in (place / clip, place) if f.is_dir()), None)
    # By length first, so that numbers without leading zeros are in order: 9.png before 10.png.
    files = list(folder.glob("[!.]*.png")) if folder else []
    files.sort(key=lambda path: (len(path.name), path.name))
    if not files:
        raise MissingFileError(
            f"{key}: {place}: expected a folder of PNG files, one a frame, or a folder {clip}/ of "
            "them inside, or one PNG file for all frames"
        )
    if len(files) <= numbers[-1]:
        raise UserError(
            f"{key}: {folder}: {len(files)} masks, the edit needs {numbers[-1] + 1}; masks are "
            "numbered like the clip's frames"
        )
    return [files[i] for i in numbers]


def check_proportions(key: str, files: Sequence[Path], sizes: Sequence[Sequence[int]]) -> None:
    """Refuses masks that are wider or narrower than these sizes (height, width), by a UserError.

    Args:
        key: the option that names them.
    """
    for path in dict.fromkeys(files):
        with opened_image(path, "a mask") as image:
            own = image.width / image.height
        if not any(math.isclose(own, width / height, rel_tol=0.02) for height, width in sizes):
            listed = " or ".join(f"{width}x{height}" for height, width in sizes)
            raise UserError(
                f"{key}: {path}: is of {image.width}x{image.height}, the clip of {listed}; a mask "
                "has the clip's proportions"
            )


def read_masks(files: Sequence[Path], size: tuple[int, int], fit: str) -> np.ndarray:
    """Masks resized as frames are by `fit_frame`: (n, H, W) bool, True where one is not 0.

    Of palette images indices count (as DAVIS has them), not colours; of others, any channel but
    alpha.

    Raises:
        UserError: a file cannot be read.
    """
    found: dict[Path, np.ndarray] = {}
    for path in dict.fromkeys(files):  # one may serve several frames
        with opened_image(path, "a mask") as image:
            one_channel = image.mode in ("P", "L", "1", "I", "I;16")
            values = np.asarray(image if one_channel else image.convert("RGB"))
        mask = Image.fromarray((values.reshape(*values.shape[:2], -1) != 0).any(-1).astype("u1"))
        found[path] = np.asarray(fit_frame(mask, size, fit, Resampling.NEAREST)) > 0
    return np.stack([found[path] for path in files])


def frame_name(index: int) -> str:
    """The file name of a frame: 00000.png, ..."""
    return f"{index:05d}.png"


def save_frames(folder: str | Path, frames: Iterable[np.ndarray]) -> None:
    """Write RGB uint8 (H, W, 3) frames as 00000.png, ..."""
    for index, array in enumerate(frames):
        with atomic_file(Path(folder) / frame_name(index)) as temporary:
            Image.fromarray(array).save(temporary)


def resized(frames: Iterable[np.ndarray], size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """RGB uint8 (H, W, 3) frames, one by one at a size (height, width), by Lanczos; None: as is."""
    for frame in frames:
        image = Image.fromarray(frame)
        yield frame if size is None else np.asarray(fit_frame(image, size, "stretch"))


def load_frames(
    folder: str | Path, n_frames: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Read what `save_frames` wrote: the first n_frames (None: all), uint8 (n, H, W, 3) RGB.

    Each is `resized` to a size (height, width), if any.

    Raises:
        MissingFileError: a frame is not there; names it.
        UserError: a frame cannot be read or differs in size.
    """
    folder = Path(folder)
    count = n_frames if n_frames is not None else max(len(list(folder.glob("[0-9]*.png"))), 1)
    frames: list[np.ndarray] = []
    for path in (folder / frame_name(index) for index in range(count)):
        if not path.is_file():
            raise MissingFileError(f"{path}: no such frame")
        frames.extend(resized([np.asarray(read_image(path))], size))
        if frames[-1].shape != frames[0].shape:
            raise UserError(f"{path}: differs in size from the frames before it")
    return np.stack(frames)
