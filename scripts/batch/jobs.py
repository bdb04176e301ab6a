"""Reads the list of a batch, and makes the jobs of it: inversions, and edits from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import run_tokenflow_controlnet as controlnet
import run_tokenflow_pnp as pnp
from scripts.batch.clip_list import (
    INVERSION_OPTIONS,
    TECHNIQUES,
    check_keys,
    inversion_options,
    mapping,
    merged_config,
    of_inversion,
    text,
)
from tokenflow.cache.options import arguments, parse_args
from tokenflow.diffusion.checkpoints import check_controlnet_fits, checkpoint_folder, model_key_for
from tokenflow.diffusion.models import resolve_device
from tokenflow.editing.config import EditConfig
from tokenflow.storage.video import IMAGE_SUFFIXES, clip_name
from util import MissingFileError, UserError, load_yaml, slug

INVERSION = "inversion"  # the kind of a job, where those of edits are their techniques
PLACES = ("data_path", "latents_path", "output_path", "prompt")  # not for sections of settings
OF_A_LIST = ("latents_path", "output_path", "settings", "preprocess", "davis", "clips")
OF_A_CLIP = ("inversion_prompt", "prompts", "techniques")  # a list has them for all others
OF_DAVIS = ("root", "image_set", "resolution")
# Two edits may ask for different ones of these: the features of one cache serve what they can.
MOST = ("pnp_attn_t", "pnp_f_t")
OF_FEATURES = ("interval", "keyframe_seed")
FRAME_RANGE = ("frame_start", "frame_stride")  # keys of an edit, options of an inversion
# Of an inversion under a ControlNet; an edit's keys have the same names.
CONTROL_OPTIONS = ("control", "controlnet_key", "controlnet_scale", "canny_low", "canny_high")
CONTROL_OPTIONS += ("depth_model",)


@dataclass(frozen=True)
class Overrides:
    """What a command line says in the place of a list, where it says anything."""

    davis: str | None = None
    image_set: str | None = None
    prompts: Sequence[str] = ()
    techniques: Sequence[str] = ()
    verify: bool = False


@dataclass(frozen=True)
class Job:
    """One inversion or edit.

    Attributes:
        clip: its name.
        kind: INVERSION or the technique of an edit.
        work: what the worker needs to know: the options of preprocess.py, or the edit's config.
        needs: the key of the inversion that an edit reads.
        key: tells it from all others, and is the same in every run of the list.
    """

    clip: str
    kind: str
    work: dict[str, Any]
    needs: str | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        told = json.dumps([self.kind, self.work], sort_keys=True)
        object.__setattr__(self, "key", hashlib.sha256(told.encode()).hexdigest()[:12])

    @property
    def prompt(self) -> str:
        """An edit's; empty for inversions."""
        return "" if self.kind == INVERSION else self.work["config"]["prompt"]

    @property
    def title(self) -> str:
        """For messages, in one line."""
        if self.kind == INVERSION:
            return f"{shown(self.clip)}: inversion"
        return f"{shown(self.clip)}: {self.kind}: {json.dumps(self.prompt, ensure_ascii=False)}"

    @property
    def log_name(self) -> str:
        """The file of the messages about the clip."""
        name = slug(self.clip)
        if name != self.clip:
            name += f"-{hashlib.sha256(self.clip.encode()).hexdigest()[:8]}"
        return f"{name}.log"


@dataclass(frozen=True)
class Batch:
    """The jobs of a list: each inversion is followed by the edits that need it."""

    output_path: str
    jobs: list[Job]

    @property
    def clips(self) -> list[str]:
        return list(dict.fromkeys(job.clip for job in self.jobs))

    def only(self, keys: Sequence[str]) -> Batch:
        """The part of it that holds these jobs, and what they need.

        Raises:
            UserError: a key is none of them.
        """
        known = {job.key: job for job in self.jobs}
        for key in keys:
            if key not in known:
                raise UserError(f"--only: {key}: this list makes no such job")
        wanted = {*keys, *(known[key].needs for key in keys)}
        return Batch(self.output_path, [job for job in self.jobs if job.key in wanted])


def shown(name: str) -> str:
    """A clip's name for messages and tables, in a line."""
    return name if name.isprintable() else json.dumps(name)


@dataclass(frozen=True)
class _Clip:
    """An entry of a list: where the clip is, what is asked for, and its own settings."""

    name: str
    data_path: str
    where: str
    inversion_prompt: str
    prompts: list[str]
    techniques: list[str]
    settings: dict[str, Any]
    own: dict[str, dict[str, Any]]  # by technique
    preprocess: dict[str, Any]


def read_batch(path: Path, overrides: Overrides | None = None) -> Batch:
    """Reads a list and makes its jobs; checks all that needs neither a clip nor a model.

    Args:
        path: configs/davis.yaml explains the keys.

    Raises:
        UserError: naming what is unknown, missing or wrong.
    """
    overrides = overrides or Overrides()
    given = load_yaml(path)
    check_keys(given, (*OF_A_LIST, *OF_A_CLIP, *TECHNIQUES), str(path))
    if overrides.prompts:
        given["prompts"] = list(overrides.prompts)
    if overrides.techniques:
        given["techniques"] = list(overrides.techniques)
    places = {
        "latents_path": text(given.get("latents_path", "latents"), f"{path}: latents_path"),
        "output_path": text(given.get("output_path", "tokenflow-results"), f"{path}: output_path"),
    }
    sections = {
        name: mapping(given.get(name, {}), f"{path}: {name}")
        for name in ("settings", "preprocess", *TECHNIQUES)
    }
    for name in ("settings", *TECHNIQUES):
        _refuse_places(sections[name], f"{path}: {name}")
    verify = {"verify": True} if overrides.verify else {}
    edits: list[tuple[_Clip, str, EditConfig]] = []
    clips = list(_clips(path, given, overrides))
    for clip in clips:
        for technique in clip.techniques:
            for prompt in clip.prompts:
                what = {"data_path": clip.data_path, "prompt": prompt}
                settings = (
                    sections["settings"],
                    sections[technique],
                    clip.settings,
                    clip.own[technique],
                    verify,
                    places | what,
                )
                where = f"{clip.where}: {technique}"
                config = merged_config(TECHNIQUES[technique].config, settings, where)
                edits.append((clip, technique, config))
    _check_models([(technique, config, clip.where) for clip, technique, config in edits])
    return Batch(
        places["output_path"],
        list(_jobs(edits, sections["preprocess"], f"{path}: preprocess")),
    )


# ------------------------------------------------------------------------------------------ clips


def _clips(path: Path, given: Mapping[str, Any], overrides: Overrides) -> Iterator[_Clip]:
    """The clips of a list, and the sequences of its DAVIS tree that no entry is about."""
    entries = given.get("clips", [])
    if not isinstance(entries, list):
        raise UserError(f"{path}: clips: expected a list of clips, got {entries!r:.60}")
    found: dict[Path, str] = {}
    clips = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: clips: number {number}"
        entry = mapping(entry, where)
        data_path = text(entry.get("data_path"), f"{where}: data_path")
        try:
            clip_name(data_path)
        except UserError as error:
            raise UserError(f"{where}: data_path: {error}") from error
        if Path(data_path).resolve() in found:
            raise UserError(f"{where}: {data_path} is in the list already")
        found[Path(data_path).resolve()] = data_path
        clips.append(_clip(path, where, given, entry))
    davis = mapping(given.get("davis", {}), f"{path}: davis")
    check_keys(davis, OF_DAVIS, f"{path}: davis")
    told = {"root": overrides.davis, "image_set": overrides.image_set}
    davis = davis | {key: value for key, value in told.items() if value is not None}
    if davis:
        for sequence in sequences(davis, f"{path}: davis"):
            if sequence.resolve() not in found:
                where = f"{path}: {sequence.name}"
                clips.append(_clip(path, where, given, {"data_path": str(sequence)}))
    if not clips:
        raise UserError(f"{path}: names no clips; expected clips, or davis with its root")
    paths: dict[str, str] = {}
    for clip in clips:
        if clip.name in paths:
            raise UserError(
                f"{path}: {paths[clip.name]} and {clip.data_path} would both be called "
                f"{clip.name}, and so would their results; rename one"
            )
        paths[clip.name] = clip.data_path
        yield clip


def _clip(path: Path, where: str, given: Mapping[str, Any], entry: dict[str, Any]) -> _Clip:
    """One clip, by its entry and by what the list has for those that leave it open."""
    name = clip_name(entry["data_path"])
    spoken = re.sub(r"[-_]+", " ", name)

    def told(key: str, default: object) -> tuple[Any, str]:
        """What stands there, and where that is."""
        if key in entry:
            return entry[key], f"{where}: {key}"
        return given.get(key, default), f"{path}: {key}"

    inversion_prompt = text(*told("inversion_prompt", ""))
    prompts = _texts(*told("prompts", None))
    if "inversion_prompt" not in entry:
        inversion_prompt = inversion_prompt.replace("{clip}", spoken)
    if "prompts" not in entry:
        prompts = [prompt.replace("{clip}", spoken) for prompt in prompts]
    techniques = _texts(*told("techniques", ["pnp"]))
    check_keys(techniques, TECHNIQUES, told("techniques", None)[1])
    own = {key: mapping(entry.get(key, {}), f"{where}: {key}") for key in TECHNIQUES}
    known = ("data_path", *OF_A_CLIP, *TECHNIQUES, "preprocess")
    settings = {key: value for key, value in entry.items() if key not in known}
    _refuse_places(settings, where)
    for key in TECHNIQUES:
        _refuse_places(own[key], f"{where}: {key}")
    return _Clip(
        name=name,
        data_path=entry["data_path"],
        where=f"{path}: {shown(name)}",
        inversion_prompt=inversion_prompt,
        prompts=prompts,
        techniques=techniques,
        settings=settings,
        own=own,
        preprocess=mapping(entry.get("preprocess", {}), f"{where}: preprocess"),
    )


def _texts(value: object, where: str) -> list[str]:
    """A list of different texts, at least one."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of texts, got {value!r:.60}")
    for number, item in enumerate(value):
        text(item, where)
        if item in value[:number]:
            raise UserError(f"{where}: {item!r:.60} is given twice")
    return value


def _refuse_places(section: Mapping[str, Any], where: str) -> None:
    for key in PLACES:
        if key in section:
            raise UserError(f"{where}: {key}: is no setting; see configs/davis.yaml for its place")


# ------------------------------------------------------------------------------------------ DAVIS


def sequences(davis: Mapping[str, Any], where: str) -> list[Path]:
    """The folders of a DAVIS tree's sequences: all that hold images, or those of an image set.

    Args:
        davis: `root`, which has JPEGImages/<`resolution`>; `image_set`, a file that names
            sequences, also by paths within the tree.

    Returns:
        the folders; those that an image set names need not be there.

    Raises:
        UserError: there is no such tree, or the image set is none.
    """
    root = Path(text(davis.get("root"), f"{where}: root"))
    resolution = davis.get("resolution", "480p")
    if not _is_name(text(resolution, f"{where}: resolution")):
        raise UserError(f"{where}: resolution: expected a folder's name, got {resolution!r:.60}")
    images = root / "JPEGImages" / resolution
    if not images.is_dir():
        raise MissingFileError(f"{where}: {images}: no such folder")
    if davis.get("image_set") is not None:
        file = Path(text(davis["image_set"], f"{where}: image_set"))
        return [images / name for name in read_image_set(file if file.is_file() else root / file)]
    folders = [folder for folder in sorted(images.iterdir()) if _holds_images(folder)]
    if not folders:
        raise UserError(f"{where}: {images}: holds no folders of images")
    return folders


def read_image_set(file: Path) -> list[str]:
    """The sequences that a file names, a line each: by name, or by paths of their frames.

    Raises:
        MissingFileError: there is no such file.
        UserError: a line names no sequence, or the file none.
    """
    if not file.is_file():
        raise MissingFileError(f"{file}: no such image set")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: no image set: not text in UTF-8") from error
    names: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = line.split()[0]
        if frame := re.fullmatch(r"/?JPEGImages/[^/]+/([^/]+)/[^/]+", name):
            name = frame[1]
        if not _is_name(name):
            raise UserError(f"{file}: line {number}: {name!r:.60} is not the name of a sequence")
        names[name] = None
    if not names:
        raise UserError(f"{file}: names no sequences")
    return list(names)


def _is_name(name: str) -> bool:
    """Whether it can only be something within a folder."""
    return bool(name.strip(".")) and not re.search(r"[/\\\0]", name)


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(
        entry.suffix.lower() in IMAGE_SUFFIXES for entry in folder.iterdir()
    )


# ------------------------------------------------------------------------------------------- jobs


def _jobs(
    edits: Sequence[tuple[_Clip, str, EditConfig]], preprocess: Mapping[str, Any], where: str
) -> Iterator[Job]:
    """The jobs of these edits, those of one checkpoint together."""
    caches: dict[tuple, list[tuple[_Clip, str, EditConfig]]] = {}
    for clip, technique, config in edits:
        cache = clip.name, config.sd_version, config.n_inversion_steps, config.n_frames
        cache += config.frame_start, config.frame_stride
        caches.setdefault(cache, []).append((clip, technique, config))
    checkpoints: dict[tuple, list[list[tuple[_Clip, str, EditConfig]]]] = {}
    for group in caches.values():
        config = group[0][2]
        checkpoint = model_key_for(config.sd_version, config.model_key), config.dtype
        checkpoints.setdefault(checkpoint, []).append(group)
    for groups in checkpoints.values():
        for group in groups:
            yield from _jobs_of_cache(group, preprocess, where)


def _jobs_of_cache(
    edits: Sequence[tuple[_Clip, str, EditConfig]], preprocess: Mapping[str, Any], where: str
) -> Iterator[Job]:
    """An inversion that serves all these edits, and them."""
    clip = edits[0][0]
    options: dict[str, Any] = dict.fromkeys(MOST, 0.0)
    for _, technique, config in edits:
        for option, value in inversion_options(config).items():
            if option in MOST:
                options[option] = max(options[option], value)
            elif options.setdefault(option, value) != value and option not in OF_FEATURES:
                key = INVERSION_OPTIONS[option]
                other = getattr(edits[0][2], key)
                raise UserError(
                    f"{clip.where}: {technique}: {key}: is {getattr(config, key)} here and {other} "
                    "for other edits from the same inversion; put it in settings"
                )
    options |= {key: getattr(edits[0][2], key) for key in FRAME_RANGE}
    options["inversion_prompt"] = clip.inversion_prompt or None
    options |= _control_options([config for _, _, config in edits], clip.where)
    options |= _further(preprocess, where)
    options |= _further(clip.preprocess, f"{clip.where}: preprocess")
    try:
        inversion_args = parse_args(arguments(options))
    except UserError as error:
        raise UserError(f"{clip.where}: preprocess: {error}") from error
    inversion = Job(clip.name, INVERSION, {"options": options})
    yield inversion
    for _, technique, config in edits:
        config = of_inversion(config, inversion_args)
        yield Job(clip.name, technique, {"config": config.model_dump()}, inversion.key)


def _control_options(configs: Sequence[EditConfig], where: str) -> dict[str, Any]:
    """The options of an inversion under the ControlNet of the edits, where it shall be so."""
    if configs[0].sd_version != "ControlNet":
        return {}
    of_edits = [c for c in configs if isinstance(c, controlnet.ControlNetConfig)]
    found = [{key: getattr(config, key) for key in CONTROL_OPTIONS} for config in of_edits]
    if any(one != found[0] for one in found):
        raise UserError(
            f"{where}: controlnet: {', '.join(CONTROL_OPTIONS)}: are the inversion's too with "
            "sd_version: ControlNet, and must be the same for all edits from it"
        )
    return found[0] if found else {}


def _further(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of preprocess.py that a list gives; true is a flag."""
    for option, value in section.items():
        if option in INVERSION_OPTIONS:
            key = INVERSION_OPTIONS[option]
            raise UserError(f"{where}: {option}: comes from the edits; say {key} in settings")
        if option == "overwrite":
            raise UserError(f"{where}: overwrite: would make the caches anew each time")
        if value is False:
            raise UserError(f"{where}: {option}: expected a value or true, else leave it out")
    return {option: "" if value is True else value for option, value in section.items()}


def _check_models(edits: Sequence[tuple[str, EditConfig, str]]) -> None:
    """Refuses what edits refer to besides their clips, and is not there."""
    seen = set()
    for technique, config, where in edits:
        device, model = config.device, model_key_for(config.sd_version, config.model_key)
        settings = None
        try:
            if isinstance(config, controlnet.ControlNetConfig):
                settings = controlnet.control_settings(config)
            what = technique, device, model, settings, config.allow_pickle
            if what in seen:
                continue
            resolve_device(device)
            checkpoint = checkpoint_folder(model, config.allow_pickle)
            if settings is not None:
                check_controlnet_fits(checkpoint, settings.key, config.allow_pickle)
            if isinstance(config, pnp.PnPConfig):
                pnp.check_injection_layers(checkpoint)
        except UserError as error:
            raise UserError(f"{where}: {technique}: {error}") from error
        seen.add(what)
