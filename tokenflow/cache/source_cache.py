"""The source cache: what preprocess.py computes once per clip and every edit of it reads.

    <save_dir>/sd_<version>/<clip>/steps_<S>/nframes_<n>-<digest of source, range, model>/
        manifest.yaml            all that the cache depends on, and its files; written last
        frames/00000.png ...     the resized source frames
        latents/clean.safetensors, latents/noisy_latents_<t>.safetensors
        depth.safetensors        where the model or its ControlNet wants depth
        audio.m4a                the sound of the frames, where the clip has any
        inversion_prompt.txt
        inverted.mp4             the reconstruction; with --reconstruction full
        features/                what edits need from the source (source_features.py), added later

A cache is built in a hidden folder and appears whole (storage/work_dir.py). Its manifest has the
checksums of all other files; a file's is compared before it is used. safetensors only: no pickle is
read or written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import AllowInfNan, Field

from tokenflow.diffusion.model_names import ControlSettings
from tokenflow.storage.images import frame_name, load_frames
from tokenflow.storage.manifest import (
    FileRecord,
    check_file,
    load_manifest,
    refuse_unexpected_files,
)
from tokenflow.storage.schema import Model
from tokenflow.storage.video import frame_rate
from tokenflow.storage.work_dir import begun_dirs, is_locked
from util import MissingFileError, UserError, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("tokenflow")

FORMAT = 3
MANIFEST = "manifest.yaml"
CLEAN_LATENTS = "clean"
DEPTH_FILE = "depth.safetensors"
AUDIO_FILE = "audio.m4a"
FEATURES = "features"  # their folder in a cache
_CACHE_NAME = re.compile("nframes_[0-9]+(-[0-9a-f]{8})?")


Figure = Annotated[float, AllowInfNan(True)]


class Identity(Model):
    """What a second preprocess run must agree with: two caches that share it are the same."""

    source_sha256: str
    frame_start: int
    frame_stride: int
    n_frames: int
    height: int
    width: int
    fit: str
    fps: str  # a fraction, "20" or "30000/1001"
    model_revision: str
    inversion_prompt: str
    steps: int
    save_steps: int
    inversion_iters: int
    inversion_tol: float
    recon_steps: int
    dtype: str
    control: ControlSettings | None
    depth_model: str | None
    adapters: str = ""  # digest of LoRAs and embeddings; left out where there are none


class Manifest(Identity):
    """All that a cache depends on, the figures of its making, and its files."""

    clip: str
    source_name: str
    frames_asked: int  # more than n_frames if the clip is that short
    native_size: list[int] | None = None  # (height, width) of the clip's own frames
    sd_version: str
    model_key: str
    architecture_key: str | None = None  # whose configurations a single-file model_key has
    timesteps: list[int]  # the saved ones, noisiest first
    lora: list[str] | None = None
    lora_scale: list[float] | None = None
    embeddings: list[str] | None = None
    # How it went.
    reconstruction: Literal["full", "sample", "none"] = "full"
    psnr: Figure = math.nan  # of the reconstruction against the frames, dB; NaN: not measured
    vae_psnr: Figure = math.nan  # of the VAE's own reconstruction, dB
    psnr_to_vae: Figure = math.nan  # of the reconstruction against the VAE's own, dB
    seconds: dict[str, float] = Field(default_factory=dict)  # by stage
    image_forwards: dict[str, int] = Field(default_factory=dict)  # by stage: images x branches
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)  # by the path within the cache
    format: int = FORMAT


# The fields by which caches of one clip's name lie side by side; each has a folder of its own.
PLACE = ("source_sha256", "frame_start", "frame_stride", "model_revision", "adapters")


def identity(manifest: Manifest) -> dict[str, object]:
    """The settings by which two caches are the same, as plain YAML values."""
    return _without_none(manifest.model_dump(include=set(Identity.model_fields)))


def cache_key(manifest: Manifest) -> str:
    """A digest of `identity`: what a result is of, however often its cache is computed."""
    return _digest(identity(manifest))


def clip_folder(save_dir: str | Path, sd_version: str, clip: str) -> Path:
    """The folder of the caches of all clips of a name."""
    return Path(save_dir) / f"sd_{sd_version}" / clip


def cache_folder(save_dir: str | Path, manifest: Manifest) -> Path:
    """The folder of a cache: one for each source, range of frames, number of steps and model.

    A cache that an earlier version wrote has no digest in its name; it stays where it is.
    """
    parent = clip_folder(save_dir, manifest.sd_version, manifest.clip) / f"steps_{manifest.steps}"
    earlier = parent / f"nframes_{manifest.n_frames}"
    folder = earlier.with_name(f"{earlier.name}-{_digest(_place(manifest))[:8]}")
    if not folder.exists() and (earlier / MANIFEST).is_file():
        try:
            if _place(read_manifest(earlier)) == _place(manifest):
                return earlier
        except UserError as error:
            log.warning("%s", error)
    return folder


def _place(manifest: Manifest) -> dict[str, object]:
    return _without_none({key: getattr(manifest, key) for key in PLACE})


def _without_none(values: dict[str, object]) -> dict[str, object]:
    """Without `adapters` where there are none: digests are as before there were any."""
    return {key: value for key, value in values.items() if key != "adapters" or value}


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def latents_file(name: str | int) -> str:
    """The path within a cache of the latents at a timestep, or of the clean ones."""
    stem = CLEAN_LATENTS if name == CLEAN_LATENTS else f"noisy_latents_{name}"
    return f"latents/{stem}.safetensors"


@dataclass(frozen=True)
class SourceCache:
    """A finished cache; made by `open_cache`.

    Each method raises a UserError that says what to do if a file is missing or damaged, or not the
    one that the manifest knows: after the cache was opened, it may be replaced or vanish.
    """

    folder: Path
    manifest: Manifest
    advice: str = "build the cache again: preprocess.py --overwrite"  # about damage
    _checked: set[str] = field(default_factory=set, compare=False)

    @property
    def sha256(self) -> str:
        """A digest of what it was made from and of its files, by which results know it."""
        files = {name: record["sha256"] for name, record in self.manifest.files.items()}
        return _digest([identity(self.manifest), files])

    @property
    def fps(self) -> Fraction:
        return frame_rate(self.manifest.fps)

    def latents(self, name: str | int, n_frames: int) -> Tensor:
        """The first n_frames latents at a saved timestep (or CLEAN_LATENTS), (n, 4, h, w)."""
        return self._tensor(latents_file(name), "latents")[:n_frames]

    def frames(self, n_frames: int) -> np.ndarray:
        """The first n_frames source frames, (n, H, W, 3) uint8."""
        for index in range(n_frames):
            self.check(f"frames/{frame_name(index)}")
        with self._advising():
            return load_frames(self.folder / "frames", n_frames)

    def audio(self) -> Path | None:
        """The file of the frames' sound, where there is any (`storage.audio.cut_audio`)."""
        if AUDIO_FILE not in self.manifest.files:
            return None
        self.check(AUDIO_FILE)
        return self.folder / AUDIO_FILE

    @property
    def has_depth(self) -> bool:
        """Whether preprocess estimated depth."""
        return DEPTH_FILE in self.manifest.files

    def depth(self, n_frames: int) -> Tensor | None:
        """Depth of the first n_frames, (n, 1, H, W) in [0, 1], where there is any."""
        return self._tensor(DEPTH_FILE, "depth")[:n_frames] if self.has_depth else None

    def _tensor(self, name: str, key: str) -> Tensor:
        self.check(name)
        with self._advising():
            return load_tensors(self.folder / name)[key]

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Says what to do about a file that vanished, or was damaged, after it was checked."""
        try:
            yield
        except UserError as error:
            raise type(error)(f"{error}; {self.advice}") from error

    def check(self, name: str) -> None:
        """Compares a file with its checksum, once: `name` is its path within the cache."""
        if name not in self._checked:
            check_file(self.folder, name, self.manifest.files, self.advice)
            self._checked.add(name)

    def check_source(self, timesteps: Iterable[int], n_frames: int) -> None:
        """Compares what an edit of n_frames reads but for the features with its checksums."""
        names = [latents_file(name) for name in (CLEAN_LATENTS, *timesteps)]
        names += [f"frames/{frame_name(index)}" for index in range(n_frames)]
        optional = {DEPTH_FILE, AUDIO_FILE} & self.manifest.files.keys()
        for name in (*names, *optional):
            self.check(name)

    def check_unchanged(self) -> None:
        """Refuses a cache that was replaced since it was opened."""
        if self.sha256 != SourceCache(self.folder, read_manifest(self.folder)).sha256:
            raise UserError(f"{self.folder}: was replaced meanwhile; run the same command again")

    def verify(self) -> None:
        """Compares every file with its checksum, and refuses files that the manifest lacks."""
        for name in self.manifest.files:
            self.check(name)
        refuse_unexpected_files(self.folder, {MANIFEST, *self.manifest.files}, FEATURES)


# What to do about a cache that is missing (None) or damaged (its manifest).
Remedy = Callable[[Manifest | None], str]


def remake(manifest: Manifest | None) -> str:
    """What to do about a damaged cache, where no more is known."""
    return "build the cache again: preprocess.py"


def find_cache(
    clip_folder: Path,
    wanted: Mapping[str, object],
    n_frames: int,
    remedy: Remedy = remake,
    verify: bool = False,
) -> SourceCache:
    """The cache of a clip for an edit of up to n_frames.

    Of caches that differ in their number of frames only: the one of n_frames, else the longest.

    Args:
        clip_folder: of the caches of all clips of that name.
        wanted: what the cache's manifest must say: PLACE and steps; None leaves one open.
        verify: as in `open_cache`.

    Raises:
        MissingFileError: if no finished one exists.
        UserError: if several fit, or its manifest or one of its files is damaged.
    """
    found, damaged = {}, []
    steps = "steps_*" if wanted["steps"] is None else f"steps_{wanted['steps']}"
    for folder in sorted(clip_folder.glob("steps_*/nframes_*")):
        if _CACHE_NAME.fullmatch(folder.name) and (folder / MANIFEST).is_file():
            try:
                manifest = read_manifest(folder, remedy)
                _check_name(folder, manifest)
                found[folder] = manifest
            except (UserError, OSError) as error:
                if folder.parent.match(steps):
                    damaged.append(error)
    fitting = {folder: m for folder, m in found.items() if not _mismatches(m, wanted)}
    if not fitting:
        if damaged:
            raise damaged[0]
        listed = _listed(found, clip_folder, wanted)
        raise MissingFileError(_no_cache(clip_folder, steps, listed, remedy(None)))
    for error in damaged:
        log.warning("%s", error)
    if len({_digest([m.steps, _place(m)]) for m in fitting.values()}) > 1:
        listed = ", ".join(_listed(fitting, clip_folder, wanted))
        raise UserError(
            f"{clip_folder}: several caches fit: {listed}; choose "
            "by n_inversion_steps, frame_start and frame_stride, or by data_path, model_key and "
            "lora (lora: [] is none)"
        )
    lengths = {m.n_frames: folder for folder, m in fitting.items()}
    return open_cache(lengths.get(n_frames, lengths[max(lengths)]), remedy, verify)


def _check_name(folder: Path, manifest: Manifest) -> None:
    """Refuses a cache whose folder, or the one that holds it, was renamed."""
    name = re.sub("^nframes_[0-9]+", f"nframes_{manifest.n_frames}", folder.name)
    proper = folder.parent.with_name(f"steps_{manifest.steps}") / name
    if proper != folder:
        raise UserError(
            f"{folder}: was renamed: it holds {manifest.n_frames} frames of {manifest.steps} "
            f"inversion steps; rename it to {proper}"
        )


def _mismatches(manifest: Manifest, wanted: Mapping[str, object]) -> list[str]:
    given = {key: value for key, value in wanted.items() if value is not None}
    return [key for key, value in given.items() if value != getattr(manifest, key)]


def _listed(
    found: Mapping[Path, Manifest], clip_folder: Path, wanted: Mapping[str, object]
) -> list[str]:
    """Caches by their folders, with what tells one from another."""
    texts = []
    with_adapters = any(manifest.adapters for manifest in found.values())
    for folder, manifest in found.items():
        adapters = [*(manifest.lora or []), *(manifest.embeddings or [])]
        others = {
            "source_sha256": f", another clip: {manifest.source_name}",
            "model_revision": f", another model: {manifest.model_key}",
        }
        told = f", lora and embeddings {adapters or 'none'}" if with_adapters else ""
        texts.append(
            f"{folder.relative_to(clip_folder.parent.parent)} (n_frames {manifest.n_frames}, "
            f"frame_start {manifest.frame_start}, frame_stride {manifest.frame_stride}, "
            f"n_inversion_steps {manifest.steps}{told}"
            f"{''.join(others.get(key, '') for key in _mismatches(manifest, wanted))})"
        )
    return texts


def _no_cache(clip_folder: Path, steps: str, found: list[str], advice: str) -> str:
    """Says that a clip has no cache that fits, what there is instead, and what to do."""
    latents = clip_folder.parent.parent
    elsewhere = sorted(latents.glob(f"*/{glob.escape(clip_folder.name)}/steps_*"))
    others = [str(p.relative_to(latents)) for p in elsewhere if p.parent != clip_folder]
    hint = f" (there is {', '.join(found + others)})" if found + others else ""
    state, place = "no cache", clip_folder / steps.removesuffix("steps_*")
    folders = sorted(clip_folder.glob(f"{steps}/nframes_*"))
    incomplete = [folder for folder in folders if not (folder / MANIFEST).is_file()]
    begun = [path for parent in clip_folder.glob(steps) for path in begun_dirs(parent, "nframes_*")]
    if incomplete:
        state = f"only a cache that lacks its manifest ({incomplete[0].name})"
        advice = f"{advice} --overwrite"
    elif any(map(is_locked, begun)):
        state = "another process is building the cache"
    elif begun and not found:
        state = "only an unfinished cache"
    return f"{place}: {state} for this clip{hint}; {advice}"


def open_cache(folder: Path, remedy: Remedy = remake, verify: bool = False) -> SourceCache:
    """Opens a finished cache after checking that its files are all there, of the right size.

    Checksums are compared when the files are read.

    Args:
        verify: compare all checksums now, and refuse files that do not belong there.

    Raises:
        UserError: if the manifest is damaged or not one of this format, or a file is missing or
            damaged.
    """
    manifest = read_manifest(folder, remedy)
    cache = SourceCache(folder, manifest, f"{remedy(manifest)} --overwrite")
    for name in manifest.files:
        check_file(folder, name, manifest.files, cache.advice, read=False)
    if verify:
        cache.verify()
    return cache


def read_manifest(folder: Path, remedy: Remedy = remake) -> Manifest:
    """Reads a cache's manifest; a UserError says if it is damaged or of another format."""
    return load_manifest(Manifest, folder / MANIFEST, FORMAT, f"{remedy(None)} --overwrite")
