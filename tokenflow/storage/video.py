"""Clips: reading video and folders of images, writing video."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from tokenflow.storage.images import (
    MAX_PIXELS,
    check_kind,
    check_size,
    default_size,
    fit_frame,
    folder_images,
    read_image,
)
from util import MissingFileError, UserError, atomic_file, check_text, sha256_file, shown

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".mts")
) | {".wmv", ".flv", ".ogv", ".3gp"}
DEFAULT_FOLDER_FPS = 24  # DAVIS's
MAX_FPS = 1000
MAX_FPS_DENOMINATOR = 1_000_000  # a decimal's own fraction may not fit a video's 32 bits

# FFmpeg also "decodes" text files, single images and playlists (which open other files): not here.
_VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,asf,flv,ogg"
_MAX_CLIP_NAME_BYTES = 200  # leaves room for suffixes in the name of a file or folder

# For av.open; an absolute path goes with it, since FFmpeg reads a relative one with a colon as a
# protocol. Cameras write tags in other encodings than UTF-8: they are not checked.
READING = {
    "options": {
        "format_whitelist": _VIDEO_FORMATS,
        "protocol_whitelist": "file",  # what a container names is not fetched from anywhere
        "max_pixels": str(MAX_PIXELS),  # FFmpeg decodes frames before it tells their size
    },
    "metadata_errors": "replace",
}
_CRF = "15"  # visually lossless: results are compared and measured from these files
_BT709 = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}

# Without it x264's output for the same frames varies: the assembly of its macroblock tree reads
# beyond the tree of a small frame.
_REPRODUCIBLE = {"x264-params": "cpu-independent=1"}


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames, uint8 (n, H, W, 3) RGB; frames per second; the source's (height, width) as shown.

    n_source is the number of frames that the source has; where a video does not say it, of those
    that were decoded. The frames are shown from times[0] to times[1] in the source, in seconds.
    """

    frames: np.ndarray
    fps: Fraction
    native_size: tuple[int, int]
    n_source: int
    times: tuple[Fraction, Fraction]


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
    has_control = any(unicodedata.category(character) == "Cc" for character in name)
    if has_control or len(os.fsencode(name)) > _MAX_CLIP_NAME_BYTES:
        raise UserError(
            f"the clip's name {shown(name)} holds control characters or more than "
            f"{_MAX_CLIP_NAME_BYTES} bytes; rename it"
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
        check_kind(path)
        return path
    siblings = sorted(path.parent.iterdir()) if os.path.isdir(path.parent) else []
    found = [p for p in siblings if p.stem == path.name and p.suffix.lower() in VIDEO_SUFFIXES]
    if not found:
        raise MissingFileError(f"{path}: no such video or folder")
    if len(found) > 1:
        raise UserError(f"{path}: could be any of {', '.join(p.name for p in found)}; name one")
    return found[0]


def read_clip(
    path: str | Path,
    n_frames: int | None,
    *,
    start: int = 0,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    own_size: bool = False,
    fit: str = "stretch",
    fps: Fraction | None = None,
) -> Clip:
    """Read frames start, start + stride, ... of a video, GIF or folder of images, resized.

    Frames are shown the right way up (rotation metadata, EXIF) and resized one by one: native
    frames never pile up in memory. Decoding stops after the last frame needed. A clip that is
    shorter than asked for gives the frames that it has, with a warning.

    Args:
        path: the video or the folder; images in natural order, transparent ones over white.
        n_frames: how many frames, at least 1; None: all.
        start: index of the first frame.
        stride: step between frames; the frame rate is divided by it.
        size: (height, width) in pixels; None chooses `default_size`.
        own_size: without a size, take the first frame's.
        fit: "stretch" or "crop", as in `fit_frame`.
        fps: the result's frame rate; None takes the source's average rate (a folder's is
            DEFAULT_FOLDER_FPS) divided by stride.

    Raises:
        MissingFileError: there is no such path.
        UserError: the size is too large, the source cannot be read, or its frames would not fit
            into memory.
    """
    path = Path(path)
    most = 10**9 if n_frames is None else n_frames  # more than any clip has
    if size is not None:
        check_size("H and W", *size)
    if not os.path.exists(path):
        raise MissingFileError(f"{path}: no such video or folder")
    check_kind(path)

    frames: list[np.ndarray] = []
    seen: list[tuple[tuple[int, int], Fraction | None]] = []  # native sizes, times

    def keep(image: Image.Image, there: int, time: Fraction | None) -> None:
        seen.append(((image.height, image.width), time))
        fitted = size or (seen[0][0] if own_size else default_size(*seen[0][0]))
        # Before memory is full. A header may be wrong, so the frames read so far count too.
        check_memory(max(len(frames) + 1, min(most, there)), *fitted)
        frames.append(np.asarray(fit_frame(image, fitted, fit)))

    wanted = range(start, start + most * stride, stride)
    read = _read_folder if path.is_dir() else _read_video
    n_source, rate = read(path, wanted, keep)
    if not frames:
        raise UserError(f"{path}: start {start} is beyond the end: the clip has {n_source} frames")
    if n_frames is not None and len(frames) < n_frames:
        logger.warning("%s: %d frames requested, only %d available", path, n_frames, len(frames))
    shown = _shown([time for _, time in seen], wanted, rate)
    return Clip(np.stack(frames), fps or rate / stride, seen[0][0], n_source, shown)


def _shown(
    times: list[Fraction | None], wanted: range, rate: Fraction
) -> tuple[Fraction, Fraction]:
    """When wanted frames begin and end, by their times or, where these are not known, numbers."""
    first, last = (wanted[i] / rate if times[i] is None else times[i] for i in (0, len(times) - 1))
    return first, last + wanted.step / rate


def check_memory(n_frames: int, height: int, width: int) -> None:
    """Refuses a clip that does not fit into this machine's memory, by a UserError."""
    # The list of frames, and the clip that they are copied to.
    needed = 2 * n_frames * height * width * 3
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise UserError(
            f"{n_frames} frames of {width}x{height} need {needed / 1e9:.1f} GB of memory, and this "
            f"machine has {total / 1e9:.1f} GB; take fewer (--n_frames) or smaller ones (--H, --W)"
        )


def _read_video(
    path: Path, wanted: range, keep: Callable[[Image.Image, int, Fraction | None], None]
) -> tuple[int, Fraction]:
    """Calls `keep` with each wanted frame, the number of them in the video, 0 if not known, and
    its time in seconds, if known.

    Returns (frames of the video, or decoded ones, average frame rate).
    """
    try:
        container = av.open(os.path.abspath(path), **READING)
    except av.FFmpegError as error:
        raise UserError(f"{path}: not a video that can be read ({error.strerror})") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise UserError(f"{path}: has no video stream")
        if stream.disposition & Disposition.attached_pic:
            raise UserError(f"{path}: has no video stream, but sound with a cover picture")
        if stream.codec_context is None:
            raise UserError(f"{path}: there is no decoder for its video codec")
        check_size(path, stream.codec_context.height, stream.codec_context.width)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        there = len(range(wanted.start, max(wanted.start, stream.frames), wanted.step))
        n_seen, first = 0, None
        try:
            for frame in container.decode(stream):
                if n_seen in wanted:
                    if frame.is_corrupt:
                        raise _bad_frame(path, n_seen, "cannot be decoded (damaged data)")
                    check_size(path, frame.height, frame.width)
                    image = _displayed(path, frame)
                    first = first or image.size
                    if image.size != first:
                        sizes = "is {}x{}, those before it {}x{}".format(*image.size, *first)
                        raise _bad_frame(path, n_seen, sizes)
                    # AVI has no times of display, but of decoding; its frames follow its rate.
                    timed = frame.pts is not None and container.format.name != "avi"
                    keep(image, there, frame.pts * frame.time_base if timed else None)
                n_seen += 1
                if n_seen > wanted[-1]:
                    break
        except av.FFmpegError as error:
            raise _bad_frame(path, n_seen, f"cannot be decoded ({error.strerror})") from error
        rate = stream.average_rate or stream.guessed_rate
    if not n_seen:
        raise UserError(f"{path}: has no frame that can be decoded")
    if not rate:
        logger.warning("%s: has no frame rate; using %d", path, DEFAULT_FOLDER_FPS)
        rate = Fraction(DEFAULT_FOLDER_FPS)
    # Variable rates average to unwieldy fractions; 1001 keeps 30000/1001 and its kin exact.
    n_source = max(n_seen, stream.frames if n_seen > wanted[-1] else 0)
    return n_source, rate.limit_denominator(1001) or rate


def _bad_frame(path: Path, index: int, fault: str) -> UserError:
    remedy = "; a smaller n_frames takes only frames before it" if index else ""
    return UserError(f"{path}: frame {index} {fault}{remedy}")


def _displayed(path: Path, frame: av.VideoFrame) -> Image.Image:
    """Convert a decoded frame to RGB and turn it as its display matrix says."""
    # Without an explicit target, PyAV up to 16 at least ignores the frame's own colour matrix.
    array = frame.to_ndarray(format="rgb24", dst_colorspace="ITU601")
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is not None:  # (x, y) -> (a x + c y, b x + d y) with y down
        turn = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].flatten() / 65536
        a, b, c, d = np.rint(turn / max(np.abs(turn).max(), 1e-5)).astype(int).tolist()
        if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or a * d == b * c:
            raise UserError(f"{path}: is rotated by something other than quarter turns")
        array = array[::d, ::a] if a else array.swapaxes(0, 1)[::b, ::c]
    return Image.fromarray(np.ascontiguousarray(array))


def _read_folder(
    path: Path, wanted: range, keep: Callable[[Image.Image, int, Fraction | None], None]
) -> tuple[int, Fraction]:
    """As `_read_video`; the frame rate is DEFAULT_FOLDER_FPS."""
    images = folder_images(path)
    chosen = images[wanted.start : wanted.stop : wanted.step]
    first = None
    for image_path in chosen:
        image = read_image(image_path)
        own = f"{image_path.name} ({image.width}x{image.height})"
        first = first or (image.size, own)
        if image.size != first[0]:
            sizes = f"{first[1]} and {own}"
            raise UserError(f"{path}: images of different sizes: {sizes}, as width x height")
        keep(image, len(chosen), None)
    return len(images), Fraction(DEFAULT_FOLDER_FPS)


def frame_rate(text: str) -> Fraction:
    """Read a frame rate that is spelled as a number or a fraction: "20", "29.97", "30000/1001".

    Raises:
        UserError: it is neither, or not above 0 and at most MAX_FPS.
    """
    # No exponents: a fraction of 1e999999999 would be computed, digit by digit.
    spelled = re.fullmatch(r"[0-9]{1,12}/[0-9]{1,12}|[0-9]{0,12}\.?[0-9]{0,12}", text.strip())
    with suppress(ValueError, ZeroDivisionError):
        rate = Fraction(text).limit_denominator(MAX_FPS_DENOMINATOR) if spelled else 0
        if 0 < rate <= MAX_FPS:
            return rate
    raise UserError(f"{text[:40]!r}, expected a number or a fraction above 0 and at most {MAX_FPS}")


def source_sha256(path: str | Path) -> str:
    """Hash a clip's source: a video's bytes; a folder's image names and bytes in natural order."""
    path = Path(path)
    check_kind(path)
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for image in folder_images(path):
        # Both parts have no room for ambiguity: a name holds no NUL, a digest's length is fixed.
        digest.update(os.fsencode(image.name) + b"\0" + bytes.fromhex(sha256_file(image)))
    return digest.hexdigest()


def save_video(
    path: str | Path, frames: Iterable[np.ndarray], fps: Fraction, audio: Path | None = None
) -> None:
    """Write H.264 video (yuv420p, tagged BT.709) at an exact constant frame rate.

    Args:
        path: the file, .mp4 or .mov; replaced only when all is written.
        frames: RGB uint8 (H, W, 3), all of one even size; at least one. May be a generator.
        fps: frames per second, above 0.
        audio: a file of `audio.cut_audio`; its packets are copied, as long as there are frames.

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
        sound = _add_audio(container, audio) if audio else deque()
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
            while sound and _middle(sound[0]) < (index + 1) / fps:
                container.mux(sound.popleft())
        container.mux(stream.encode())


def _middle(packet: av.Packet) -> Fraction:
    """When half of a packet was heard, in seconds."""
    return (packet.pts + Fraction(packet.duration or 0, 2)) * packet.time_base


def _add_audio(container: av.container.OutputContainer, path: Path) -> deque[av.Packet]:
    """Adds the audio stream of a file to a video that is written; returns its packets."""
    with av.open(os.path.abspath(path), **READING) as source:
        template = source.streams.audio[0]
        stream = container.add_stream_from_template(template)
        packets = deque(packet for packet in source.demux(template) if packet.size)
    for packet in packets:
        packet.stream = stream
    return packets
