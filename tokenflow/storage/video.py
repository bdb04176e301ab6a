"""Clips: reading video and folders of images, writing frames and video."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import struct
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util import MissingFileError, UserError, atomic_file, check_text, sha256_file

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".mts")
) | {".wmv", ".flv", ".ogv", ".3gp"}
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"))
DEFAULT_FOLDER_FPS = 24  # DAVIS's
MAX_FPS = 1000
MAX_FPS_DENOMINATOR = 1_000_000  # a decimal's own fraction may not fit a video's 32 bits

# FFmpeg also "decodes" text files, single images and playlists (which open other files): not here.
_VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,asf,flv,ogg"
# Pillow goes by a file's content and would hand some kinds to other programs (EPS to Ghostscript).
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
MAX_SIDE, _MAX_PIXELS = 16384, 64_000_000
_MAX_IMAGE_BYTES = 1 << 30  # of a file: no image of _MAX_PIXELS has more
_MAX_CLIP_NAME_BYTES = 200  # leaves room beside it in the name of a file or folder
# For av.open; an absolute path goes with it, since FFmpeg reads a relative one with a colon as a
# protocol. Tags are not ours to judge: cameras also write them in other encodings than UTF-8.
READING = {
    "options": {
        "format_whitelist": _VIDEO_FORMATS,
        "protocol_whitelist": "file",  # what a container names is not fetched from anywhere
        "max_pixels": str(_MAX_PIXELS),  # FFmpeg decodes frames before it tells their size
    },
    "metadata_errors": "replace",
}
_CRF = "15"  # visually lossless: results are compared and measured from these files
_BT709 = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
# Without it x264 makes other bytes of the same frames now and then: the assembly of its macroblock
# tree reads beyond the tree of a small picture.
_REPRODUCIBLE = {"x264-params": "cpu-independent=1"}

# What Pillow's decoders raise for broken files; TypeError and struct.error come of broken EXIF.
_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)

# (a, b, c, d) of the display matrix, (x, y) -> (a x + c y, b x + d y) with y down.
_DISPLAY_TRANSPOSE = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames, uint8 (n, H, W, 3) RGB; frames per second; the source's (height, width) as shown."""

    frames: np.ndarray
    fps: Fraction
    native_size: tuple[int, int]


def clip_name(path: str | Path) -> str:
    """Name a clip: a file's stem, a folder's name; the same with and without a video suffix.

    Links are not followed: a linked clip is called what its user called it.

    Raises:
        UserError: the path has no name, as "/", or none that can be a folder's of results.
    """
    absolute = Path(os.path.abspath(path))
    is_file = os.path.isfile(absolute) or (
        not os.path.exists(absolute) and absolute.suffix.lower() in VIDEO_SUFFIXES
    )
    # The stem of "..mp4" is ".", which is no name for a folder.
    name = absolute.stem if is_file and absolute.stem.strip(".") else absolute.name
    if not name:
        raise UserError(f"{path}: has no name to call the clip by")
    check_text(name, "the clip's name")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise UserError(f"{path}: the clip's name {name!r} holds control characters; rename it")
    n_bytes = len(os.fsencode(name))
    if n_bytes > _MAX_CLIP_NAME_BYTES:
        raise UserError(
            f"{name[:60]}...: the clip's name is {n_bytes} bytes long, at most "
            f"{_MAX_CLIP_NAME_BYTES} fit beside what is added to it; rename it"
        )
    return name


def resolve_clip(path: str | Path) -> Path:
    """Find a clip that may be named without its suffix: "data/wolf" for "data/wolf.mp4".

    Raises:
        MissingFileError: neither the path nor a video of that stem exists.
        UserError: several videos have that stem, or the path is neither a file nor a folder.
    """
    path = Path(path)
    if os.path.exists(path):
        _check_kind(path)
        return path
    siblings = _entries(path.parent) if os.path.isdir(path.parent) else []
    found = [p for p in siblings if p.stem == path.name and p.suffix.lower() in VIDEO_SUFFIXES]
    if not found:
        raise MissingFileError(f"{path}: no such video or folder")
    if len(found) > 1:
        raise UserError(f"{path}: could be any of {', '.join(p.name for p in found)}; name one")
    return found[0]


def _check_kind(path: Path) -> None:
    """Refuse pipes, sockets and devices: opening one may wait, or read, for ever."""
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path}: neither a file nor a folder, but a pipe, a socket or a device")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def read_clip(
    path: str | Path,
    n_frames: int,
    *,
    start: int = 0,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    fit: str = "stretch",
    fps: Fraction | None = None,
) -> Clip:
    """Read frames start, start + stride, ... of a video, GIF or folder of images, resized.

    Frames are shown the right way up (rotation metadata, EXIF) and resized one by one: native
    frames never pile up in memory. Decoding stops after the last frame needed. A clip that is
    shorter than asked for gives the frames that it has, with a warning.

    Args:
        path: the video file or the folder; images are taken in natural order, transparent ones
            over white.
        n_frames: how many frames, at least 1.
        start: index of the first frame.
        stride: step between frames; the frame rate is divided by it.
        size: (height, width) in pixels; None chooses `default_size`.
        fit: "stretch" or "crop", as in `fit_frame`.
        fps: the result's frame rate; None takes the source's average rate (a folder's is
            DEFAULT_FOLDER_FPS) divided by stride.

    Returns:
        The clip.

    Raises:
        MissingFileError: there is no such path.
        UserError: an argument is out of range, the source cannot be read, or its frames would
            not fit into memory; says why.
    """
    path = Path(path)
    limits = (("n_frames", n_frames, 1), ("start", start, 0), ("stride", stride, 1))
    for name, value, low in (*limits, *(("size", side, 1) for side in size or ())):
        if value < low:
            raise UserError(f"{name}: expected at least {low}, got {value}")
    if fps is not None and fps <= 0:
        raise UserError(f"fps: expected more than 0, got {fps}")
    if size is not None:
        check_size(*size)
    if not os.path.exists(path):
        raise MissingFileError(f"{path}: no such video or folder")
    _check_kind(path)

    frames: list[np.ndarray] = []
    native: list[tuple[int, int]] = []

    def keep(image: Image.Image, there: int) -> None:
        native.append((image.height, image.width))
        fitted = size or default_size(*native[0])
        # Now, not when memory is full; a header may say anything, so what is there counts too.
        check_memory(max(len(frames) + 1, min(n_frames, there)), *fitted)
        frames.append(np.asarray(fit_frame(image, fitted, fit)))

    wanted = range(start, start + n_frames * stride, stride)
    read = _read_folder if path.is_dir() else _read_video
    n_seen, rate = read(path, wanted, keep)
    if not frames:
        raise UserError(f"{path}: start {start} is beyond the end: the clip has {n_seen} frames")
    if len(frames) < n_frames:
        logger.warning(
            "%s: %d frames asked for, using the %d there are", path, n_frames, len(frames)
        )
    return Clip(np.stack(frames), fps or rate / stride, native[0])


def check_size(height: int, width: int) -> None:
    """Refuse a size to work at that is beyond any frame's.

    Raises:
        UserError: names the bound.
    """
    if max(height, width) > MAX_SIDE or height * width > _MAX_PIXELS:
        raise UserError(
            f"H: {height}, W: {width}; expected at most {MAX_SIDE} a side and "
            f"{_MAX_PIXELS // 10**6} megapixels"
        )


def check_memory(n_frames: int, height: int, width: int) -> None:
    """Refuse frames that this machine's memory cannot hold while a clip of them is made.

    Raises:
        UserError: says what is needed and what there is.
    """
    # The frames one by one, and the clip that they are copied to.
    needed = 2 * n_frames * height * width * 3
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{n_frames} frames of {width}x{height} need {needed / 1e9:.1f} GB of memory, and this "
            f"machine has {there / 1e9:.1f} GB; take fewer (--n_frames) or smaller ones (--H, --W)"
        )


def _read_video(
    path: Path, wanted: range, keep: Callable[[Image.Image, int], None]
) -> tuple[int, Fraction]:
    """Hand the wanted frames to `keep`; returns (frames decoded, average frame rate).

    `keep` is told how many of the wanted frames there are, or 0 where that is not known.
    """
    try:
        container = av.open(os.path.abspath(path), **READING)
    except av.FFmpegError as error:
        raise UserError(f"{path}: not a video that can be read ({error.strerror})") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise UserError(f"{path}: has no video stream")
        if stream.codec_context is None:
            raise UserError(f"{path}: there is no decoder for its video codec")
        _check_native_size(path, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
        there = len(range(wanted.start, max(wanted.start, stream.frames), wanted.step))
        n_seen = 0
        frames = container.decode(stream)
        while n_seen <= wanted[-1]:
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                raise _corrupt_frame(path, n_seen, error.strerror) from error
            if frame is None:
                break
            if n_seen in wanted:
                if frame.is_corrupt:
                    raise _corrupt_frame(path, n_seen, "damaged data")
                _check_native_size(path, frame.width, frame.height)
                keep(_displayed(path, frame), there)
            n_seen += 1
        rate = stream.average_rate or stream.guessed_rate
    if not n_seen:
        raise UserError(f"{path}: has no frame that can be decoded")
    if not rate:
        logger.warning("%s: tells no frame rate, taking %d", path, DEFAULT_FOLDER_FPS)
        rate = Fraction(DEFAULT_FOLDER_FPS)
    # Variable rates average to unwieldy fractions; 1001 keeps 30000/1001 and its kin exact.
    return n_seen, rate.limit_denominator(1001) or rate


def _corrupt_frame(path: Path, index: int, reason: str) -> UserError:
    remedy = "; a smaller n_frames takes only frames before it" if index else ""
    return UserError(f"{path}: frame {index} cannot be decoded ({reason}){remedy}")


def _displayed(path: Path, frame: av.VideoFrame) -> Image.Image:
    """Convert a decoded frame to RGB and turn it as its display matrix says."""
    # Without an explicit target, PyAV up to 16 at least ignores the frame's own colour matrix.
    image = Image.fromarray(frame.to_ndarray(format="rgb24", dst_colorspace="ITU601"))
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is None:
        return image
    turn = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].flatten() / 65536
    key = tuple(np.rint(turn / max(np.abs(turn).max(), 1e-5)).astype(int).tolist())
    if key not in _DISPLAY_TRANSPOSE:
        raise UserError(f"{path}: is rotated by something other than quarter turns")
    transpose = _DISPLAY_TRANSPOSE[key]
    return image if transpose is None else image.transpose(transpose)


def _read_folder(
    path: Path, wanted: range, keep: Callable[[Image.Image, int], None]
) -> tuple[int, Fraction]:
    """Hand the wanted images to `keep`; returns (images there are, DEFAULT_FOLDER_FPS).

    `keep` is told how many of the wanted images there are.
    """
    images = _folder_images(path)
    chosen = images[wanted.start : wanted.stop : wanted.step]
    first: tuple[str, tuple[int, int]] | None = None
    for image_path in chosen:
        image = _open_image(image_path)
        first = first or (image_path.name, image.size)
        if image.size != first[1]:
            named = ((first[0], first[1]), (image_path.name, image.size))
            sizes = " and ".join(f"{name} ({w}x{h})" for name, (w, h) in named)
            raise UserError(f"{path}: images of different sizes: {sizes}, as width x height")
        keep(image, len(chosen))
    return len(images), Fraction(DEFAULT_FOLDER_FPS)


def _folder_images(folder: Path) -> list[Path]:
    """List a folder's visible images in natural order.

    None at all, links that lead out of the folder or to no file, pipes and devices are refused.
    """
    images = [
        entry
        for entry in _entries(folder)
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


def _open_image(path: Path) -> Image.Image:
    """Read one image file as RGB, turned as its EXIF orientation says."""
    with opened_image(path) as image:
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def opened_image(path: Path, kind: str = "an image") -> Iterator[Image.Image]:
    """Yield an image file whose header was checked; its pixels are not read yet.

    Args:
        kind: what the file is, for errors.

    Raises:
        UserError: it is none that can be read, or too large; of what is done with the image, the
            errors that a broken file makes.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_IMAGE_BYTES:
            raise ValueError(f"expected a file of at most {_MAX_IMAGE_BYTES >> 30} GB")
        with warnings.catch_warnings():
            # What Pillow finds odd in a file is no matter, and sizes are judged below.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_IMAGE_FORMATS) as image:
                _check_native_size(path, *image.size)
                yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(_IMAGE_FORMATS)
        raise UserError(f"{path}: {kind} that cannot be read (it is none of {known})") from error
    except _IMAGE_ERRORS as error:
        raise UserError(f"{path}: {kind} that cannot be read ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
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


def _check_native_size(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > _MAX_PIXELS:
        raise UserError(
            f"{path}: {width}x{height} pixels are too many; at most {MAX_SIDE} a side and"
            f" {_MAX_PIXELS // 10**6} megapixels"
        )


def frame_rate(text: str) -> Fraction:
    """Read a frame rate that is spelled as a number or a fraction: "20", "29.97", "30000/1001".

    Raises:
        UserError: it is neither, or not above 0 and at most MAX_FPS.
    """
    # No exponents: a fraction of 1e999999999 would be computed, digit by digit.
    spelled = re.fullmatch(r"[0-9]{1,12}/[0-9]{1,12}|[0-9]{0,12}\.?[0-9]{0,12}", text.strip())
    try:
        rate = Fraction(text).limit_denominator(MAX_FPS_DENOMINATOR) if spelled else Fraction(0)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= MAX_FPS:
        raise UserError(
            f"{text[:40]!r}, expected a number or a fraction above 0 and at most {MAX_FPS}"
        )
    return rate


def default_size(height: int, width: int) -> tuple[int, int]:
    """Choose (height, width) to work at: 512x512, landscape 384x672, portrait 672x384."""
    if height == width:
        return 512, 512
    return (384, 672) if width > height else (672, 384)


def fit_frame(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """Resize to (height, width) with Lanczos.

    Args:
        image: an RGB image.
        size: (height, width) in pixels.
        fit: "stretch" ignores the aspect ratio; "crop" scales to cover, then cuts the centre out.

    Raises:
        UserError: fit is neither.
    """
    height, width = size
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    raise UserError(f"fit: expected stretch or crop, got {fit!r}")


def source_sha256(path: str | Path) -> str:
    """Hash a clip's source: a video's bytes; a folder's image names and bytes in natural order."""
    path = Path(path)
    if os.path.exists(path):
        _check_kind(path)
    if not path.is_dir():
        return _file_hash(path)
    digest = hashlib.sha256()
    for image in _folder_images(path):
        # Both parts have no room for ambiguity: a name holds no NUL, a digest's length is fixed.
        digest.update(os.fsencode(image.name) + b"\0" + bytes.fromhex(_file_hash(image)))
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except MissingFileError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def save_video(path: str | Path, frames: Iterable[np.ndarray], fps: Fraction) -> None:
    """Write H.264 video (yuv420p, tagged BT.709) at an exact constant frame rate.

    Args:
        path: the file, .mp4 or .mov; replaced only when all is written.
        frames: RGB uint8 (H, W, 3), all of one even size; at least one. May be a generator.
        fps: frames per second, above 0.

    Raises:
        ValueError: frames or fps are not as above.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None or fps <= 0:
        raise ValueError(f"{path}: a video needs at least one frame and fps above 0, got {fps}")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: H.264 needs even sizes, got {width}x{height}")
    with (
        atomic_file(path) as temporary,
        av.open(os.path.abspath(temporary), "w", options={"movflags": "+faststart"}) as container,
    ):
        options = {"crf": _CRF, "color_range": "tv", **_BT709, **_REPRODUCIBLE}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index, array in enumerate(itertools.chain([first], iterator)):
            if array.shape != (height, width, 3) or array.dtype != np.uint8:
                raise ValueError(
                    f"{path}: frame {index} is {array.dtype} {array.shape}, expected uint8"
                    f" {(height, width, 3)}"
                )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts, frame.time_base = index, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def frame_name(index: int) -> str:
    """The file name of a frame: 00000.png, ..."""
    return f"{index:05d}.png"


def save_frames(folder: str | Path, frames: Iterable[np.ndarray]) -> None:
    """Write RGB uint8 (H, W, 3) frames as 00000.png, ...; frames of a longer earlier run go."""
    folder = Path(folder)
    count = 0
    for count, array in enumerate(frames, start=1):
        with atomic_file(folder / frame_name(count - 1)) as temporary:
            Image.fromarray(array).save(temporary)
    for stale in _saved_frames(folder)[count:]:
        stale.unlink()


def load_frames(folder: str | Path, n_frames: int | None = None) -> np.ndarray:
    """Read what `save_frames` wrote: the first n_frames (None: all), uint8 (n, H, W, 3) RGB.

    Raises:
        MissingFileError: a frame is not there; names it.
        UserError: a frame cannot be read or differs in size.
    """
    folder = Path(folder)
    count = n_frames if n_frames is not None else max(len(_saved_frames(folder)), 1)
    frames: list[np.ndarray] = []
    for path in (folder / frame_name(index) for index in range(count)):
        if not path.is_file():
            raise MissingFileError(f"{path}: no such frame")
        frames.append(np.asarray(_open_image(path)))
        if frames[-1].shape != frames[0].shape:
            raise UserError(f"{path}: differs in size from the frames before it")
    return np.stack(frames)


def _saved_frames(folder: Path) -> list[Path]:
    frames = (p for p in folder.glob("*.png") if re.fullmatch(r"[0-9]{5,}", p.stem))
    return sorted(frames, key=_natural_key)
