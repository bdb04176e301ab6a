"""Result folders: what an edit writes, and reading it again.

<output_path>/<technique>/<clip>/<prompt slug>-<8 hex>/
    edited.mp4                  at the clip's own frame rate
    frames/00000.png ...
    side_by_side.mp4            source and edit
    edited_latents.safetensors  (n, 4, h, w) float32
    config.yaml                 every setting
    run.yaml                    versions, device, seconds per stage, peak memory; written last
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tokenflow.cache.source_cache import (
    MANIFEST,
    SourceCache,
    cache_key,
    open_cache,
    read_manifest,
)
from tokenflow.storage.images import load_frames
from tokenflow.storage.manifest import FileRecord, check_file, refuse_unexpected_files
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.video import clip_name
from tokenflow.storage.yaml_files import load_yaml
from util import MissingFileError, UserError, slug

if TYPE_CHECKING:  # importing them loads diffusers, which readers of results do not need
    from tokenflow.editing.inputs import EditInputs

log = logging.getLogger("tokenflow")

RUN_FILE = "run.yaml"
PLACES = ("output_path", "latents_path", "data_path")
FIND_THE_CACHE = ("n_inversion_steps", "frame_start", "frame_stride")
CHANGES_NO_RESULT = (
    "chunk_size", "source_features", "compile", "checkpoint_every", "verify", "allow_pickle",
    "preview_every", "preview_vae", "estimate", "gradient_checkpointing", "sample_every",
)  # fmt: skip
# Keys of which only the files' contents count, by `adapters` and the cache's identity.
BY_CONTENT = ("architecture_key", "lora", "lora_scale", "lora_for", "embeddings")
RESULT_FILES = ("edited.mp4", "config.yaml", "run.yaml")
# The base techniques, and their names for people.
TECHNIQUES = {"pnp": "PnP", "sdedit": "SDEdit", "controlnet": "ControlNet"}
BASELINES = {
    "reconstruction": "VAE reconstruction",
    "rgb_propagation": "RGB propagation",
    "patch_propagation": "patch propagation",
    "tune_a_video": "Tune-A-Video",
    "text2video_zero": "Text2Video-Zero",
}
CONTROLS = {"canny": "Canny", "depth": "depth"}
CONSISTENCY = {
    "extended_attention": "extended attention",
    "none": "per frame",
    "first_frame": "first frame",
}
# What the name of a method says of its settings, in order.
MARKS = {
    ("propagation", "released"): "released",
    ("blend", "linear"): "linear blend",
    ("correspondence", "flow"): "optical flow",
    ("correspondence", "hybrid"): "optical flow and nearest tokens",
    ("noise", "shared"): "shared noise",
    ("noise", "warped"): "warped noise",
    ("sampler", "dpmpp_2m"): "DPM-Solver++",
    ("decoder", "temporal"): "temporal decoder",
    ("deflicker", True): "deflickered",
}
OF_PROPAGATION = ("blend", "correspondence")  # keys that change nothing but consistency: tokenflow


# ---------------------------------------------------------------------------------------------
# Writing


def result_folder(inputs: EditInputs, technique: str) -> Path:
    """<output_path>/<technique>/<clip>/<prompt slug>-<8 hex of what the result depends on>."""
    config = inputs.config
    settings = json.dumps(result_settings(inputs), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    clip = clip_name(config.data_path)
    return Path(config.output_path) / technique / clip / f"{slug(config.prompt)}-{digest}"


def result_settings(inputs: EditInputs) -> dict[str, object]:
    """What a result depends on; for its cache, the identity of that cache."""
    config, own = inputs.config, {"dtype": str(inputs.dtype), "device": inputs.device.type}
    settings = config.model_dump() | own | {"cache": cache_key(inputs.cache.manifest)}
    settings["flow_model"] = inputs.flow_model
    if settings.get("noise") is not None:  # null says the same of two of them
        start = settings["noise"]
        settings["use_ddim_noise"] = start == "ddim"
        settings["noise"] = start if start == "warped" else None
    settings["decoder_key"] = config.temporal_decoder
    settings["model_key"] = None  # however it is spelled: the cache's identity has its contents
    if inputs.adapters.digest:
        settings["adapters"] = inputs.adapters.digest
    settings["mask"] = settings["composite"] = None
    if inputs.masks is not None:  # what it shows counts, not where it lies
        digest = hashlib.sha256(repr(inputs.masks.shape).encode() + inputs.masks.tobytes())
        settings |= {"mask": digest.hexdigest(), "composite": config.composite}
    if config.audio or inputs.cache.audio() is None:
        del settings["audio"]  # results of before have the same folder
    if config.output_size == "model":
        del settings["output_size"]  # likewise
    left_out = (*PLACES, *FIND_THE_CACHE, *CHANGES_NO_RESULT, *BY_CONTENT)
    return {key: value for key, value in settings.items() if key not in left_out}


class _Finished(Model, extra="ignore"):
    """What run.yaml says of a finished result's files and the cache it was made from."""

    cache_sha256: str
    files: dict[str, FileRecord]
    complete: Literal[True]  # the last key: a record that was cut lacks it


def is_finished(folder: Path, cache_sha256: str, verify: bool) -> bool:
    """Whether a complete result of this very cache exists; logs why not.

    Args:
        verify: compare all checksums, and refuse unexpected files.

    Raises:
        UserError: with `verify`, naming an unexpected file.
    """
    if not (folder / RUN_FILE).is_file():
        return False
    try:
        run = parse(_Finished, load_yaml(folder / RUN_FILE), str(folder / RUN_FILE))
        for name in run.files:
            check_file(folder, name, run.files, "the edit is computed again", read=verify)
    except (UserError, OSError) as error:
        log.warning("%s", error)
        return False
    if verify:
        refuse_unexpected_files(folder, {RUN_FILE, *run.files})
    if run.cache_sha256 != cache_sha256:
        log.info("%s was made from another cache; the edit is computed again", folder)
        return False
    return True


# ---------------------------------------------------------------------------------------------
# Reading


class _Config(Model, extra="allow"):
    """The keys of a result's config.yaml that do not depend on its technique."""

    prompt: str | None = None
    data_path: str | None = None
    fps: float | None = None


class _Run(Model, extra="allow"):
    """The keys of a result's run.yaml that are read again; older results lack some."""

    technique: str | None = None
    cache: str | None = None
    cache_sha256: str | None = None
    n_frames: int | None = Field(None, ge=1)
    seconds: dict[str, float | None] | None = None
    peak_memory_bytes: float | None = None


@dataclass(frozen=True)
class Result:
    """A finished result: its folder, and what config.yaml and run.yaml in it say."""

    folder: Path
    config: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def prompt(self) -> str | None:
        return self.config.get("prompt")

    @property
    def n_frames(self) -> int:
        """As run.yaml says; of a result that does not say it, as many as lie in frames/."""
        return self.run.get("n_frames") or len(frame_files(self.folder))

    def frames(self) -> np.ndarray:
        """The edited frames, (n, H, W, 3) uint8 RGB."""
        return load_frames(self.folder / "frames")

    @property
    def method(self) -> str:
        """What made it, as people call it: "PnP, TokenFlow (released)"."""
        technique = str(self.run.get("technique") or "unknown")
        if technique in BASELINES:
            control = CONTROLS.get(str(self.config.get("control")))
            return BASELINES[technique] + (f" ({control})" if control else "")
        consistency = str(self.config.get("consistency", "tokenflow"))
        bound = self.config.get("max_keyframes")
        skipped = () if consistency == "tokenflow" else OF_PROPAGATION
        config = dict(self.config)
        if config.get("noise") is None and config.get("use_ddim_noise") is False:
            config["noise"] = "shared"
        marks = [
            mark
            for (key, value), mark in MARKS.items()
            if config.get(key) == value and key not in skipped
        ]
        marks += ["smoothed"] if self.config.get("smooth_steps") else []
        marks += ["LoRA"] if self.config.get("lora") else []
        marks += ["masked"] if self.config.get("mask") else []
        if consistency == "tokenflow":
            kind = "fixed keyframes" if self.config.get("keyframes") == "fixed" else "TokenFlow"
            marks += [f"{bound} keyframes at once"] if bound else []
        else:
            kind = CONSISTENCY.get(consistency, consistency)
        name = f"{TECHNIQUES.get(technique, technique)}, {kind}"
        return f"{name} ({', '.join(marks)})" if marks else name

    @property
    def seconds_per_frame(self) -> float | None:
        """What the edit took without loading models; None if run.yaml does not say it."""
        seconds = self.run.get("seconds") or {}
        stages = [seconds.get(stage) for stage in ("train", "edit", "decode", "deflicker", "write")]
        known = [stage for stage in stages if stage is not None]
        return sum(known) / self.n_frames if known and self.n_frames else None

    def cache(self, check_files: bool = True) -> SourceCache:
        """The source cache that it was made from.

        A relative path in run.yaml is looked for from the current folder and from the folders
        above the result.

        Raises:
            UserError: the cache is missing, damaged, or was replaced since.
        """
        named, where = self.run.get("cache"), self.folder / "run.yaml"
        if not named:
            raise UserError(f"{where}: cache: is missing, so the result's source is not known")
        places = [base / named for base in (Path(), *self.folder.absolute().parents)]
        folder = next((place for place in places if (place / MANIFEST).is_file()), None)
        if folder is None:
            raise MissingFileError(
                f"{where}: cache: no finished cache {named}; build it again with preprocess.py, or "
                "run this command where the edit was run"
            )
        cache = open_cache(folder) if check_files else SourceCache(folder, read_manifest(folder))
        if self.run.get("cache_sha256") not in (None, cache.sha256):
            raise UserError(
                f"{where}: its cache {folder} was replaced since the edit, maybe by one of other "
                "frames; run the edit again"
            )
        return cache


def frame_files(folder: Path) -> list[Path]:
    """The images of a result's frames, in order."""
    return sorted((folder / "frames").glob("[0-9]*.png"))


def find_results(roots: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The results in or below some folders.

    Hidden folders (except those of clips in a technique's), links to folders and what lies inside a
    result are not searched; a result that is found twice is listed once.

    Returns:
        the folders of finished results, and those that lack one of RESULT_FILES; in order.

    Raises:
        UserError: a root is not a folder, or no finished result is found.
    """
    finished: dict[str, Path] = {}
    unfinished: dict[str, Path] = {}
    for root in roots:
        if not root.is_dir():
            kind = "a file, not a folder" if root.exists() else "no such folder of results"
            raise MissingFileError(f"{root}: {kind}")
        for place, below, files in os.walk(root):
            folder, there = Path(place), set(RESULT_FILES) & set(files)
            if len(there) == len(RESULT_FILES):
                finished.setdefault(os.path.realpath(folder), folder)
                below.clear()
            elif there:
                unfinished.setdefault(os.path.realpath(folder), folder)
            holds_clips = folder.absolute().name in (*TECHNIQUES, *BASELINES)
            below[:] = sorted(name for name in below if holds_clips or not name.startswith("."))
    if not finished:
        also = f" ({len(unfinished)} unfinished)" if unfinished else ""
        raise UserError(
            f"{', '.join(map(str, roots))}: no finished result{also}; expected a folder with "
            f"{', '.join(RESULT_FILES)}, as run_tokenflow_*.py writes it"
        )
    return list(finished.values()), list(unfinished.values())


def read_result(folder: Path) -> Result:
    """Read what a finished result says of itself.

    Raises:
        UserError: a file is missing or malformed; names the key.
    """
    records = []
    for name, expected in (("config.yaml", _Config), ("run.yaml", _Run)):
        path = folder / name
        if not path.is_file():
            raise MissingFileError(
                f"{folder}: has no {name}; expected the folder of a finished result, as "
                "run_tokenflow_*.py prints it"
            )
        record = load_yaml(path)
        parse(expected, record, str(path))
        records.append(record)
    return Result(folder, *records)
