"""What benchmark.py does: the table of stages, --compare, --scaling and --profile.

Each mode returns the figures for JSON and the text to print.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as torch_profile

from tokenflow.benchmarks.meters import Meter, limit_memory, matrix_rate
from tokenflow.benchmarks.runs import (
    Bench,
    Options,
    PreparedEdit,
    edit_config,
    ensure_cache,
    open_bench,
    prepare_edit,
    run_edit,
    run_preprocess,
    setting_kind,
    timed_edit,
    timed_preprocess,
)
from tokenflow.cache.source_cache import open_cache
from tokenflow.ops.profiling import device_name
from util import UserError, setup_logging

log = logging.getLogger("tokenflow")

PARTS = {"preprocess": run_preprocess, "edit": run_edit}
TOTAL = "total"  # the row of all stages of a part
MIB = 1 << 20
PROFILE_ROWS = 25


def benchmark(options: Options, args: argparse.Namespace) -> tuple[dict, str]:
    """Runs what benchmark.py's command line asks for; returns all figures and the text to print.

    Args:
        args: what is not in the options: compare, scaling, profile, only, set, preprocess_options.
    """
    if args.scaling:
        return scale(options, args)
    bench = open_bench(options, args.set, args.preprocess_options)
    if options.memory_limit is not None and bench.device.type == "cuda":
        limit_memory(bench.device, options.memory_limit)
    mode = compare if args.compare else profile if args.profile else time_stages
    found, text = mode(bench, args)
    return facts(bench) | found, text


def facts(bench: Bench) -> dict[str, object]:
    """What was run, as plain values for JSON."""
    resolved = ("checkpoint", "clip", "height", "width", "device", "dtype")
    return {
        **bench.options.model_dump(),
        **{name: str(getattr(bench, name)) for name in resolved},
        "overrides": list(bench.overrides),
        "preprocess_options": list(bench.preprocess_options),
        "device_name": device_name(bench.device),
        "keyframes": -(-bench.options.frames // edit_config(bench, []).batch_size),
    }


# ---------------------------------------------------------------------------------------------
# Every stage


def time_stages(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The medians of every stage."""
    parts = [part for part in PARTS if args.only in (None, part)]
    meter = Meter(bench.device)
    with meter("load"):
        models = bench.load()
    rows = stage_rows("models", [meter], {}, 0)[:1]
    rate, measured = matrix_rate(bench.device, bench.dtype), []
    for part in parts:
        if part == "edit":
            ensure_cache(bench, models)
        warm = [
            PARTS[part](bench, models, count_flops=i == 0) for i in range(bench.options.warm_up)
        ]
        runs = [PARTS[part](bench, models) for _ in range(bench.options.repeats)]
        measured.append((part, runs, warm[0].flops if warm else {}))
    # Before and after, since other work on the machine may slow either down.
    rate = max(rate, matrix_rate(bench.device, bench.dtype))
    lines = [f"matrix products reach {rate / 1e12:.3g} TFLOP/s here"]
    for part, runs, flops in measured:
        rows += stage_rows(part, runs, flops, rate)
        images = rows[-1]["image_forwards"] / bench.options.frames
        lines.append(f"{part}: {images:.1f} image-forwards of the UNet a frame")
    text = "\n".join([stage_table(rows), *lines])
    return {"stages": rows, "matrix_flops_per_second": rate}, text


def stage_rows(part: str, runs: list[Meter], flops: Mapping[str, int], rate: float) -> list[dict]:
    """A row for each stage of some equal runs, and one for all stages together.

    Args:
        flops: of each stage; empty where they were not counted.
        rate: FLOP/s that the device can do.
    """

    def of(stage: str, found: Mapping[str, float], whole: Callable = sum) -> float:
        return whole(found.values() or [0]) if stage == TOTAL else found.get(stage, 0)

    rows = []
    for stage in [*runs[0].seconds, TOTAL]:
        seconds = [of(stage, run.seconds) for run in runs]
        median, work = statistics.median(seconds), of(stage, flops)
        rows.append(
            {
                "part": part,
                "stage": stage,
                "seconds": median,
                "seconds_low": min(seconds),
                "seconds_high": max(seconds),
                "image_forwards": of(stage, runs[-1].images),
                "flops": work or None,
                "flops_per_second": work / median if work else None,
                "utilisation": work / median / rate if work else None,
                "peak_memory_bytes": max(of(stage, run.peak, max) for run in runs) or None,
            }
        )
    return rows


def stage_table(rows: Sequence[Mapping]) -> str:
    """The rows of `stage_rows` for the terminal."""

    def scaled(row: Mapping, key: str, unit: float, form: str) -> str | None:
        return None if row[key] is None else form.format(row[key] / unit)

    cells = [
        {
            "part": row["part"],
            "stage": row["stage"],
            "seconds": f"{row['seconds']:.3f}",
            "spread": f"{row['seconds_low']:.3f}-{row['seconds_high']:.3f}",
            "forwards": row["image_forwards"] or None,
            "TFLOP": scaled(row, "flops", 1e12, "{:.4g}"),
            "TFLOP/s": scaled(row, "flops_per_second", 1e12, "{:.3g}"),
            "of peak": scaled(row, "utilisation", 0.01, "{:.0f} %"),
            "peak MiB": scaled(row, "peak_memory_bytes", MIB, "{:.0f}"),
        }
        for row in rows
    ]
    return table(cells)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as text in columns."""
    words = [isinstance(value, str) and value.isalpha() for value in rows[0].values()]
    align = ["left" if word else "right" for word in words]
    return tabulate(rows, headers="keys", tablefmt="plain", disable_numparse=True, colalign=align)


# ---------------------------------------------------------------------------------------------
# Two settings in turn


def compare(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The median of the pairs' ratios of seconds."""
    names, models = args.compare, bench.load()
    if setting_kind(names[0]) == "edit":
        ensure_cache(bench, models)
        edits = [prepare_edit(bench, name, models) for name in names]
        runs = [lambda edit=edit: timed_edit(edit) for edit in edits]
    else:
        runs = [lambda name=name: timed_preprocess(bench, name, models) for name in names]
    for _ in range(bench.options.warm_up):
        for run in runs:
            run()
    pairs = [[run() for run in runs] for _ in range(bench.options.repeats)]
    a, b = pairs[-1]
    found = {
        "kind": setting_kind(names[0]),
        "a": names[0],
        "b": names[1],
        **ratio_figures([(a.seconds, b.seconds) for a, b in pairs]),
        "processor_ratio": statistics.median(a.processor / b.processor for a, b in pairs),
        "image_forwards_a": a.images,
        "image_forwards_b": b.images,
    }
    lines = [
        f"{names[0]} / {names[1]}: {found['ratio']:.3f} of the time "
        f"({found['ratio_low']:.3f}-{found['ratio_high']:.3f}, {len(pairs)} pairs); "
        f"{found['seconds_a']:.3f} s and {found['seconds_b']:.3f} s"
    ]
    if bench.device.type == "cpu":
        lines.append(f"of processor time: {found['processor_ratio']:.3f}")
    forwards = [timed.images / bench.options.frames for timed in (a, b)]
    lines.append(f"image-forwards of the UNet a frame: {forwards[0]:.1f} and {forwards[1]:.1f}")
    if found["kind"] == "edit":
        found["difference"] = float((a.result - b.result).norm() / b.result.norm())
        lines.append(f"relative difference of their latents: {found['difference']:.2e}")
    else:
        psnr = [open_cache(timed.result).manifest.psnr_to_vae for timed in (a, b)]
        found |= {"psnr_a": psnr[0], "psnr_b": psnr[1]}
        lines.append(
            f"PSNR of the reconstruction against the VAE's: {psnr[0]:.2f} dB and {psnr[1]:.2f} dB"
        )
    return found, "\n".join(lines)


def ratio_figures(pairs: Sequence[tuple[float, float]]) -> dict:
    """The median, lowest and highest ratio of the pairs, and the medians of their seconds."""
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "seconds_a": statistics.median(a for a, _ in pairs),
        "seconds_b": statistics.median(b for _, b in pairs),
        "pairs": [list(pair) for pair in pairs],
    }


# ---------------------------------------------------------------------------------------------
# Numbers of frames


def scale(options: Options, args: argparse.Namespace) -> tuple[dict, str]:
    """A row for each number of frames, each part in a fresh process, without warm-up.

    This process loads no model: a child's peak memory starts from its parent's.
    """
    rows = []
    for frames in sorted(args.scaling):
        row: dict = {"frames": frames}
        for part in PARTS:
            one = options.model_copy(update={"frames": frames, "warm_up": 0, "repeats": 1})
            found = in_fresh_process(one, args, part)
            loading, *stages = found["stages"]
            row["keyframes"] = found["keyframes"]
            row["load_peak_memory_bytes"] = loading["peak_memory_bytes"]
            row[f"{part}_seconds"] = stages[-1]["seconds"]
            row[f"{part}_peak_memory_bytes"] = stages[-1]["peak_memory_bytes"]
            row[f"{part}_stages"] = stages
        log.info("%d frames: done", frames)
        rows.append(row)
    first, last = rows[0], rows[-1]
    peaks = {part: f"{part}_peak_memory_bytes" for part in PARTS}
    ratios = {part: last[peak] / first[peak] for part, peak in peaks.items()}
    cells = [
        {"frames": row["frames"], "keyframes": row["keyframes"]}
        | {f"{part} s": f"{row[f'{part}_seconds']:.2f}" for part in PARTS}
        | {f"{part} MiB": f"{row[peak] / MIB:.0f}" for part, peak in peaks.items()}
        for row in rows
    ]
    text = [
        table(cells),
        f"the models alone, as they load: {first['load_peak_memory_bytes'] / MIB:.0f} MiB",
        f"peak for {last['frames']} frames over that for {first['frames']}: "
        + ", ".join(f"{part} {ratio:.3f}" for part, ratio in ratios.items()),
    ]
    return {"rows": rows, **{f"{p}_ratio": r for p, r in ratios.items()}}, "\n".join(text)


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
    models = bench.load()
    ensure_cache(bench, models)
    text = profile_step(prepare_edit(bench, args.profile, models))
    return {"profile": text.splitlines()}, text


def profile_step(edit: PreparedEdit) -> str:
    """See `profile`."""
    if len(edit.plan.timesteps) < 2:
        raise UserError("--profile: needs an edit of two steps at least, the first warms up")
    unet, cuda = edit.session.models.unet, edit.session.models.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    seen: list[int] = []
    # From one step's first call of the UNet to the next's; one step warms up.
    with torch_profile(
        activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)
    ) as profiler:

        def at_a_step(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            t = int(args[1] if len(args) > 1 else kwargs["timestep"])
            if t not in seen:
                if seen:
                    profiler.step()
                seen.append(t)

        hook = unet.register_forward_pre_hook(at_a_step, with_kwargs=True)
        try:
            edit()
        finally:
            hook.remove()
    key = f"self_{'cuda' if cuda else 'cpu'}_time_total"
    return profiler.key_averages().table(key, row_limit=PROFILE_ROWS, max_name_column_width=60)
