"""What benchmark.py runs: preprocess and edits of one clip by one model, under named settings."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

import preprocess
import run_tokenflow_pnp
import run_tokenflow_sdedit
from tokenflow.benchmarks import three_branch
from tokenflow.benchmarks.meters import Meter
from tokenflow.cache.options import FAST
from tokenflow.cache.source_cache import CLEAN_LATENTS, FORMAT, open_cache
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision
from tokenflow.diffusion.inversion import reconstruct
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import (
    StableDiffusion,
    decode_latents,
    load_stable_diffusion,
    make_denoiser,
    psnr,
    resolve_device,
    resolve_dtype,
)
from tokenflow.editing.inputs import FEATURE_OPTIONS, EditConfig, open_inputs
from tokenflow.editing.loop import EditPlan, EditSession, result_folder
from tokenflow.storage.video import clip_name, read_clip, resolve_clip, save_video, source_sha256
from tokenflow.storage.work_dir import Workplace, replacing_folder
from util import UserError, load_config, save_yaml

log = logging.getLogger("tokenflow")

ROOT = Path(__file__).resolve().parents[2]
RANDOM_MODELS = {
    "tiny-random": ("--architecture", "tiny"),
    "medium-random": ("--architecture", "medium"),
    "sd21-random": ("--architecture", "sd21", "--dtype", "float16"),
}
TECHNIQUES = {
    "pnp": (run_tokenflow_pnp, run_tokenflow_pnp.PnPConfig),
    "sdedit": (run_tokenflow_sdedit, run_tokenflow_sdedit.SDEditConfig),
}
SOURCE_PROMPT = "a red star on a yellow background"
RECONSTRUCTION_BATCH = 8  # of the reconstruction whose PSNR is taken, which is not timed
PROMPT = "a blue star on a yellow background"

# What a setting of the edit is made of: keys of its config.
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
FAST_ITERATIONS = ("--inversion_iters", f"{FAST['inversion_iters']}")
# And of preprocess: its options; {steps} are the sampling steps, {n} the number in the name.
PREPROCESS_SETTINGS: dict[str, tuple[str, ...]] = {
    # --fast, in as many steps as are asked for; and without what ends a frame's iterations early.
    "fast": ("--steps", "{steps}", *FAST_ITERATIONS, "--inversion_tol", f"{FAST['inversion_tol']}"),
    "fast_no_stop": ("--steps", "{steps}", *FAST_ITERATIONS),
    "plain{n}": ("--steps", "{n}", "--inversion_iters", "1", "--recon_steps", "{n}"),
    "iters{n}": ("--steps", "{steps}", "--inversion_iters", "{n}"),
}


@dataclass(frozen=True)
class Bench:
    """What is run: a checkpoint, a clip and the options that all settings share.

    Attributes:
        inversion: the preprocess setting whose cache is edited.
        overrides: key=value of the edit's config.
        preprocess_options: words of preprocess.py's command line.
    """

    checkpoint: Path
    clip: Path
    frames: int
    height: int
    width: int
    steps: int
    technique: str
    device: torch.device
    dtype: torch.dtype
    work: Path
    inversion: str
    overrides: tuple[str, ...] = ()
    preprocess_options: tuple[str, ...] = ()

    def load(self) -> StableDiffusion:
        return load_stable_diffusion(self.checkpoint, self.device, self.dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def open_bench(args: argparse.Namespace) -> Bench:
    """Makes what benchmark.py's command line asks for and is not there: a model, a longer clip.

    Raises:
        UserError: naming the option that cannot be met.
    """
    size = re.fullmatch(r"(\d+)(?:x(\d+))?", args.size)
    if not size:
        raise UserError(f"--size: {args.size}, expected a number of pixels, or HEIGHTxWIDTH")
    device = resolve_device(args.device)
    work = Path(args.work)
    bench = Bench(
        checkpoint=model_folder(args.model, work),
        clip=clip_of(Path(args.data_path), args.frames, work),
        frames=args.frames,
        height=int(size[1]),
        width=int(size[2] or size[1]),
        steps=args.steps,
        technique=args.technique,
        device=device,
        dtype=resolve_dtype(args.dtype, device),
        work=work,
        inversion=args.inversion or "fast",
        overrides=tuple(args.set),
        preprocess_options=tuple(args.preprocess_options),
    )
    preprocess_args(bench, bench.inversion)  # refuses what preprocess would, before a model loads
    return bench


def model_folder(name: str, work: Path) -> Path:
    """The checkpoint of `--model`: a folder, one of the table, or a random one that is made."""
    if name in RANDOM_MODELS:
        folder = work / "models" / name
        if not (folder / "model_index.json").is_file():
            log.info("making %s in %s", name, folder)
            # In a process of its own, whose memory is not this one's.
            maker = [sys.executable, "-m", "scripts.tiny_model.make_random"]
            command = [*maker, str(folder.absolute()), *RANDOM_MODELS[name]]
            subprocess.run(command, check=True, cwd=ROOT)
        return folder
    if name not in MODELS and not Path(name).is_dir():
        known = ", ".join([*RANDOM_MODELS, *MODELS])
        raise UserError(f"--model: {name}: no such folder, and none of {known}")
    return checkpoint_folder(MODELS.get(name, name))


def clip_of(source: Path, n_frames: int, work: Path) -> Path:
    """The clip itself if it is long enough, else one that plays it back and forth, in `work`."""
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
    period = there + there[-2:0:-1]
    return list(itertools.islice(itertools.cycle(period), n_frames))


# ---------------------------------------------------------------------------------------------
# Settings


def setting_kind(name: str) -> str:
    """Whether a setting is one of the "edit" or of "preprocess".

    Raises:
        UserError: if it is neither.
    """
    if _is_edit(name.split("+")[0]):
        return "edit"
    if _preprocess_match(name) is not None:
        return "preprocess"
    edits = ", ".join([*EDIT_SETTINGS, "attention:BACKEND", "key=value"])
    others = ", ".join(key.replace("{n}", "N") for key in PREPROCESS_SETTINGS)
    raise UserError(
        f"{name}: unknown setting; of an edit: {edits} (joined by +); of preprocess: {others}"
    )


def _is_edit(piece: str) -> bool:
    return piece in EDIT_SETTINGS or piece.startswith("attention:") or "=" in piece


def edit_overrides(name: str) -> list[str]:
    """The keys of the config that a setting of the edit is made of; its parts are joined by +."""
    overrides = []
    for piece in name.split("+"):
        if not _is_edit(piece):
            raise UserError(f"{name}: {piece} is no setting of an edit")
        if piece.startswith("attention:"):
            overrides.append(f"attention_backend={piece.removeprefix('attention:')}")
        else:
            overrides += EDIT_SETTINGS.get(piece, [piece])
    return overrides


def _preprocess_match(name: str) -> tuple[tuple[str, ...], str] | None:
    for key, options in PREPROCESS_SETTINGS.items():
        found = re.fullmatch(key.replace("{n}", r"(\d+)"), name)
        if found:
            return options, found[1] if found.groups() else ""
    return None


def preprocess_args(bench: Bench, name: str) -> argparse.Namespace:
    """preprocess.py's command line for a setting.

    Raises:
        UserError: if there is no such setting, or preprocess.py refuses its options.
    """
    found = _preprocess_match(name)
    if found is None:
        setting_kind(name)  # names what is known
        raise UserError(f"{name}: is a setting of an edit, expected one of preprocess")
    options, number = found
    words = ["--data_path", str(bench.clip), "--model_key", str(bench.checkpoint)]
    words += ["--H", str(bench.height), "--W", str(bench.width), "--n_frames", str(bench.frames)]
    words += ["--device", str(bench.device), "--dtype", bench.dtype_name]
    words += ["--inversion_prompt", SOURCE_PROMPT, "--save_steps", str(bench.steps)]
    words += [word.format(steps=bench.steps, n=number) for word in options]
    for key, _, value in (override.partition("=") for override in bench.overrides):
        if key in FEATURE_OPTIONS:
            words += [f"--{FEATURE_OPTIONS[key]}", value]
    words += bench.preprocess_options
    # A folder for each of these, since a cache's own name holds the clip and steps only.
    made_of = json.dumps([words, checkpoint_revision(bench.checkpoint), FORMAT])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return preprocess.parse_args([*words, "--save_dir", str(bench.work / "caches" / digest)])


def edit_config(bench: Bench, overrides: list[str]) -> EditConfig:
    """The edit's configuration, read as a run script reads it."""
    cache = preprocess_args(bench, bench.inversion)
    path = bench.work / "config.yaml"
    save_yaml(
        path,
        {
            "data_path": str(bench.clip),
            "latents_path": cache.save_dir,
            "output_path": str(bench.work / "results"),
            "model_key": str(bench.checkpoint),
            "n_inversion_steps": cache.steps,
            "n_timesteps": bench.steps,
            "n_frames": bench.frames,
            "device": str(bench.device),
            "dtype": bench.dtype_name,
            "prompt": PROMPT,
            "negative_prompt": SOURCE_PROMPT,
        },
    )
    return load_config(TECHNIQUES[bench.technique][1], path, [*bench.overrides, *overrides])


# ---------------------------------------------------------------------------------------------
# Runs


def run_preprocess(bench: Bench, models: StableDiffusion, count_flops: bool = False) -> Meter:
    """preprocess.py's own work, from reading the clip to its finished cache.

    The stage "rest" is what no other stage times: writing the cache, and checksums.
    """
    args = preprocess_args(bench, bench.inversion)
    meter = Meter(bench.device, count_flops)
    start = time.perf_counter()
    with meter.watching(models.unet):
        inputs = preprocess.open_inputs(args)
        preprocess.make_cache(inputs, args.batch_size, models, meter)
        if inputs.features is not None:
            preprocess.make_features(inputs, args.batch_size, models, meter)
    meter.add("rest", time.perf_counter() - start - sum(meter.seconds.values()))
    return meter


def ensure_cache(bench: Bench, models: StableDiffusion) -> None:
    """Makes the cache that is edited, if it is not there."""
    args = preprocess_args(bench, bench.inversion)
    inputs = preprocess.open_inputs(args)
    if not preprocess.is_made(inputs):
        preprocess.make_cache(inputs, args.batch_size, models)
    if inputs.features is not None and not preprocess.has_features(inputs):
        preprocess.make_features(inputs, args.batch_size, models)


def run_edit(bench: Bench, models: StableDiffusion, count_flops: bool = False) -> Meter:
    """A run script's own work, from checking the cache to the written result."""
    config = edit_config(bench, [])
    meter = Meter(bench.device, count_flops)
    with meter.watching(models.unet):
        with meter("open"):
            inputs = open_inputs(config)
        session = EditSession(inputs, models, meter)
        edited = session.edit(make_plan(bench, session))
        with replacing_folder(result_folder(inputs, bench.technique)) as folder:
            session.save(edited, bench.technique, Workplace(folder))
    return meter


def make_plan(bench: Bench, session: EditSession) -> EditPlan:
    """What the technique does in a session."""
    script = TECHNIQUES[bench.technique][0]
    if bench.technique == "pnp":
        script.check_injection_layers(session.inputs.checkpoint)
    return script.plan(session)


@dataclass(frozen=True)
class Prepared:
    """A setting of an edit, ready to run: `work()` gives its latents (n, 4, h, w)."""

    name: str
    work: Callable[[], Tensor]
    session: EditSession
    plan: EditPlan

    @property
    def models(self) -> StableDiffusion:
        return self.session.models


def prepare_edit(bench: Bench, name: str, models: StableDiffusion) -> Prepared:
    """Opens an edit under a setting; it shares the models, but for one that compiles its own."""
    overrides = edit_overrides(name)
    config = edit_config(bench, overrides)
    if "compile=true" in overrides:
        models = bench.load()
    session = EditSession(open_inputs(config), models)
    plan = make_plan(bench, session)
    if "three_branch" in name.split("+"):
        three_branch.check(session, plan)
        return Prepared(name, partial(three_branch.edit_latents, session, plan), session, plan)
    return Prepared(name, partial(session.edit_latents, plan), session, plan)


@dataclass(frozen=True)
class Timed:
    """One timed run of a setting: `result` is an edit's latents, or preprocess's cache folder.

    `processor` is the processor time, which other work on the machine hardly changes.
    """

    seconds: float
    processor: float
    images: int
    result: Tensor | Path


def timed_edit(prepared: Prepared, device: torch.device) -> Timed:
    """Times the denoising loop.

    Raises:
        UserError: if the setting is `cached`, and the cached features did not serve it.
    """
    meter = Meter(device)
    with meter.watching(prepared.models.unet), meter("edit"):
        latents = prepared.work()
    if "cached" in prepared.name.split("+") and prepared.session.source_features != "cached":
        raise UserError(f"{prepared.name}: the edit was computed live; the log says why")
    return Timed(meter.seconds["edit"], meter.processor["edit"], meter.images["edit"], latents)


def timed_preprocess(bench: Bench, name: str, models: StableDiffusion) -> Timed:
    """Times inversion and reconstruction, of latents; the VAE, reading and writing apart."""
    args = preprocess_args(bench, name)
    inputs = preprocess.open_inputs(args)
    meter = Meter(bench.device)
    with meter.watching(models.unet):
        preprocess.make_cache(inputs, args.batch_size, models, meter)
    stages = "inversion", "reconstruction"
    return Timed(
        sum(meter.seconds[stage] for stage in stages),
        sum(meter.processor[stage] for stage in stages),
        sum(meter.images[stage] for stage in stages),
        inputs.folder,
    )


@torch.inference_mode()
def reconstruction_psnr(bench: Bench, name: str, models: StableDiffusion, folder: Path) -> float:
    """PSNR in dB of a cache's reconstruction, as its setting has it, against the VAE's own.

    Raises:
        UserError: if the cache does not hold the latents that reconstruction starts from.
    """
    args = preprocess_args(bench, name)
    inputs = preprocess.open_inputs(args)
    cache = open_cache(folder)
    frames = cache.frames(bench.frames)
    denoiser = make_denoiser(
        models, frames, SOURCE_PROMPT, cache.manifest.control, cache.depth(bench.frames)
    )
    timesteps = inputs.timesteps.reconstruction
    if timesteps[0] not in cache.manifest.timesteps:
        raise UserError(f"{name}: the cache holds no latents at timestep {timesteps[0]}")
    noisy = cache.latents(timesteps[0], bench.frames)
    clean = cache.latents(CLEAN_LATENTS, bench.frames)
    batch = RECONSTRUCTION_BATCH
    found = decode_latents(models, reconstruct(denoiser, noisy, timesteps, batch), batch)
    return psnr(found, decode_latents(models, clean, batch))


def profile_step(prepared: Prepared, device: torch.device, rows: int) -> str:
    """The operators of an edit's second step that take most time, as a table.

    Raises:
        UserError: if the edit has one step only.
    """
    if len(prepared.plan.timesteps) < 2:
        raise UserError("--profile: needs an edit of two steps at least, the first warms up")
    activities, key = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities, key = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    seen: list[int] = []
    # From one step's first call of the UNet to the next's; one step warms up.
    with profile(
        activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)
    ) as profiler:

        def at_a_step(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            t = int(args[1] if len(args) > 1 else kwargs["timestep"])
            if t not in seen:
                if seen:
                    profiler.step()
                seen.append(t)

        hook = prepared.models.unet.register_forward_pre_hook(at_a_step, with_kwargs=True)
        try:
            prepared.work()
        finally:
            hook.remove()
    return profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60)


def facts(bench: Bench) -> dict[str, object]:
    """What was run, as plain values for JSON."""
    plain = asdict(bench)
    kept = (int, tuple)
    return {key: value if isinstance(value, kept) else str(value) for key, value in plain.items()}
