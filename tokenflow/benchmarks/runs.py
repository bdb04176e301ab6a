"""What benchmark.py runs: preprocess and edits of one clip by one model, under named settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tokenflow.benchmarks import three_branch
from tokenflow.benchmarks.meters import Meter
from tokenflow.cache import build
from tokenflow.cache.options import FAST, PreprocessOptions, parse_args
from tokenflow.cache.source_cache import FORMAT
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import (
    StableDiffusion,
    load_stable_diffusion,
    resolve_device,
    resolve_dtype,
)
from tokenflow.editing.config import FEATURE_OPTIONS, EditConfig
from tokenflow.editing.inputs import open_inputs
from tokenflow.editing.loop import EditPlan, EditSession
from tokenflow.editing.results import result_folder
from tokenflow.editing.techniques import OpenResult, Technique, load_technique
from tokenflow.storage.schema import Model, load_config
from tokenflow.storage.video import clip_name, read_clip, resolve_clip, save_video, source_sha256
from tokenflow.storage.work_dir import WorkDir, atomic_dir
from tokenflow.storage.yaml_files import save_yaml
from util import UserError

log = logging.getLogger("tokenflow")

ROOT = Path(__file__).resolve().parents[2]
RANDOM_MODELS = {
    "tiny-random": ("--architecture", "tiny"),
    "medium-random": ("--architecture", "medium"),
    "sd21-random": ("--architecture", "sd21", "--dtype", "float16"),
}
SOURCE_PROMPT = "a red star on a yellow background"
PROMPT = "a blue star on a yellow background"

# The keys of the edit's config that a named setting changes.
EDIT_SETTINGS: dict[str, tuple[str, ...]] = {
    "tokenflow": (),
    "three_branch": (),
    "cached": ("source_features=auto",),
    "live": ("source_features=live",),
    "compiled": ("compile=true",),
    "per_frame": ("consistency=none",),
    "extended_attention": ("consistency=extended_attention",),
    "first_frame": ("consistency=first_frame",),
    "released": ("propagation=released",),
    "flow": ("correspondence=flow",),
}
ITERATIONS = f"--steps {{steps}} --inversion_iters {FAST['inversion_iters']}"
# The options of preprocess.py: {steps} is the number of sampling steps, {n} that in the name.
PREPROCESS_SETTINGS = {
    "fast": f"{ITERATIONS} --inversion_tol {FAST['inversion_tol']}",
    "fast_no_stop": ITERATIONS,
    "plainN": "--steps {n} --inversion_iters 1 --recon_steps {n}",
    "itersN": "--steps {steps} --inversion_iters {n}",
}


class Options(Model):
    """benchmark.py's command line, without what its modes add."""

    model: str = Field(
        "tiny",
        description="a folder in diffusers' format, a name of preprocess.py's --sd_version, or one "
        f"that is written to --work: {', '.join(RANDOM_MODELS)}",
    )
    data_path: str = Field(
        str(ROOT / "data" / "star.mp4"), description="a clip; too short, it plays back and forth"
    )
    frames: int = Field(16, ge=1, description="of the clip")
    size: str = Field("256", description="pixels, as a number or HEIGHTxWIDTH")
    steps: int = Field(50, ge=1, description="sampling steps")
    technique: Literal["pnp", "sdedit"] = Field("pnp", description="of edits")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto is float16 on CUDA, float32 elsewhere"
    )
    inversion: str = Field("fast", description="preprocess setting of the cache that is edited")
    work: str = Field("latents/benchmark", description="for models, clips, caches and results")
    warm_up: int = Field(1, ge=0, description="runs before the timed ones")
    repeats: int = Field(3, ge=1, description="timed runs, or pairs of them")
    memory_limit: float | None = Field(
        None, gt=0, description="GiB of a GPU's memory that may be taken, as if there were no more"
    )

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str) -> str:
        if not re.fullmatch(r"\d+(x\d+)?", size):
            raise ValueError(f"{size}, expected a number of pixels, or HEIGHTxWIDTH")
        return size


@dataclass(frozen=True)
class Bench:
    """What is run: the options, and what they resolve to.

    Attributes:
        overrides: key=value of the edit's config.
        preprocess_options: words of preprocess.py's command line.
    """

    options: Options
    checkpoint: Path
    clip: Path
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    overrides: Sequence[str] = ()
    preprocess_options: Sequence[str] = ()

    def load(self) -> StableDiffusion:
        return load_stable_diffusion(self.checkpoint, self.device, self.dtype)

    @property
    def work(self) -> Path:
        return Path(self.options.work)

    @property
    def technique(self) -> Technique:
        return load_technique(self.options.technique)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def open_bench(
    options: Options, overrides: Sequence[str] = (), preprocess_options: Sequence[str] = ()
) -> Bench:
    """Prepares what the options name: writes a random model or a longer clip if needed.

    Raises:
        UserError: naming the option that cannot be met.
    """
    height, _, width = options.size.partition("x")
    device = resolve_device(options.device)
    bench = Bench(
        options,
        checkpoint=model_folder(options.model, Path(options.work)),
        clip=clip_of(Path(options.data_path), options.frames, Path(options.work)),
        height=int(height),
        width=int(width or height),
        device=device,
        dtype=resolve_dtype(options.dtype, device),
        overrides=overrides,
        preprocess_options=preprocess_options,
    )
    preprocess_args(bench, options.inversion)  # refuses what preprocess would
    return bench


def model_folder(name: str, work: Path) -> Path:
    """The checkpoint of `--model`: a folder, one of the table, or a random one that is written."""
    if name in RANDOM_MODELS:
        folder = work / "models" / name
        if not (folder / "model_index.json").is_file():
            log.info("writing %s to %s", name, folder)
            # In a process of its own, whose memory is not this one's.
            command = [sys.executable, "-m", "scripts.tiny_model.make_random", folder.resolve()]
            subprocess.run([*command, *RANDOM_MODELS[name]], check=True, cwd=ROOT)
        return folder
    if name not in MODELS and not Path(name).is_dir():
        known = ", ".join([*RANDOM_MODELS, *MODELS])
        raise UserError(f"--model: {name}: no such folder, and none of {known}")
    return checkpoint_folder(MODELS.get(name, name))


def clip_of(source: Path, n_frames: int, work: Path) -> Path:
    """The clip itself if it is long enough, else one in `work` that plays it back and forth."""
    source = resolve_clip(source)
    native = read_clip(source, 1).native_size
    clip = read_clip(source, n_frames, size=native)
    if len(clip.frames) == n_frames:
        return source
    digest = source_sha256(source)[:8]
    path = work / "clips" / f"{clip_name(source)}-{digest}-{n_frames}.mp4"
    if not path.is_file():
        log.info("%s: played back and forth for %d frames", source, n_frames)
        save_video(path, clip.frames[back_and_forth(len(clip.frames), n_frames)], clip.fps)
    return path


def back_and_forth(length: int, n_frames: int) -> list[int]:
    """n_frames indices 0, 1, ..., length - 1, length - 2, ..., 1, 0, 1, ..."""
    there = list(range(length))
    return list(itertools.islice(itertools.cycle(there + there[-2:0:-1]), n_frames))


# ---------------------------------------------------------------------------------------------
# Settings


def edit_overrides(name: str) -> list[str] | None:
    """The config keys that a setting of the edit changes; None if it is no such setting.

    Raises:
        UserError: if a part of it, of those joined by +, is none.
    """
    overrides: list[str] = []
    for i, part in enumerate(name.split("+")):
        if part.startswith("attention:"):
            overrides.append(f"attention_backend={part.removeprefix('attention:')}")
        elif part in EDIT_SETTINGS or "=" in part:
            overrides += EDIT_SETTINGS.get(part, [part])
        elif i == 0:
            return None
        else:
            raise UserError(f"{name}: {part} is no setting of an edit")
    return overrides


def preprocess_words(name: str, steps: int) -> list[str] | None:
    """The options of a setting of preprocess; None if it is no such setting."""
    kind, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
    options = PREPROCESS_SETTINGS.get(kind + "N" if number else kind)
    return options and options.format(steps=steps, n=number).split()


def setting_kind(name: str) -> str:
    """Whether a setting is one of the "edit" or of "preprocess".

    Raises:
        UserError: if it is neither.
    """
    if edit_overrides(name) is not None:
        return "edit"
    if preprocess_words(name, 1) is not None:
        return "preprocess"
    edits = ", ".join([*EDIT_SETTINGS, "attention:BACKEND", "key=value"])
    raise UserError(
        f"{name}: unknown setting; of an edit: {edits} (joined by +); of preprocess: "
        f"{', '.join(PREPROCESS_SETTINGS)}"
    )


def preprocess_args(bench: Bench, name: str) -> PreprocessOptions:
    """preprocess.py's command line for a setting.

    Raises:
        UserError: if there is no such setting, or preprocess.py refuses its options.
    """
    if setting_kind(name) != "preprocess":
        raise UserError(f"{name}: is a setting of an edit, expected one of preprocess")
    words = ["--data_path", str(bench.clip), "--model_key", str(bench.checkpoint)]
    words += [
        "--H",
        str(bench.height),
        "--W",
        str(bench.width),
        "--n_frames",
        str(bench.options.frames),
    ]
    words += ["--device", str(bench.device), "--dtype", bench.dtype_name]
    words += ["--inversion_prompt", SOURCE_PROMPT, "--save_steps", str(bench.options.steps)]
    words += preprocess_words(name, bench.options.steps)
    for key, _, value in (override.partition("=") for override in bench.overrides):
        if key in FEATURE_OPTIONS:
            words += [f"--{FEATURE_OPTIONS[key]}", value]
    words += bench.preprocess_options
    # One folder for each set of options: a cache's own name says only the clip and the steps.
    options = json.dumps([words, checkpoint_revision(bench.checkpoint), FORMAT])
    digest = hashlib.sha256(options.encode()).hexdigest()[:12]
    return parse_args([*words, "--save_dir", str(bench.work / "caches" / digest)])


def edit_config(bench: Bench, overrides: list[str]) -> EditConfig:
    """The edit's configuration, read as a run script reads it."""
    cache = preprocess_args(bench, bench.options.inversion)
    path = bench.work / "config.yaml"
    save_yaml(
        path,
        {
            "data_path": str(bench.clip),
            "latents_path": cache.save_dir,
            "output_path": str(bench.work / "results"),
            "model_key": str(bench.checkpoint),
            "n_inversion_steps": cache.steps,
            "n_timesteps": bench.options.steps,
            "n_frames": bench.options.frames,
            "device": str(bench.device),
            "dtype": bench.dtype_name,
            "prompt": PROMPT,
            "negative_prompt": SOURCE_PROMPT,
        },
    )
    return load_config(bench.technique.config, path, [*bench.overrides, *overrides])


# ---------------------------------------------------------------------------------------------
# Runs


def run_preprocess(bench: Bench, models: StableDiffusion, count_flops: bool = False) -> Meter:
    """preprocess.py's own work, from reading the clip to its finished cache.

    The stage "rest" is what no other stage times: writing the cache, and checksums.
    """
    meter = Meter(bench.device, count_flops)
    start = time.perf_counter()
    _build(bench, bench.options.inversion, models, meter)
    meter.add("rest", time.perf_counter() - start - sum(meter.seconds.values()))
    return meter


def ensure_cache(bench: Bench, models: StableDiffusion) -> None:
    """Builds the cache that is edited, unless it exists."""
    args = preprocess_args(bench, bench.options.inversion)
    inputs = build.open_inputs(args)
    if not build.has_inversion(inputs):
        build.invert_clip(inputs, args.batch_size, models)
    if inputs.features is not None and not build.has_features(inputs):
        build.add_features(inputs, args.batch_size, models)


def run_edit(bench: Bench, models: StableDiffusion, count_flops: bool = False) -> Meter:
    """A run script's own work, from checking the cache to the written result."""
    config = edit_config(bench, [])
    meter = Meter(bench.device, count_flops)
    with meter.watching(models.unet):
        with meter("open"):
            inputs = open_inputs(config)
        session = EditSession(inputs, models, meter)
        edited = session.decode(session.edit_latents(make_plan(bench, session)))
        name = bench.technique.name
        with atomic_dir(result_folder(inputs, name)) as folder:
            OpenResult(name, folder, inputs, WorkDir(folder)).save(session, edited)
    return meter


def make_plan(bench: Bench, session: EditSession) -> EditPlan:
    """What the technique does in a session."""
    bench.technique.check(session.inputs)
    return bench.technique.plan(session)


@dataclass(frozen=True)
class PreparedEdit:
    """An edit under a setting, ready to run: `loop(session, plan)` gives latents (n, 4, h, w)."""

    name: str
    session: EditSession
    plan: EditPlan
    loop: Callable[[EditSession, EditPlan], Tensor]

    def __call__(self) -> Tensor:
        return self.loop(self.session, self.plan)


def prepare_edit(bench: Bench, name: str, models: StableDiffusion) -> PreparedEdit:
    """Opens an edit under a setting; it shares the models unless it compiles its own."""
    overrides = edit_overrides(name)
    config = edit_config(bench, overrides)
    if "compile=true" in overrides:
        models = bench.load()
    session = EditSession(open_inputs(config), models)
    plan = make_plan(bench, session)
    if "three_branch" not in name.split("+"):
        return PreparedEdit(name, session, plan, EditSession.edit_latents)
    three_branch.check(session, plan)
    return PreparedEdit(name, session, plan, three_branch.edit_latents)


@dataclass(frozen=True)
class Timed:
    """One timed run of a setting: `result` is an edit's latents, or preprocess's cache folder.

    `processor` is the processor time, which other work on the machine hardly changes.
    """

    seconds: float
    processor: float
    images: int
    result: Tensor | Path


def timed_edit(edit: PreparedEdit) -> Timed:
    """Times the denoising loop.

    Raises:
        UserError: if the setting is `cached`, and the cached features did not serve it.
    """
    models = edit.session.models
    meter = Meter(models.device)
    with meter.watching(models.unet), meter("edit"):
        latents = edit()
    if "cached" in edit.name.split("+") and edit.session.source_features != "cached":
        raise UserError(f"{edit.name}: the edit was computed live; the log says why")
    return _timed(meter, ("edit",), latents)


def timed_preprocess(bench: Bench, name: str, models: StableDiffusion) -> Timed:
    """Times inversion and reconstruction of latents, without the VAE, reading and writing."""
    meter = Meter(bench.device)
    folder = _build(bench, name, models, meter, features=False)
    return _timed(meter, ("inversion", "reconstruction"), folder)


def _build(
    bench: Bench, name: str, models: StableDiffusion, meter: Meter, features: bool = True
) -> Path:
    args = preprocess_args(bench, name)
    with meter.watching(models.unet):
        inputs = build.open_inputs(args)
        build.invert_clip(inputs, args.batch_size, models, meter)
        if features and inputs.features is not None:
            build.add_features(inputs, args.batch_size, models, meter)
    return inputs.folder


def _timed(meter: Meter, stages: tuple[str, ...], result: Tensor | Path) -> Timed:
    counts = (meter.seconds, meter.processor, meter.images)
    return Timed(*(sum(count[stage] for stage in stages) for count in counts), result)
