"""What benchmark.py does: the table of stages, --compare, --scaling and --profile.

Each mode returns the figures for JSON and the text to print.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from statistics import median

import torch
from tabulate import tabulate
from torch.profiler import profile as torch_profile
from torch.profiler import schedule

from tokenflow.benchmarks.meters import TOTAL, Meter, matrix_rate
from tokenflow.benchmarks.options import PARTS, Options, read_setting
from tokenflow.benchmarks.runs import Bench, time_edit
from tokenflow.cache.source_cache import open_cache
from tokenflow.ops.profiling import device_name
from util import UserError, setup_logging

log = logging.getLogger("tokenflow")

MIB = 1 << 20


def benchmark(options: Options, args: argparse.Namespace) -> tuple[dict, str]:
    """Runs what benchmark.py's command line asks for; returns all figures and the text to print.

    Args:
        args: what is not in the options: compare, scaling, profile, only, set, preprocess_options.
    """
    if args.scaling:
        return scale(options, args)
    bench = Bench(options, args.set, args.preprocess_options)
    if options.memory_limit is not None and bench.device.type == "cuda":
        total = torch.cuda.get_device_properties(bench.device).total_memory
        share = min(1.0, options.memory_limit * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(share, bench.device)
    mode = compare if args.compare else profile if args.profile else time_stages
    found, text = mode(bench, args)
    resolved = ("checkpoint", "clip", "height", "width", "device", "dtype")
    facts = {
        **options.model_dump(),
        **{name: str(getattr(bench, name)) for name in resolved},
        "overrides": list(bench.overrides),
        "preprocess_options": list(bench.more),
        "device_name": device_name(bench.device),
        "keyframes": -(-options.frames // bench.edit_config().keyframe_interval),
    }
    return facts | found, text


# ---------------------------------------------------------------------------------------------
# Every stage


def time_stages(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The medians of every stage."""
    options, meter = bench.options, Meter(bench.device)
    with meter("load"):
        models = bench.load()
    rows = stage_rows("models", [meter], {}, 0)
    rate, measured = matrix_rate(bench.device, bench.dtype), []
    for part in PARTS if args.only is None else [args.only]:
        run = partial(bench.run, part)
        if part == "edit":
            bench.ensure_cache(models)
        warm = [run(models, count_flops=i == 0) for i in range(options.warm_up)]
        runs = [run(models) for _ in range(options.repeats)]
        measured.append((part, runs, warm[0].flops if warm else {}))
    # Before and after, since other work on the machine may slow either down.
    rate = max(rate, matrix_rate(bench.device, bench.dtype))
    lines = [f"matrix products reach {rate / 1e12:.3g} TFLOP/s here"]
    for part, runs, flops in measured:
        rows += stage_rows(part, runs, flops, rate)
        images = rows[-1]["image_forwards"] / options.frames
        lines.append(f"{part}: {images:.1f} image-forwards of the UNet a frame")
    return {"stages": rows, "matrix_flops_per_second": rate}, "\n".join([table(rows), *lines])


def stage_rows(part: str, runs: list[Meter], flops: Mapping[str, int], rate: float) -> list[dict]:
    """A row for each stage of some equal runs; what was not measured is None.

    Args:
        flops: of each stage; empty where they were not counted.
        rate: FLOP/s that the device can do.
    """
    rows = []
    for stage in runs[0].seconds:
        seconds = [run.seconds[stage] for run in runs]
        work = flops.get(stage) or None
        speed = work and work / median(seconds)
        rows.append(
            {
                "part": part,
                "stage": stage,
                "seconds": median(seconds),
                "lowest": min(seconds),
                "highest": max(seconds),
                "image_forwards": runs[-1].images[stage],
                "TFLOP": work and work / 1e12,
                "TFLOP/s": speed and speed / 1e12,
                "utilisation": speed and speed / rate,
                "peak MiB": max(run.peak[stage] for run in runs) / MIB or None,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as text in columns."""
    return tabulate(rows, headers="keys", tablefmt="plain", floatfmt=".5g")


# ---------------------------------------------------------------------------------------------
# Two settings in turn


def compare(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The median of the pairs' ratios of seconds."""
    names, kind, models = args.compare, read_setting(args.compare[0])[0], bench.load()
    if kind == "edit":
        runs = [partial(time_edit, name, *bench.prepare_edit(name, models)) for name in names]
    else:
        runs = [partial(bench.time_preprocess, name, models) for name in names]
    for _ in range(bench.options.warm_up):
        for run in runs:
            run()
    pairs = [[run() for run in runs] for _ in range(bench.options.repeats)]
    (meter_a, a), (meter_b, b) = pairs[-1]
    images = meter_a.images[TOTAL], meter_b.images[TOTAL]
    found = {
        "kind": kind,
        "a": names[0],
        "b": names[1],
        **ratio_figures([(a.seconds[TOTAL], b.seconds[TOTAL]) for (a, _), (b, _) in pairs]),
        "image_forwards_a": images[0],
        "image_forwards_b": images[1],
    }
    lines = [
        f"{names[0]} / {names[1]}: {found['ratio']:.3f} of the time "
        f"({found['ratio_low']:.3f}-{found['ratio_high']:.3f}, {len(pairs)} pairs); "
        f"{found['seconds_a']:.3f} s and {found['seconds_b']:.3f} s"
    ]
    forwards = " and ".join(f"{count / bench.options.frames:.1f}" for count in images)
    lines.append(f"image-forwards of the UNet a frame: {forwards}")
    if kind == "edit":
        found["difference"] = float((a - b).norm() / b.norm())
        lines.append(f"relative difference of their latents: {found['difference']:.2e}")
    else:
        psnr = [open_cache(folder).manifest.psnr_to_vae for folder in (a, b)]
        found |= {"psnr_a": psnr[0], "psnr_b": psnr[1]}
        lines.append(
            f"PSNR of the reconstruction against the VAE's: {psnr[0]:.2f} dB and {psnr[1]:.2f} dB"
        )
    return found, "\n".join(lines)


def ratio_figures(pairs: Sequence[tuple[float, float]]) -> dict:
    """The median, lowest and highest ratio of the pairs, and the medians of their seconds."""
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "seconds_a": median(a for a, _ in pairs),
        "seconds_b": median(b for _, b in pairs),
        "pairs": [list(pair) for pair in pairs],
    }


# ---------------------------------------------------------------------------------------------
# Numbers of frames


def scale(options: Options, args: argparse.Namespace) -> tuple[dict, str]:
    """A row for each number of frames, each part in a fresh process, without warm-up.

    This process loads no model: a child's peak memory starts from its parent's.
    """
    rows, stages = [], []
    for frames in sorted(args.scaling):
        row: dict = {"frames": frames}
        for part in PARTS:
            one = options.model_copy(update={"frames": frames, "warm_up": 0, "repeats": 1})
            found = in_fresh_process(one, args, part)
            loading, total = found["stages"][0], found["stages"][-1]
            row |= {
                "keyframes": found["keyframes"],
                "load MiB": loading["peak MiB"],
                f"{part} s": total["seconds"],
                f"{part} MiB": total["peak MiB"],
            }
            stages += [{"frames": frames, **stage} for stage in found["stages"]]
        log.info("%d frames: done", frames)
        rows.append(row)
    first, last = rows[0], rows[-1]
    ratios = {f"{part}_ratio": last[f"{part} MiB"] / first[f"{part} MiB"] for part in PARTS}
    text = (
        f"{table(rows)}\npeak for {last['frames']} frames over that for {first['frames']}: "
        f"preprocess {ratios['preprocess_ratio']:.3f}, edit {ratios['edit_ratio']:.3f}"
    )
    return {"rows": rows, "stages": stages, **ratios}, text


def in_fresh_process(options: Options, args: argparse.Namespace, part: str) -> dict:
    """The stages of one part, timed by a process that has loaded nothing yet.

    Raises:
        UserError: if the process is killed, as by a machine out of memory.
    """
    args = argparse.Namespace(**{**vars(args), "scaling": None, "only": part})
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=setup_logging) as pool:
        try:
            return pool.submit(benchmark, options, args).result()[0]
        except BrokenProcessPool as error:
            raise UserError(
                f"--scaling: {options.frames} frames: {part}: the process was killed"
            ) from error


# ---------------------------------------------------------------------------------------------
# The operators of a step


def profile(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The operators of an edit's second step that take most time.

    Raises:
        UserError: if the edit has one step only.
    """
    session, plan = bench.prepare_edit(args.profile, bench.load())
    if len(plan.timesteps) < 2:
        raise UserError("--profile: needs an edit of two steps at least, the first warms up")

    @contextmanager
    def step(stage: str) -> Iterator[None]:  # a stage is the set-up, or one sampling step
        yield
        profiler.step()

    session.watch = step
    second = schedule(wait=1, warmup=1, active=1, repeat=1)
    with torch_profile(schedule=second) as profiler:  # of the CPU, and of CUDA if there is one
        session.edit_latents(plan)
    key = f"self_{'cuda' if bench.device.type == 'cuda' else 'cpu'}_time_total"
    text = profiler.key_averages().table(key, row_limit=25, max_name_column_width=60)
    return {"profile": text.splitlines()}, text
