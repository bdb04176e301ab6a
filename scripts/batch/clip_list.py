"""Lists of clips in YAML, for batches and for Table 1: their format, and the jobs they ask for."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

from scripts.batch.davis import sequences
from tokenflow.cache.options import (
    ADAPTER_OPTIONS,
    CONTROL_OPTIONS,
    FRAME_RANGE,
    PreprocessOptions,
    default,
)
from tokenflow.diffusion.checkpoints import checkpoint_folder
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import resolve_device, resolve_dtype
from tokenflow.editing.config import EditConfig
from tokenflow.editing.results import TECHNIQUES
from tokenflow.editing.techniques import load_technique
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.video import clip_name
from tokenflow.storage.yaml_files import load_yaml
from util import UserError, slug

INVERSION = "inversion"  # the kind of a job; an edit's kind is the name of its variant
# Options of preprocess.py, and the keys of an edit that set them.
INVERSION_OPTIONS = {
    PreprocessOptions.ALIASES.get(key, key): key for key in
    ("data_path", "frame_start", "frame_stride", "n_frames", "H", "W", "sd_version", "model_key",
     "architecture_key", *ADAPTER_OPTIONS, "keyframe_interval", "keyframe_seed", "pnp_attn_t",
     "pnp_f_t", "device", "dtype", "allow_pickle", "verify", "latents_path", "n_inversion_steps",
     "n_timesteps")
}  # fmt: skip
# Edits of one cache may differ in these: its features are built for the largest, or the first.
LARGEST = ("pnp_attn_t", "pnp_f_t")
FIRST = ("keyframe_interval", "keyframe_seed")


@dataclass(frozen=True)
class Variant:
    """A way to edit every clip."""

    name: str  # of a technique, or of a row of Table 1
    section: str  # of SECTIONS: whose settings in the list apply
    config: type[EditConfig]
    edit: Callable[..., Path]  # makes the result of a configuration; returns its folder
    settings: Mapping[str, Any] = field(default_factory=dict)  # that the list cannot change


VARIANTS = {
    t.name: Variant(t.name, t.name, t.config, t.edit) for t in map(load_technique, TECHNIQUES)
}

# What a list may have settings of; those of baselines are for Table 1.
SECTIONS = (*VARIANTS, "tune_a_video", "text2video_zero_depth")


@dataclass(frozen=True)
class Job:
    """One inversion or edit."""

    clip: str  # its name
    variant: Variant | None  # None: an inversion
    work: dict[str, Any]  # the options of preprocess.py, or the keys of the edit's config
    needs: str | None = None  # the key of the inversion that an edit reads

    @property
    def kind(self) -> str:
        return INVERSION if self.variant is None else self.variant.name

    @cached_property
    def key(self) -> str:
        """Identifies the job, in every run of the list."""
        return _digest(json.dumps([self.kind, self.work], sort_keys=True))[:12]

    @property
    def title(self) -> str:
        """The job in one line."""
        prompt = self.work.get("prompt")
        quoted = [] if prompt is None else [json.dumps(prompt, ensure_ascii=False)]
        return ": ".join([shown_name(self.clip), self.kind, *quoted])

    @property
    def log_name(self) -> str:
        """The file name of the clip's log."""
        name = slug(self.clip)
        return f"{name}.log" if name == self.clip else f"{name}-{_digest(self.clip)[:8]}.log"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shown_name(clip: str) -> str:
    """A clip's name in one line."""
    return clip if clip.isprintable() else json.dumps(clip)


# ------------------------------------------------------------------------------------ the format


class _Keys(Model):
    """The keys that a list has for all clips and a clip for itself."""

    prompts: list[str] | None = None
    techniques: list[Literal[tuple(VARIANTS)]] | None = None
    inversion_prompt: str | None = None
    preprocess: dict[str, Any] = Field(default_factory=dict)

    @field_validator("prompts", "techniques")
    @classmethod
    def _is_a_set(cls, items: list[str] | None) -> list[str] | None:
        if items is not None and not items:
            raise ValueError("expected a list of texts, got []")
        for item in items or ():
            if items.count(item) > 1:
                raise ValueError(f"{item!r:.60} is given twice")
        return items

    @model_validator(mode="after")
    def _check_sections(self) -> _Keys:
        for place, section in self.sections():
            for key in ("data_path", "latents_path", "output_path", "prompt"):
                if key in section:
                    place = f"{place}: {key}" if place else key
                    raise ValueError(f"{place}: is not a setting; see configs/davis.yaml")
        for option in self.preprocess:
            key = INVERSION_OPTIONS.get(PreprocessOptions.ALIASES.get(option, option))
            if key and option not in ("H", "W", *FRAME_RANGE):  # edits take those of the cache
                raise ValueError(
                    f"preprocess: {option}: comes from the edits; say {key} in settings"
                )
            if option == "overwrite":
                raise ValueError("preprocess: overwrite: would rebuild the caches each time")
        return self

    def sections(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The names and contents of all sections that hold settings."""
        yield "", self.model_extra or {}
        for name in ("settings", *SECTIONS):
            yield name, getattr(self, name, {})


class _Entry(_Keys):
    model_config = ConfigDict(extra="allow")  # other keys are settings

    data_path: str
    prompt: str | None = None


class _Davis(Model):
    root: str
    image_set: str | None = None
    resolution: str = "480p"


_OF_EACH = dict.fromkeys(SECTIONS, (dict[str, Any], Field(default_factory=dict)))
Entry = create_model("Entry", __base__=_Entry, **_OF_EACH)


class _ClipList(_Keys):
    latents_path: str = "latents"
    output_path: str = "tokenflow-results"
    settings: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)  # for Table 1: options of evaluate.py
    davis: _Davis | None = None
    clips: list[Entry] = Field(default_factory=list)


ClipList = create_model("ClipList", __base__=_ClipList, **_OF_EACH)


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Batch:
    """The jobs of a list: each inversion is followed by the edits that need it."""

    output_path: Path
    jobs: list[Job]
    given: ClipList

    @property
    def clips(self) -> list[str]:
        return list(dict.fromkeys(job.clip for job in self.jobs))

    def only(self, keys: Sequence[str]) -> Batch:
        """The jobs with these keys, and the inversions that they need.

        Raises:
            UserError: no job has such a key.
        """
        known = {job.key: job for job in self.jobs}
        for key in keys:
            if key not in known:
                raise UserError(f"--only: {key}: this list has no such job")
        wanted = {*keys, *(known[key].needs for key in keys)}
        return replace(self, jobs=[job for job in self.jobs if job.key in wanted])


@dataclass(frozen=True)
class _Edit:
    """An edit of a clip, before edits are grouped by the cache that they read."""

    clip: str
    where: str
    variant: Variant
    config: EditConfig
    preprocess: Mapping[str, Any]  # the clip's options of preprocess.py
    preset: Mapping[str, Any]  # the options of its preset: where nothing else says them


def read_batch(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    variants: Sequence[Variant] | None = None,
    verify: bool = False,
) -> Batch:
    """Reads a list and returns its jobs; checks everything that needs neither a clip nor a model.

    Args:
        path: configs/davis.yaml explains the keys.
        overrides: keys that replace the list's; those of `davis` replace that section's keys.
        variants: edits of every clip; None: those of the techniques that the list names.
        verify: check all checksums of finished caches and results.

    Raises:
        UserError: naming what is unknown, missing or wrong.
    """
    content = load_yaml(path)
    for key, value in (overrides or {}).items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            value = content[key] | value
        content[key] = value
    given = parse(ClipList, content, str(path))
    edits = []
    for clip, entry in _clips(path, given).items():
        edits += _edits(f"{path}: {shown_name(clip)}", given, clip, entry, variants, verify)
    if variants is None:  # else an edit whose model is missing fails alone
        _check_models(edits)
    return Batch(Path(given.output_path), list(_jobs(edits)), given)


def _clips(path: Path, given: ClipList) -> dict[str, Entry]:
    """By name, the clips of a list, and the sequences of its DAVIS tree that no entry is about."""
    entries, listed = list(given.clips), set()
    for number, entry in enumerate(entries, start=1):
        settings = entry.model_extra | entry.preprocess
        shot = (Path(entry.data_path).resolve(), *(settings.get(key) for key in FRAME_RANGE))
        if shot in listed:
            raise UserError(f"{path}: clips: number {number}: {entry.data_path} is given twice")
        listed.add(shot)
    if davis := given.davis:
        found = sequences(Path(davis.root), davis.resolution, davis.image_set, f"{path}: davis")
        about = {folder for folder, *_ in listed}
        entries += [Entry(data_path=str(p)) for p in found if p.resolve() not in about]
    if not entries:
        raise UserError(f"{path}: names no clips; expected clips, or davis with its root")
    clips: dict[str, Entry] = {}
    for entry in entries:  # a second clip or shot of a name gets a number
        name = clip_name(entry.data_path)
        names = itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2)))
        clips[next(name for name in names if name not in clips)] = entry
    return clips


def _edits(
    where: str,
    given: ClipList,
    clip: str,
    entry: Entry,
    variants: Sequence[Variant] | None,
    verify: bool,
) -> Iterator[_Edit]:
    """The edits of a clip: every prompt by every variant."""
    spoken = re.sub(r"[-_]+", " ", clip_name(entry.data_path))
    own = entry.prompts or ([] if entry.prompt is None else [entry.prompt])
    prompts = own or [prompt.replace("{clip}", spoken) for prompt in given.prompts or ()]
    if not prompts:
        raise UserError(f"{where}: has no prompt; expected prompts, in the list or for the clip")
    inversion_prompt = entry.inversion_prompt
    if inversion_prompt is None:
        inversion_prompt = (given.inversion_prompt or "").replace("{clip}", spoken)
    preprocess = {"inversion_prompt": inversion_prompt} | given.preprocess | entry.preprocess
    preset = entry.model_extra.get("preset", given.settings.get("preset"))
    preset = PreprocessOptions.preset_values(preset)
    if variants is None:
        variants = [VARIANTS[name] for name in entry.techniques or given.techniques or ["pnp"]]
    places = {"latents_path": given.latents_path, "output_path": given.output_path}
    places |= {"data_path": entry.data_path} | ({"verify": True} if verify else {})
    for variant in variants:
        levels = given.settings, getattr(given, variant.section), entry.model_extra
        levels += getattr(entry, variant.section), variant.settings, places
        names, settings = variant.config.ALIASES, {}  # one level may name a key by another name
        for level in levels:  # a level's preset wins over the levels before
            own = {names.get(key, key): value for key, value in level.items()}
            settings |= variant.config.take_preset(own)
        for prompt in prompts:
            keys, place = settings | {"prompt": prompt}, f"{where}: {variant.name}"
            config = parse(variant.config, keys, place)
            yield _Edit(clip, where, variant, config, preprocess, preset)


# ------------------------------------------------------------------------------------------- jobs


def _jobs(edits: Sequence[_Edit]) -> Iterator[Job]:
    """The jobs of these edits, those of one checkpoint together."""
    caches: dict[tuple, dict[tuple, list[_Edit]]] = {}
    for edit in edits:
        config = edit.config
        checkpoint = _model_key(config), config.dtype
        cache = edit.clip, config.sd_version, config.n_inversion_steps, config.n_frames
        cache += config.frame_start, config.frame_stride, json.dumps(_adapters(config))
        caches.setdefault(checkpoint, {}).setdefault(cache, []).append(edit)
    for of_checkpoint in caches.values():
        for group in of_checkpoint.values():
            options = _cache_options(group)
            args = parse(PreprocessOptions, options, f"{group[0].where}: preprocess")
            place = {key: getattr(args, key) for key in FRAME_RANGE}
            # Whatever other caches of the clip there are.
            place |= {"n_inversion_steps": args.steps, "n_timesteps": args.save_steps}
            place |= {"sd_version": args.sd_version, "n_frames": args.n_frames}
            inversion = Job(group[0].clip, None, options)
            yield inversion
            for edit in group:
                keys = edit.config.model_dump() | place
                if edit.config.lora_for == "both":
                    keys |= {key: keys[key] or [] for key in ("lora", "embeddings")}
                yield Job(edit.clip, edit.variant, keys, inversion.key)


def _adapters(config: EditConfig) -> dict[str, Any]:
    """The LoRAs and embeddings of an edit's inversion: none where the list names none."""
    both = config.lora_for == "both"
    return {key: getattr(config, key) if both else None for key in ADAPTER_OPTIONS}


def _model_key(config: EditConfig) -> str:
    return config.model_key or _known(config)


def _known(config: EditConfig) -> str:
    return MODELS[config.sd_version or default("sd_version")]


def _cache_options(edits: Sequence[_Edit]) -> dict[str, Any]:
    """The options of the inversion that serves all these edits."""
    options: dict[str, Any] = dict.fromkeys(LARGEST, 0.0)
    for edit in edits:
        keys = INVERSION_OPTIONS
        if edit.config.sd_version == "ControlNet":
            keys = keys | {key: key for key in (*CONTROL_OPTIONS, "depth_model")}
        for option, key in keys.items():
            value = getattr(edit.config, key, None)
            value = _adapters(edit.config).get(key, value)
            if value is None:
                continue
            if option in LARGEST:
                options[option] = max(options[option], value)
            elif options.setdefault(option, value) != value and option not in FIRST:
                raise UserError(
                    f"{edit.where}: {edit.variant.name}: {key}: is {value} here and "
                    f"{options[option]} for other edits from the same inversion; put it in settings"
                )
    if len(kinds := {edit.config.correspondence for edit in edits}) == 1 and kinds != {"nn"}:
        options["correspondence"] = kinds.pop()
    for option, value in edits[0].preprocess.items():
        if option.startswith("no_") and value is True:  # as on the command line
            option, value = option.removeprefix("no_"), False
        options[option] = value
    return {**edits[0].preset, **options}


def _check_models(edits: Sequence[_Edit]) -> None:
    """Raises if a device, a checkpoint or a ControlNet that edits name is missing or unfit."""
    seen = set()
    for edit in edits:
        config, technique = edit.config, edit.variant.section
        model = _model_key(config)
        control = (
            getattr(config, key, None) for key in ("control", "controlnet_key", "depth_model")
        )
        what = technique, model, config.architecture_key, config.device, config.allow_pickle
        what += tuple(control)
        if what not in seen:
            try:
                dtype = resolve_dtype(config.dtype, resolve_device(config.device))
                checkpoint = checkpoint_folder(
                    model,
                    config.allow_pickle,
                    config.architecture_key or _known(config),
                    getattr(config, "depth_model", None),
                    half=dtype is torch.float16,
                )
                load_technique(technique).check(config, checkpoint, has_depth=True)
            except UserError as error:
                raise UserError(f"{edit.where}: {edit.variant.name}: {error}") from error
            seen.add(what)
