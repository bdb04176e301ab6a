"""Times preprocess and edits: seconds, UNet image-forwards, FLOPs and memory of every stage.

    python benchmark.py --model tiny --frames 16 --steps 50
    python benchmark.py --model sd21-random --frames 40 --size 512 --device cuda --json out.json
    python benchmark.py --compare tokenflow per_frame --json ratio.json
    python benchmark.py --scaling 8 16 32 64 --steps 10
    python benchmark.py --profile tokenflow --steps 4

Without a mode, every stage of one preprocess and one edit is timed. `--compare A B` runs two
settings in turn, so that a machine that drifts drifts for both. `--scaling` runs each number of
frames in fresh processes, so that their memory is their own.

Settings of an edit: tokenflow, cached, live, three_branch (a plain loop to compare with),
compiled, per_frame, extended_attention, first_frame, released, flow, attention:BACKEND, or any
key=value of its config; joined by +. Of preprocess: fast and fast_no_stop (--fast's iterations
in --steps steps), plainN (N plain steps, reconstructed in N), itersN (N iterations).
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenflow.benchmarks.meters import Meter, limit_memory, matrix_rate
from tokenflow.benchmarks.runs import (
    Bench,
    Timed,
    edit_config,
    ensure_cache,
    facts,
    open_bench,
    prepare_edit,
    profile_step,
    reconstruction_psnr,
    run_edit,
    run_preprocess,
    setting_kind,
    timed_edit,
    timed_preprocess,
)
from tokenflow.diffusion.models import StableDiffusion
from tokenflow.ops.profiling import device_name, versions
from util import (
    ArgumentParser,
    UserError,
    check_report_path,
    check_writable,
    command_line,
    setup_logging,
    write_reports,
)

log = logging.getLogger("tokenflow")

PARTS = ("preprocess", "edit")
TOTAL = "total"  # the row of all stages of a part
MIB = 1 << 20
PROFILE_ROWS = 25


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line.

    Raises:
        UserError: if an option is unknown, mistyped or out of range.
    """
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny",
        help="a folder in diffusers' format, a name of preprocess.py's --sd_version, or one that "
        "is made in --work: tiny-random, medium-random, sd21-random (default: tiny)")  # fmt: skip
    add("--data_path", default=str(Path(__file__).parent / "data" / "star.mp4"),
        help="a clip; too short, it is played back and forth (default: data/star.mp4)")  # fmt: skip
    add("--frames", type=int, default=16, help="of the clip (default: 16)")
    add("--size", default="256", help="pixels, N or HEIGHTxWIDTH (default: 256)")
    add("--steps", type=int, default=50, help="sampling steps (default: 50)")
    add("--technique", choices=("pnp", "sdedit"), default="pnp", help="of edits (default: pnp)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="auto is float16 on CUDA, float32 elsewhere")  # fmt: skip
    add("--inversion", metavar="SETTING",
        help="preprocess setting of the cache that is edited (default: fast)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="key of the edit's config; any number of times")  # fmt: skip
    add("--preprocess_options", type=shlex.split, default=[], metavar='"--OPTION VALUE ..."',
        help="further options of preprocess.py")  # fmt: skip
    add("--work", default="latents/benchmark",
        help="for models, clips, caches and results (default: latents/benchmark)")  # fmt: skip
    add("--warm_up", type=int, default=1, help="runs before the timed ones (default: 1)")
    add("--repeats", type=int, default=3, help="timed runs, or pairs of them (default: 3)")
    add("--memory_limit", type=float, metavar="GIB",
        help="of a GPU's memory: what may be taken, as if there were no more")  # fmt: skip
    add("--only", choices=PARTS, help="time this part alone")
    add("--json", metavar="FILE", type=Path, help="write all figures here; -: to stdout")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compare", nargs=2, metavar=("A", "B"),
        help="seconds of setting A over those of setting B")  # fmt: skip
    mode.add_argument("--scaling", nargs="+", type=int, metavar="FRAMES",
        help="time and memory for each of these numbers of frames")  # fmt: skip
    mode.add_argument("--profile", metavar="SETTING", help="the operators of an edit's step")
    args = parser.parse_args(argv)
    for name, low in (("frames", 1), ("steps", 1), ("warm_up", 0), ("repeats", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: {getattr(args, name)}, expected a number of at least {low}")
    if args.memory_limit is not None and not args.memory_limit > 0:
        raise UserError(f"--memory_limit: {args.memory_limit}, expected a number above 0")
    if args.scaling and min(args.scaling) < 1:
        raise UserError("--scaling: expected numbers of frames of at least 1")
    if args.only and (args.compare or args.scaling or args.profile):
        raise UserError("--only: goes with the table of stages, not with --compare and the like")
    if args.compare and len({setting_kind(name) for name in args.compare}) > 1:
        raise UserError(
            f"--compare: {args.compare[0]} and {args.compare[1]}: one is a setting of an edit, the "
            "other of preprocess; expected two of one kind"
        )
    if args.profile and setting_kind(args.profile) != "edit":
        raise UserError(f"--profile: {args.profile}, expected a setting of an edit")
    check_writable(args.work, "--work")
    if args.json is not None:
        check_report_path(args.json, "--json")
    return args


# ---------------------------------------------------------------------------------------------
# Every stage


def time_stages(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The medians of every stage; returns what JSON gets and the table."""
    parts = [part for part in PARTS if args.only in (None, part)]
    models, rows = load(bench)
    rate, measured = matrix_rate(bench.device, bench.dtype), []
    for part in parts:
        run = {"preprocess": run_preprocess, "edit": run_edit}[part]
        if part == "edit":
            ensure_cache(bench, models)
        warm = [run(bench, models, count_flops=i == 0) for i in range(args.warm_up)]
        flops = warm[0].flops if warm else {}
        measured.append((part, [run(bench, models) for _ in range(args.repeats)], flops))
    # Before and after, since other work on the machine may slow either down.
    rate = max(rate, matrix_rate(bench.device, bench.dtype))
    for part, runs, flops in measured:
        rows += stage_rows(part, runs, flops, rate)
    lines = [stage_table(rows), f"matrix products reach {rate / 1e12:.3g} TFLOP/s here"]
    for part in parts:
        images = sum(r["image_forwards"] for r in rows if r["part"] == part and r["stage"] != TOTAL)
        lines.append(f"{part}: {images / bench.frames:.1f} image-forwards of the UNet a frame")
    return {"stages": rows, "matrix_flops_per_second": rate}, "\n".join(lines)


def load(bench: Bench) -> tuple[StableDiffusion, list[dict]]:
    """The models, and the row of their loading."""
    meter = Meter(bench.device)
    with meter("load"):
        models = bench.load()
    return models, stage_rows("models", [meter], {}, 0)[:1]


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


def stage_table(rows: list[dict]) -> str:
    cells = [
        [
            row["part"],
            row["stage"],
            f"{row['seconds']:.3f}",
            f"{row['seconds_low']:.3f}-{row['seconds_high']:.3f}",
            str(row["image_forwards"] or ""),
            _scaled(row["flops"], 1e12, "{:.4g}"),
            _scaled(row["flops_per_second"], 1e12, "{:.3g}"),
            _scaled(row["utilisation"], 0.01, "{:.0f} %"),
            _scaled(row["peak_memory_bytes"], MIB, "{:.0f}"),
        ]
        for row in rows
    ]
    head = ["part", "stage", "seconds", "spread", "forwards", "TFLOP", "TFLOP/s", "of peak"]
    return table([*head, "peak MiB"], cells)


def _scaled(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else form.format(value / unit)


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Text in columns: words to the left, the first of them, and numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    words = [all(row[i][:1].isalpha() for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in (head, *cells)
    )


# ---------------------------------------------------------------------------------------------
# Two settings in turn


def compare(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The median of the pairs' ratios of seconds; returns what JSON gets and the table."""
    names, models = args.compare, bench.load()
    kind = setting_kind(names[0])
    if kind == "edit":
        ensure_cache(bench, models)
        prepared = [prepare_edit(bench, name, models) for name in names]
        runs: list[Callable[[], Timed]] = [
            lambda one=one: timed_edit(one, bench.device) for one in prepared
        ]
    else:
        runs = [lambda name=name: timed_preprocess(bench, name, models) for name in names]
    for _ in range(args.warm_up):
        for run in runs:
            run()
    pairs = [[run() for run in runs] for _ in range(args.repeats)]
    found = {
        "kind": kind,
        "a": names[0],
        "b": names[1],
        **ratio_figures([(a.seconds, b.seconds) for a, b in pairs]),
        "processor_ratio": statistics.median(a.processor / b.processor for a, b in pairs),
        "image_forwards_a": pairs[-1][0].images,
        "image_forwards_b": pairs[-1][1].images,
    }
    lines = [
        f"{names[0]} / {names[1]}: {found['ratio']:.3f} of the time "
        f"({found['ratio_low']:.3f}-{found['ratio_high']:.3f}, {len(pairs)} pairs); "
        f"{found['seconds_a']:.3f} s and {found['seconds_b']:.3f} s"
    ]
    if bench.device.type == "cpu":
        lines.append(f"of processor time: {found['processor_ratio']:.3f}")
    forwards = [images / bench.frames for images in (pairs[-1][0].images, pairs[-1][1].images)]
    lines.append(f"image-forwards of the UNet a frame: {forwards[0]:.1f} and {forwards[1]:.1f}")
    a, b = (timed.result for timed in pairs[-1])
    if kind == "edit":
        found["difference"] = float((a - b).norm() / b.norm())
        lines.append(f"relative difference of their latents: {found['difference']:.2e}")
    else:
        found["psnr_a"] = reconstruction_psnr(bench, names[0], models, a)
        found["psnr_b"] = reconstruction_psnr(bench, names[1], models, b)
        lines.append(
            "PSNR of the reconstruction against the VAE's: "
            f"{found['psnr_a']:.2f} dB and {found['psnr_b']:.2f} dB"
        )
    return found, "\n".join(lines)


def ratio_figures(pairs: Sequence[tuple[float, float]]) -> dict:
    """Of the pairs' ratios the median, lowest and highest; and the medians of their seconds."""
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


def scale(args: argparse.Namespace) -> tuple[dict, str]:
    """A row for each number of frames, each part in a fresh process, without warm-up.

    This process loads no model: a child's peak memory starts from its parent's.
    """
    file = Path(args.work) / "part.json"
    rows = []
    for frames in args.scaling:
        row: dict = {"frames": frames}
        for part in PARTS:
            found = run_part(args, frames, part, file)
            total = next(r for r in found["stages"] if (r["part"], r["stage"]) == (part, TOTAL))
            row[f"{part}_seconds"] = total["seconds"]
            row[f"{part}_peak_memory_bytes"] = total["peak_memory_bytes"]
            row[f"{part}_stages"] = [r for r in found["stages"] if r["part"] == part]
            row["load_peak_memory_bytes"] = found["stages"][0]["peak_memory_bytes"]
        row["keyframes"] = found["keyframes"]
        log.info("%d frames: done", frames)
        rows.append(row)
    rows.sort(key=lambda row: row["frames"])
    ratios = {
        part: rows[-1][f"{part}_peak_memory_bytes"] / rows[0][f"{part}_peak_memory_bytes"]
        for part in PARTS
    }
    cells = [
        [
            str(row["frames"]),
            str(row["keyframes"]),
            *(f"{row[f'{part}_seconds']:.2f}" for part in PARTS),
            *(f"{row[f'{part}_peak_memory_bytes'] / MIB:.0f}" for part in PARTS),
        ]
        for row in rows
    ]
    head = ["frames", "keyframes", "preprocess s", "edit s", "preprocess MiB", "edit MiB"]
    text = [
        table(head, cells),
        f"the models alone, as they load: {rows[0]['load_peak_memory_bytes'] / MIB:.0f} MiB",
        f"peak for {rows[-1]['frames']} frames over that for {rows[0]['frames']}: "
        + ", ".join(f"{part} {ratio:.3f}" for part, ratio in ratios.items()),
    ]
    return {"rows": rows, **{f"{p}_ratio": r for p, r in ratios.items()}}, "\n".join(text)


def run_part(args: argparse.Namespace, frames: int, part: str, file: Path) -> dict:
    """Runs this script on one part of one number of frames; returns what it writes as JSON.

    Raises:
        UserError: if it fails; its own message has been printed.
    """
    words = ["--frames", str(frames), "--only", part, "--warm_up", "0", "--repeats", "1"]
    for name in ("model", "data_path", "size", "steps", "technique", "device", "dtype", "work"):
        words += [f"--{name}", str(getattr(args, name))]
    for name in ("inversion", "memory_limit"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    for override in args.set:
        words += ["--set", override]
    words.append(f"--preprocess_options={shlex.join(args.preprocess_options)}")
    command = [sys.executable, __file__, *words, "--json", str(file)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"--scaling: {frames} frames: {part} failed: {shlex.join(command)}")
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------


def profile(bench: Bench, args: argparse.Namespace) -> tuple[dict, str]:
    """The operators of an edit's step."""
    models = bench.load()
    ensure_cache(bench, models)
    prepared = prepare_edit(bench, args.profile, models)
    text = profile_step(prepared, bench.device, PROFILE_ROWS)
    return {"profile": text.splitlines()}, text


def benchmark(args: argparse.Namespace, command: Sequence[str]) -> tuple[dict, str]:
    """Runs what the command line asks for; returns all figures and the text to print."""
    record: dict = {"command": shlex.join(command)}
    if args.scaling:
        found, text = scale(args)
    else:
        bench = open_bench(args)
        if args.memory_limit is not None and bench.device.type == "cuda":
            limit_memory(bench.device, args.memory_limit)
        record |= facts(bench) | {"device_name": device_name(bench.device)}
        record["keyframes"] = -(-bench.frames // edit_config(bench, []).batch_size)
        if args.compare:
            found, text = compare(bench, args)
        elif args.profile:
            found, text = profile(bench, args)
        else:
            found, text = time_stages(bench, args)
    return record | {"versions": versions()} | found, text


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the script; returns the figures that --json writes."""
    setup_logging()
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    found, text = benchmark(args, ["python", "benchmark.py", *words])
    write_reports(text, [(args.json, json.dumps(found, indent=1) + "\n")] if args.json else [])
    return found


if __name__ == "__main__":
    command_line(main)
