"""What evaluate.py scores, found and checked before a model is loaded: results of the run scripts,
and any other program's videos.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tokenflow.cache.source_cache import MANIFEST, SourceCache, open_cache
from tokenflow.evaluation.motion import Motion, load_motion, resize_motion, truth_file, truth_shape
from tokenflow.storage import video
from tokenflow.storage.video import clip_name, load_frames, opened_image, read_clip
from util import MissingFileError, UserError, load_yaml

RESULT_FILES = ("edited.mp4", "config.yaml", "run.yaml")
TECHNIQUES = {"pnp": "PnP", "sdedit": "SDEdit", "controlnet": "ControlNet"}
BASELINES = {"reconstruction": "VAE reconstruction", "rgb_propagation": "RGB propagation"}
CONSISTENCY = {
    "extended_attention": "extended attention",
    "none": "per frame",
    "first_frame": "first frame",
}
MASK_RULE = "object: not 0; resized by nearest neighbour; pixels pooled over the clip"


@dataclass(frozen=True)
class Source:
    """A clip's frames that an edit was made from, and what is known of them on disk.

    Attributes:
        clip: its name.
        path: its path, for the ground truth beside it.
        read: reads the frames, (n, H, W, 3) uint8, resized as they were for the edit.
        shape: n, H, W.
        start, stride: which of the clip's frames they are.
        fit: how they were resized: "stretch" or "crop".
    """

    clip: str
    path: Path
    read: Callable[[], np.ndarray]
    shape: tuple[int, int, int]
    start: int = 0
    stride: int = 1
    fit: str = "stretch"


@dataclass(frozen=True)
class Subject:
    """An edited video to be scored against its source.

    Attributes:
        read: reads the edited frames, (n, H, W, 3) uint8.
        cost: the fields of a row that say what the edit took.
    """

    method: str
    source: Source
    read: Callable[[], np.ndarray]
    video: Path
    fps: float
    prompt: str | None
    source_prompt: str | None
    folder: Path | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------
# Results


def find_results(path: Path) -> list[Path]:
    """A result's folder, or all results below a folder, in order; hidden folders are left out.

    Raises:
        MissingFileError: there is no such folder.
        UserError: it holds no result.
    """
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such folder of results; a video is scored by --source")
    found = []
    for folder, below, files in os.walk(path):
        if set(RESULT_FILES) <= set(files):
            found.append(Path(folder))
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))
    if not found:
        raise UserError(f"{path}: holds no finished result ({', '.join(RESULT_FILES)})")
    return found


def method_name(config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """A short name for people of what made a result: "PnP, TokenFlow (released)".

    Args:
        config, run: a result's config.yaml and run.yaml.
    """
    technique = str(run.get("technique") or "unknown")
    if technique in BASELINES:
        return BASELINES[technique]
    consistency = str(config.get("consistency", "tokenflow"))
    marks = ["released"] if config.get("propagation") == "released" else []
    if consistency == "tokenflow":
        kind = "fixed keyframes" if config.get("keyframes") == "fixed" else "TokenFlow"
        marks += ["linear blend"] if config.get("blend") == "linear" else []
        marks += ["optical flow"] if config.get("correspondence") == "flow" else []
        bound = config.get("max_keyframes")
        marks += [f"{bound} keyframes at once"] if bound else []
    else:
        kind = CONSISTENCY.get(consistency, consistency)
    name = f"{TECHNIQUES.get(technique, technique)}, {kind}"
    return f"{name} ({', '.join(marks)})" if marks else name


def open_result(
    folder: Path, caches: dict[Path, SourceCache], source_prompt: str | None = None
) -> Subject:
    """Read a result's records and check that its frames fit its source's; decodes one frame.

    Args:
        caches: those that were opened already, added to: checking one reads all of its files.
        source_prompt: what the source shows, where the inversion prompt does not say it.

    Raises:
        UserError: naming the file that is missing, malformed or does not fit.
    """
    run_path, config_path = folder / "run.yaml", folder / "config.yaml"
    config, run = load_yaml(config_path), load_yaml(run_path)
    cache = _open_cache(run, run_path, caches)
    manifest = cache.manifest
    n_frames = len(list((folder / "frames").glob("[0-9]*.png")))
    height, width = load_frames(folder / "frames", 1).shape[1:3]
    if run.get("n_frames", n_frames) != n_frames:
        raise UserError(f"{folder}: {n_frames} frames, but run.yaml says {run['n_frames']}")
    if n_frames > manifest.n_frames or (height, width) != (manifest.height, manifest.width):
        raise UserError(
            f"{folder}: {n_frames} frames of {height}x{width} (HxW), but its source {cache.folder} "
            f"has {manifest.n_frames} of {manifest.height}x{manifest.width}"
        )
    prompt, data_path = (_text(config, key, config_path) for key in ("prompt", "data_path"))
    source = Source(
        clip=manifest.clip,
        path=Path(data_path or manifest.clip),
        read=partial(cache.frames, n_frames),
        shape=(n_frames, height, width),
        start=manifest.frame_start,
        stride=manifest.frame_stride,
        fit=manifest.fit,
    )
    return Subject(
        method=method_name(config, run),
        source=source,
        read=partial(load_frames, folder / "frames", n_frames),
        video=folder / "edited.mp4",
        fps=_number(config, "fps", config_path) or float(cache.fps),
        prompt=prompt,
        source_prompt=manifest.inversion_prompt or source_prompt,
        folder=folder,
        cost=_cost(run, run_path, n_frames, cache),
    )


def _open_cache(run: Mapping, run_path: Path, caches: dict[Path, SourceCache]) -> SourceCache:
    """The source cache that a result was made from.

    Raises:
        UserError: it is not there, or another one is.
    """
    instead = "score its edited.mp4 by --source and --edited"
    named = _text(run, "cache", run_path)
    if named is None:
        raise UserError(f"{run_path}: cache: is missing, so its source is not known; {instead}")
    folder = Path(named)
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(
            f"{run_path}: cache: there is no finished cache {folder}; run evaluate.py where the "
            f"edit was run, make the cache again, or {instead}"
        )
    if folder not in caches:
        caches[folder] = open_cache(folder)
    if run.get("cache_sha256") not in (None, caches[folder].sha256):
        raise UserError(
            f"{run_path}: the cache {folder} was made anew since, maybe of other frames; make the "
            f"result anew, or {instead}"
        )
    return caches[folder]


def _cost(run: Mapping, run_path: Path, n_frames: int, cache: SourceCache) -> dict[str, Any]:
    """What a result's record says of time and memory; None for what it does not say."""
    seconds = run.get("seconds")
    if seconds is not None and not isinstance(seconds, dict):
        raise UserError(f"{run_path}: seconds: expected a mapping of stages, got {seconds!r:.80}")
    if seconds is not None:
        seconds = {str(stage): _number(seconds, stage, run_path) for stage in seconds}
    work = [seconds[s] for s in ("edit", "decode", "write") if (seconds or {}).get(s) is not None]
    inversion = cache.manifest.seconds.get("inversion")
    peak = _number(run, "peak_memory_bytes", run_path)
    return {
        "seconds": seconds,
        "seconds_per_frame": sum(work) / n_frames if work else None,
        "inversion_seconds_per_frame": (
            None if inversion is None else inversion / cache.manifest.n_frames
        ),
        "peak_memory_bytes": None if peak is None else int(peak),
    }


def _number(mapping: Mapping, key: Any, path: Path) -> float | None:
    value = mapping.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise UserError(f"{path}: {key}: expected a number, got {value!r:.80}")
    return float(value)


def _text(mapping: Mapping, key: str, path: Path) -> str | None:
    value = mapping.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: {key}: expected text, got {value!r:.80}")
    return value


# ---------------------------------------------------------------------------------------------
# Other programs' videos


def open_video(
    source: Path,
    edited: Path,
    *,
    prompt: str | None,
    source_prompt: str | None = None,
    method: str | None = None,
    n_frames: int | None = None,
    start: int = 0,
    size: tuple[int, int] | None = None,
) -> Subject:
    """Read any edited video and its source clip, which must have as many frames of one size.

    Args:
        source, edited: videos, GIFs or folders of images.
        method: what to call it; None: the edited video's name.
        n_frames: how many frames of both; None: all.
        start: the source's frame that the edited video begins with.
        size: (height, width) to resize both to; None: their own.

    Raises:
        UserError: one cannot be read, or they differ; says how to choose a common part.
    """
    clips = [_read(source, n_frames, start, size), _read(edited, n_frames, 0, size)]
    (n, *frame_size), (n_edited, *edited_size) = (clip.frames.shape[:3] for clip in clips)
    if frame_size != edited_size:
        sizes = [f"{path}: {h}x{w}" for path, (h, w) in
                 ((edited, edited_size), (source, frame_size))]  # fmt: skip
        raise UserError(
            f"frames of different sizes (HxW): {', '.join(sizes)}; choose one for both with --H "
            "and --W"
        )
    if n != n_edited:
        asked = f" (of {n_frames} asked for)" if n_frames else ""
        raise UserError(
            f"different numbers of frames{asked}: {edited}: {n_edited}, {source}: {n} from frame "
            f"{start}; score a common part with --n_frames {min(n, n_edited)} or less, after "
            "--start FRAME of the source"
        )
    return Subject(
        method=method or clip_name(edited),
        source=Source(clip_name(source), source, lambda: clips[0].frames, (n, *frame_size), start),
        read=lambda: clips[1].frames,
        video=edited,
        fps=float(clips[1].fps),
        prompt=prompt,
        source_prompt=source_prompt,
    )


def _read(path: Path, n_frames: int | None, start: int, size: tuple[int, int] | None) -> video.Clip:
    if size is None:
        size = read_clip(path, 1, start=start, size=(8, 8)).native_size
    if n_frames is not None:
        return read_clip(path, n_frames, start=start, size=size)
    with _not_warned_of("frames asked for"):
        return read_clip(path, 10**9, start=start, size=size)


@contextlib.contextmanager
def _not_warned_of(words: str) -> Iterator[None]:
    """Keep one of video.py's warnings back: who asks for all frames knows that there are fewer."""

    def other(record: logging.LogRecord) -> bool:
        return words not in str(record.msg)

    video.logger.addFilter(other)
    try:
        yield
    finally:
        video.logger.removeFilter(other)


# ---------------------------------------------------------------------------------------------
# Ground truth and masks, which lie on disk for the whole clip as it was filmed


def find_truth(source: Source, truth: Path | None) -> Path:
    """The file of a clip's true motion, after a look at its header.

    Raises:
        UserError: it is not there, too short, or not of these frames.
    """
    path = truth_file(source.path, truth)
    pairs, height, width = truth_shape(path)
    n, *size = source.shape
    last = source.start + n - 1
    if source.stride != 1:
        raise UserError(f"{path}: is of consecutive frames, the edit is of every {source.stride}th")
    if pairs < last:
        raise UserError(f"{path}: holds {pairs + 1} frames, the edit needs those up to {last + 1}")
    if source.fit == "crop" and height * size[1] != width * size[0]:
        raise UserError(f"{path}: is of {height}x{width} (HxW), the edit of a part cropped from it")
    return path


def read_truth(source: Source, path: Path) -> Motion:
    """The true motion of the frames, from `find_truth`'s file."""
    motion = load_motion(path)
    part = slice(source.start, source.start + source.shape[0] - 1)
    return resize_motion(Motion(motion.flow[part], motion.visible[part]), source.shape[1:])


def find_masks(source: Source, masks: Path) -> list[Path]:
    """The PNG files of a clip's masks, one a frame.

    Args:
        masks: a folder of PNG files, or one with a folder `<clip>` of them inside.

    Raises:
        UserError: there are none for the clip, or not enough.
    """
    folder = next((f for f in (masks / source.clip, masks) if f.is_dir()), None)
    # By length first, so that numbers without leading zeros are in order: 9.png before 10.png.
    files = list(folder.glob("[!.]*.png")) if folder else []
    files.sort(key=lambda path: (len(path.name), path.name))
    if not files:
        raise MissingFileError(
            f"--masks: {masks}: expected PNG files, or a folder {source.clip}/ of them"
        )
    wanted = range(source.start, source.start + source.shape[0] * source.stride, source.stride)
    if len(files) <= wanted[-1]:
        raise UserError(f"--masks: {folder}: {len(files)} masks, the edit needs {wanted[-1] + 1}")
    return [files[i] for i in wanted]


def read_masks(source: Source, files: list[Path]) -> np.ndarray:
    """Masks resized as the frames were: (n, H, W) bool, True where the file is not 0."""
    height, width = source.shape[1:]
    masks = []
    for path in files:
        with opened_image(path, "a mask") as image:
            # A palette's indices, not its colours; of other pictures, any channel but alpha.
            one_channel = image.mode in ("P", "L", "1", "I", "I;16")
            values = np.asarray(image if one_channel else image.convert("RGB"))
        mask = Image.fromarray((values.reshape(*values.shape[:2], -1) != 0).any(-1).astype("u1"))
        if source.fit == "crop":
            mask = ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST)
        else:
            mask = mask.resize((width, height), Image.Resampling.NEAREST)
        masks.append(np.asarray(mask) > 0)
    return np.stack(masks)
