"""What evaluate.py scores, found and checked before a model is loaded: results of the run scripts,
and any other program's videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np

from tokenflow.editing.results import frame_files, read_result
from tokenflow.evaluation.motion import Motion, load_motion, resize_motion, truth_file, truth_shape
from tokenflow.evaluation.options import OtherVideo
from tokenflow.evaluation.score_table import Row
from tokenflow.storage import images
from tokenflow.storage.images import load_frames
from tokenflow.storage.video import Clip, clip_name, read_clip
from util import UserError

MASK_RULE = "object: not 0; resized by nearest neighbour; pixels pooled over the clip"


@dataclass(frozen=True)
class Source:
    """A clip's frames that an edit was made from, and what is known of them on disk."""

    clip: str
    path: Path  # the clip's, for the ground truth next to it
    # The frames, (n, H, W, 3) uint8, resized as for the edit.
    read: Callable[[], np.ndarray] = field(compare=False)
    shape: tuple[int, int, int]  # n, H, W
    numbers: tuple[int, ...]  # which of the clip's frames they are, ascending
    fit: str = "stretch"  # how they were resized, or "crop"


@dataclass(frozen=True)
class Subject:
    """An edited video to be scored against its source."""

    row: Row  # without measures and protocol
    source: Source
    read: Callable[[], np.ndarray]  # the edited frames, (n, H, W, 3) uint8
    resized: str = ""  # to add to their resolution, if they were resized to the source's


# ---------------------------------------------------------------------------------------------
# Results


def open_result(folder: Path, source_prompt: str | None = None) -> Subject:
    """Read a result's records and check that its frames fit its source's; decodes one frame.

    Those of a result with output_size: source are resized to the source's as they are read.

    Args:
        source_prompt: what the source shows, where the inversion prompt does not say it.

    Raises:
        UserError: naming the file that is missing, malformed or does not fit.
    """
    result = read_result(folder)
    try:
        cache = result.cache()
    except UserError as error:
        instead = "or score its edited.mp4 by --source and --edited"
        raise type(error)(f"{error}; {instead}") from error
    manifest = cache.manifest
    n_frames = len(frame_files(folder))
    size = height, width = manifest.height, manifest.width
    found = load_frames(folder / "frames", 1).shape[1:3]
    is_resized = found != size and result.config.get("output_size") == "source"
    if result.n_frames != n_frames:
        raise UserError(f"{folder}: {n_frames} frames, but run.yaml says {result.n_frames}")
    if n_frames > manifest.n_frames or (found != size and not is_resized):
        raise UserError(
            f"{folder}: {n_frames} frames of {found[0]}x{found[1]} (HxW), but its source "
            f"{cache.folder} has {manifest.n_frames} of {height}x{width}"
        )
    inversion, peak = manifest.seconds.get("inversion"), result.run.get("peak_memory_bytes")
    source = Source(
        clip=manifest.clip,
        path=Path(result.config.get("data_path") or manifest.clip),
        read=partial(cache.frames, n_frames),
        shape=(n_frames, height, width),
        numbers=tuple(islice(count(manifest.frame_start, manifest.frame_stride), n_frames)),
        fit=manifest.fit,
    )
    row = Row(
        method=result.method,
        clip=manifest.clip,
        prompt=result.prompt,
        source_prompt=manifest.inversion_prompt or source_prompt,
        folder=str(folder),
        video=str(folder / "edited.mp4"),
        n_frames=n_frames,
        height=height,
        width=width,
        fps=float(result.config.get("fps") or cache.fps),
        protocol={},
        seconds=result.run.get("seconds"),
        seconds_per_frame=result.seconds_per_frame,
        inversion_seconds_per_frame=inversion and inversion / manifest.n_frames,
        peak_memory_bytes=peak and int(peak),
    )
    resized = f" (edit resized from {found[0]}x{found[1]})" if is_resized else ""
    return Subject(row, source, partial(load_frames, folder / "frames", n_frames, size), resized)


# ---------------------------------------------------------------------------------------------
# Other programs' videos


def open_video(other: OtherVideo, source_prompt: str | None = None) -> Subject:
    """Read an edited video and its source clip, which must have as many frames of one size.

    Raises:
        UserError: one cannot be read, or they differ; says how to choose a common part.
    """
    source, edited = Path(other.source), Path(other.edited)
    n_frames, start, size = other.n_frames, other.start, (other.H, other.W) if other.H else None
    by_time = other.match == "times"
    clips = [
        read_clip(path, None if by_time else n_frames, start=first, size=size, own_size=True)
        for path, first in ((source, start), (edited, 0))
    ]
    numbers = range(len(clips[0].frames))
    if by_time:
        clips, numbers = _at_same_times(*clips, n_frames)
    (n, *frame_size), (n_edited, *edited_size) = (clip.frames.shape[:3] for clip in clips)
    if frame_size != edited_size:
        (h, w), (h_edited, w_edited) = frame_size, edited_size
        raise UserError(
            f"frames of different sizes (HxW): {edited}: {h_edited}x{w_edited}, {source}: {h}x{w}; "
            "choose one for both with --H and --W"
        )
    if other.match is None and not (source.is_dir() or edited.is_dir()):  # which have no rate
        _check_rates(*clips, source, edited)
    if n != n_edited:
        asked = f" (of {n_frames} asked for)" if n_frames else ""
        raise UserError(
            f"different numbers of frames{asked}: {edited}: {n_edited}, {source}: {n} from frame "
            f"{start}; score a common part with --n_frames {min(n, n_edited)} or less, after "
            "--start FRAME of the source"
        )
    row = Row(
        method=other.method or clip_name(edited),
        clip=clip_name(source),
        prompt=other.prompt,
        source_prompt=source_prompt,
        folder=None,
        video=str(edited),
        n_frames=n,
        height=frame_size[0],
        width=frame_size[1],
        fps=float(clips[1].fps),
        protocol={},
    )
    own = tuple(start + number for number in numbers)
    original = Source(row.clip, source, lambda: clips[0].frames, (n, *frame_size), own)
    return Subject(row, original, lambda: clips[1].frames)


def _check_rates(source: Clip, edited: Clip, source_path: Path, edited_path: Path) -> None:
    """Refuses frame rates by which the last frames compared are half a frame apart, or more."""
    low, high = sorted((source.fps, edited.fps))
    if (min(len(source.frames), len(edited.frames)) - 1) * (1 - low / high) >= 0.5:
        raise UserError(
            f"different frame rates: {edited_path}: {float(edited.fps):g}, {source_path}: "
            f"{float(source.fps):g}; choose what to compare: --match times (frames of the same "
            "time) or --match frames (of the same number)"
        )


def _at_same_times(
    source: Clip, edited: Clip, n_frames: int | None
) -> tuple[list[Clip], list[int]]:
    """Both clips at the lower of their frame rates, n_frames at most; the source's frame numbers.

    A frame is the nearest in time; both clips begin at time 0.
    """
    rate = min(source.fps, edited.fps)
    chosen = []
    for clip in (source, edited):
        numbers = (round(k * clip.fps / rate) for k in range(n_frames or len(clip.frames)))
        chosen.append([number for number in numbers if number < len(clip.frames)])
    n = min(map(len, chosen))
    clips = [
        replace(clip, frames=clip.frames[numbers[:n]], fps=rate)
        for clip, numbers in zip((source, edited), chosen, strict=True)
    ]
    return clips, chosen[0][:n]


# ---------------------------------------------------------------------------------------------
# Ground truth and masks, which lie on disk for the whole clip as it was filmed


def find_truth(source: Source, truth: str | Path | None) -> Path:
    """The file of a clip's true motion, after a look at its header.

    Raises:
        UserError: it is not there, too short, or not of these frames.
    """
    path = truth_file(source.path, Path(truth) if truth else None)
    pairs, height, width = truth_shape(path)
    n, *size = source.shape
    first, last = source.numbers[0], source.numbers[-1]
    if last - first != n - 1:
        raise UserError(f"{path}: is of consecutive frames, the edit skips some")
    if pairs < last:
        raise UserError(f"{path}: holds {pairs + 1} frames, the edit needs those up to {last + 1}")
    if source.fit == "crop" and height * size[1] != width * size[0]:
        raise UserError(f"{path}: is of {height}x{width} (HxW), the edit of a part cropped from it")
    return path


def read_truth(source: Source, truth: str | Path | None) -> Motion:
    """The true motion of the frames, from the file of `find_truth`."""
    motion = load_motion(find_truth(source, truth))
    part = slice(source.numbers[0], source.numbers[-1])
    return resize_motion(Motion(motion.flow[part], motion.visible[part]), source.shape[1:])


def find_masks(source: Source, masks: str | Path) -> list[Path]:
    """The files of a clip's masks, one a frame; errors as in `images.find_masks`."""
    return images.find_masks("--masks", masks, source.clip, source.numbers)


def read_masks(source: Source, masks: str | Path) -> np.ndarray:
    """`find_masks`' files, resized as the frames were: (n, H, W) bool, True where one is not 0."""
    return images.read_masks(find_masks(source, masks), source.shape[1:], source.fit)
