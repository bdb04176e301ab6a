"""What several processes on one clip gain: measured, beside what a formula expects.

python -m scripts.studies.distributed_speedup --model tiny --frames 16 --steps 10 --processes 2 3

It runs preprocess.py and run_tokenflow_pnp.py by their command lines: in one process, then in
several, and so on in turn. The formula takes the stage times of one process and what a step
exchanges, and is given for any number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

import preprocess
import run_tokenflow_pnp
from run_tokenflow_pnp import PnPConfig
from tokenflow.benchmarks.runs import PROMPT, RANDOM_MODELS, SOURCE_PROMPT, clip_of, model_folder
from tokenflow.cache.options import arguments
from tokenflow.cache.source_features import layer_sizes
from tokenflow.diffusion.checkpoints import load_unet_skeleton
from tokenflow.editing.inputs import open_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.ops.distributed import Team, start_team
from tokenflow_utils import TokenFlowAttention, self_attention_layers
from util import (
    ArgumentParser,
    UserError,
    command_line,
    load_config,
    load_tensors,
    load_yaml,
    save_yaml,
    setup_logging,
)

ROOT = Path(__file__).resolve().parents[2]

EXCHANGED_BYTES = 2**22  # of each process, by which the rate of exchanges is measured
EXCHANGES = 10
BRANCHES = 2
# The stages of preprocess.py and of an edit, by what is shared out in them. All else is not.
FRAMES = ("vae", "inversion", "reconstruction", "chunks", "decode")
STEPS = ("features",)
KEYFRAMES = ("keyframes",)


@dataclass(frozen=True)
class Work:
    """What there is to share out, and what a step of the edit exchanges.

    Attributes:
        frames, keyframes, steps: their numbers.
        exchanged: bytes that each process holds after a step's exchanges.
    """

    frames: int
    keyframes: int
    steps: int
    exchanged: int

    def part(self, stage: str, processes: int) -> float:
        """The part of a stage's time that is left to the busiest of several processes."""
        if stage in FRAMES:
            return -(-self.frames // processes) / self.frames
        if stage in STEPS:
            return -(-self.steps // processes) / self.steps
        if stage in KEYFRAMES:
            return -(-self.keyframes // processes) / self.keyframes
        return 1.0

    def expected(self, seconds: Mapping[str, float], processes: int, rate: float) -> float:
        """The seconds of all these stages for several processes.

        Args:
            seconds: of each stage for one.
            rate: bytes a second of an exchange.
        """
        total = sum(self.part(stage, processes) * taken for stage, taken in seconds.items())
        if "keyframes" in seconds and processes > 1:
            total += self.steps * self.exchanged / rate
        return total


def exchanged_bytes(
    checkpoint: Path, grid: tuple[int, int], frames: int, keyframes: int, width: int
) -> int:
    """What a step of an edit with cached features exchanges: tokens, outputs and eps.

    Args:
        grid: (h, w) of the latents.
        width: bytes of a token's number.
    """
    sizes = layer_sizes(load_unet_skeleton(checkpoint), grid).values()
    tokens = sum(h * w * c for h, w, c in sizes)
    return 2 * BRANCHES * keyframes * tokens * width + frames * 4 * grid[0] * grid[1] * 4


# ---------------------------------------------------------------------------------------------
# Runs


def run(processes: int, script: Path, words: Sequence[str]) -> tuple[str, float]:
    """Runs a script in processes of one thread; returns what it printed, and the seconds."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
        command += ["--num_processes", str(processes)]
    command += [str(script), *words]
    start = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{script.name} failed in {processes} processes: {done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - start


def folder_of(printed: str) -> Path:
    """The folder that a script's last line names: "cache: ..." or "result: ..."."""
    return Path(printed.strip().splitlines()[-1].partition(": ")[2])


def preprocess_seconds(cache: Path) -> dict[str, float]:
    """The seconds of each stage, as the cache's manifests say them."""
    features = load_yaml(cache / "features" / "manifest.yaml")
    return load_yaml(cache / "manifest.yaml")["seconds"] | {"features": features["seconds"]}


def exchange_rate(team: Team) -> float:
    """Bytes that a process receives a second when all gather what each of them holds."""
    share = team.share(team.size * EXCHANGED_BYTES)
    own = torch.zeros(EXCHANGED_BYTES, dtype=torch.uint8)
    share.gather(own)
    start = time.perf_counter()
    for _ in range(EXCHANGES):
        share.gather(own)
    return EXCHANGES * share.n / (time.perf_counter() - start)


def time_loop(config: PnPConfig, team: Team) -> dict[str, object]:
    """Of an edit's loop: the seconds of its keyframe pass, chunks and the rest, and the busiest
    process's processor time, which waiting and other work on the machine do not count in.
    """
    session = EditSession(open_inputs(config, team))
    plan = run_tokenflow_pnp.plan(session)
    unet, passes, began = session.models.unet, defaultdict(float), []

    def begin(module: nn.Module, args: tuple) -> None:
        began.append(time.perf_counter())

    def end(module: nn.Module, args: tuple, output: object) -> None:
        processor = unet.attn_processors[self_attention_layers(unet)[0]]
        assert isinstance(processor, TokenFlowAttention)
        stage = "keyframes" if processor.context.mode.name == "EXTENDED" else "chunks"
        passes[stage] += time.perf_counter() - began.pop()

    unet.register_forward_pre_hook(begin)
    unet.register_forward_hook(end)
    start, processor_start = time.perf_counter(), time.process_time()
    session.edit_latents(plan)
    processor = round(1000 * (time.process_time() - processor_start))
    passes["rest of the loop"] = time.perf_counter() - start - sum(passes.values())
    return {"passes": dict(passes), "processor": max(team.of_all(processor)) / 1000}


# ---------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    known = ", ".join(RANDOM_MODELS)
    parser.add_argument("--model", default="tiny", help=f"a folder, a known model, or {known}")
    parser.add_argument("--data_path", default="data/star.mp4")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--interval", type=int, default=4, help="frames per keyframe")
    parser.add_argument("--steps", type=int, default=10, help="of inversion and of sampling")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--expect", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("tokenflow-results/several_processes"))
    parser.add_argument("--worker", action="store_true", help="be one of the processes")
    args = parser.parse_args(argv)
    if min(args.frames, args.interval, args.steps, args.repeats) < 1 or min(args.processes) < 2:
        raise UserError("numbers are at least 1, --processes at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    if args.worker:
        with start_team() as team:
            config = load_config(PnPConfig, args.work / "config.yaml")
            found = time_loop(config, team) | {"rate": exchange_rate(team)}
            if team.is_main:
                print(json.dumps(found))
        return
    setup_logging()
    checkpoint = model_folder(args.model, args.work)
    clip = clip_of(Path(args.data_path), args.frames, args.work)
    options = {
        "data_path": clip,
        "model_key": checkpoint,
        "n_frames": args.frames,
        "H": args.size,
        "W": args.size,
        "steps": args.steps,
        "save_steps": args.steps,
        "interval": args.interval,
        "inversion_prompt": SOURCE_PROMPT,
        "device": "cpu",
        "overwrite": "",
    }
    config = PnPConfig(
        data_path=str(clip),
        latents_path=str(args.work / "1"),
        output_path=str(args.work / "results"),
        model_key=str(checkpoint),
        n_inversion_steps=args.steps,
        n_timesteps=args.steps,
        n_frames=args.frames,
        batch_size=args.interval,
        prompt=PROMPT,
        device="cpu",
    )
    measured = measure(args, options, config)
    keyframes = -(-args.frames // args.interval)
    grid = (args.size // preprocess.VAE_FACTOR,) * 2
    exchanged = exchanged_bytes(checkpoint, grid, args.frames, keyframes, width=4)
    show(args, measured, Work(args.frames, keyframes, args.steps, exchanged))


@dataclass(frozen=True)
class Measured:
    """What was measured, each a list of one entry a repeat.

    Attributes:
        seconds: by ("preprocess" or "edit", processes), of each stage and of the whole "command".
        loops: of `time_loop`, and the rate of exchanges in bytes a second, by processes.
        errors: relative errors of edited latents against one process's, by processes.
    """

    seconds: dict[tuple[str, int], list[dict[str, float]]]
    loops: dict[int, list[dict]]
    errors: dict[int, list[float]]


def measure(args: argparse.Namespace, options: dict[str, object], config: PnPConfig) -> Measured:
    """Runs it all in turn."""
    found = Measured(defaultdict(list), defaultdict(list), defaultdict(list))
    edit_words = ["--config", str(args.work / "config.yaml"), "--overwrite"]
    for _ in range(args.repeats):
        for processes in (1, *args.processes):
            words = arguments(options | {"save_dir": args.work / str(processes)})
            printed, seconds = run(processes, ROOT / "preprocess.py", words)
            stages = preprocess_seconds(folder_of(printed)) | {"command": seconds}
            found.seconds["preprocess", processes].append(stages)
        # All edit what one process has inverted.
        save_yaml(args.work / "config.yaml", vars(config))
        reference = None
        for processes in (1, *args.processes):
            printed, seconds = run(processes, ROOT / "run_tokenflow_pnp.py", edit_words)
            folder = folder_of(printed)
            stages = load_yaml(folder / "run.yaml")["seconds"] | {"command": seconds}
            found.seconds["edit", processes].append(stages)
            latents = load_tensors(folder / "edited_latents.safetensors")["latents"].double()
            reference = latents if reference is None else reference
            error = float((latents - reference).norm() / reference.norm())
            found.errors[processes].append(error)
        for processes in (1, *args.processes):
            words = ["--worker", "--work", str(args.work)]
            printed, _ = run(processes, Path(__file__).resolve(), words)
            found.loops[processes].append(json.loads(printed.splitlines()[-1]))
    return found


def show(args: argparse.Namespace, found: Measured, work: Work) -> None:
    """Prints what was measured and what the formula expects."""
    print(
        f"{args.model}, {work.frames} frames of {args.size}x{args.size}, {work.keyframes} "
        f"keyframes, {work.steps} steps; one thread a process, {os.cpu_count()} processors; "
        f"medians of {args.repeats} (lowest-highest)"
    )
    parts = medians([measured["passes"] for measured in found.loops[1]])
    loop = sum(parts.values())
    for what in ("preprocess", "edit"):
        alone = medians(found.seconds[what, 1])
        print(f"\n{what}: seconds of one process, and its time over that of several")
        for stage, seconds in alone.items():
            line = f"  {stage:16} {seconds:7.2f} s"
            for processes in args.processes:
                line += f"   {processes}: {ratio_text(found.seconds, what, stage, processes)}"
            print(line)
        command = alone.pop("command")
        if what == "edit":
            edit = alone.pop("edit")
            alone |= {stage: edit * seconds / loop for stage, seconds in parts.items()}
            print("  of the loop:", ", ".join(f"{s} {x / loop:.0%}" for s, x in parts.items()))
            for processes in args.processes:
                pairs = zip(found.loops[1], found.loops[processes], strict=True)
                ratios = [one["processor"] / several["processor"] for one, several in pairs]
                gain = loop / work.expected(parts, processes, float("inf"))
                print(
                    f"  processor time of the loop, one over the busiest of {processes}: "
                    f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
                    f"expected {gain:.2f}"
                )
        alone["outside of the stages"] = command - sum(alone.values())
        # What starts and reads is not shared out, and weighs less the longer the clip.
        fixed = ("load", "read", "outside of the stages")
        stages = {stage: seconds for stage, seconds in alone.items() if stage not in fixed}
        rate = median(measured["rate"] for measured in found.loops[args.processes[0]])
        for name, chosen in (("stages alone", stages), ("whole command", alone)):
            gains = (
                f"{n}: {sum(chosen.values()) / work.expected(chosen, n, rate):.2f}"
                for n in args.expect
            )
            print(f"  expected, {name}: {', '.join(gains)}")
    print(f"\nexchanged in a step: {work.exchanged / 1e6:.1f} MB")
    for processes in args.processes:
        rate = median(measured["rate"] for measured in found.loops[processes])
        print(
            f"{processes} processes: exchange at {rate / 1e9:.2f} GB/s; "
            f"edited latents differ by {max(found.errors[processes]):.1e} of their norm"
        )


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each stage."""
    return {stage: median(run[stage] for run in runs) for stage in runs[0]}


def ratio_text(
    seconds: Mapping[tuple[str, int], list[dict[str, float]]], what: str, stage: str, processes: int
) -> str:
    """How many times less a stage takes several processes, repeat by repeat."""
    pairs = zip(seconds[what, 1], seconds[what, processes], strict=True)
    ratios = sorted(one[stage] / max(several[stage], 1e-3) for one, several in pairs)
    return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


if __name__ == "__main__":
    command_line(main)
