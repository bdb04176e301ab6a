"""Reproduce the paper's Table 1 on a list of clips: edits by every row's method, and their scores.

    sh scripts/table1.sh latents/shapes/clips.yaml --jobs 2

Each clip is inverted once, edited by every row's method and scored (evaluate.py), in a process of
its own: what goes wrong with one does not lose the others. What is finished is not made again.
Rows that are missing at the end are named in an error, and the exit status is not 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import preprocess
from run_tokenflow_pnp import PnPConfig
from scripts.batch.clip_list import (
    TECHNIQUES,
    Technique,
    check_keys,
    inversion_options,
    mapping,
    merged_config,
    of_inversion,
    text,
)
from scripts.table1 import baselines
from tokenflow.cache.options import arguments
from tokenflow.editing.config import EditConfig
from tokenflow.evaluation.evaluator import Evaluator, Protocol
from tokenflow.evaluation.motion import truth_file, truth_shape
from tokenflow.evaluation.score_table import (
    COLUMNS,
    Row,
    Summary,
    aligned,
    protocols,
    read_rows,
    rows_as_json,
    summarize,
)
from tokenflow.storage.schema import parse
from tokenflow.storage.video import clip_name, resolve_clip
from util import (
    ArgumentParser,
    UserError,
    atomic_file,
    check_report_path,
    check_writable,
    command_line,
    load_yaml,
    setup_logging,
    write_reports,
)

log = logging.getLogger("tokenflow")

ROOT = Path(__file__).resolve().parents[2]


BASELINES = {
    "reconstruction": Technique(PnPConfig, baselines.reconstruction),
    "rgb_propagation": Technique(PnPConfig, baselines.rgb_propagation),
}


# What tells rows apart is the rows' alone; a list of clips cannot change it.
TOKENFLOW = {
    "consistency": "tokenflow",
    "keyframes": "random",
    "propagation": "paper",
    "blend": "sigmoid",
    "correspondence": "nn",
}


@dataclass(frozen=True)
class Method:
    """A row of the table: whose result it is, in what it is not TokenFlow, the paper's figures."""

    name: str
    technique: str
    changes: Mapping[str, object] = field(default_factory=dict)
    paper: tuple[float, float] | None = None  # warp error x1e-3, CLIP score

    @property
    def made_by(self) -> Technique:
        return {**TECHNIQUES, **BASELINES}[self.technique]

    @property
    def settings(self) -> dict[str, object]:
        return {**TOKENFLOW, **self.changes}


METHODS = (
    Method("VAE reconstruction", "reconstruction", paper=(2.0, 0.23)),
    Method("PnP, per frame", "pnp", {"consistency": "none"}, (11.3, 0.33)),
    Method(
        "Text2Video-Zero",
        "controlnet",
        {"consistency": "first_frame", "use_ddim_noise": False},
        (12.5, 0.33),
    ),
    Method("RGB propagation", "rgb_propagation"),
    Method("PnP, extended attention", "pnp", {"consistency": "extended_attention"}, (5.9, 0.33)),
    Method("PnP, fixed keyframes", "pnp", {"keyframes": "fixed"}, (3.7, 0.33)),
    Method("PnP, TokenFlow", "pnp", paper=(3.0, 0.33)),
    Method("PnP, TokenFlow (released)", "pnp", {"propagation": "released"}),
    Method("PnP, TokenFlow (linear blend)", "pnp", {"blend": "linear"}),
    Method("PnP, TokenFlow (optical flow)", "pnp", {"correspondence": "flow"}),
    Method("SDEdit, per frame", "sdedit", {"consistency": "none"}),
    Method("SDEdit, TokenFlow", "sdedit"),
    Method("ControlNet, per frame", "controlnet", {"consistency": "none"}),
    Method("ControlNet, TokenFlow", "controlnet"),
)
# Tune-A-Video trains a model on the clip and cannot be run here: its videos enter by --also.
ELSEWHERE = (("Tune-A-Video", (30.0, 0.31)),)
ORDER = (  # of the warp errors in the paper
    "VAE reconstruction",
    "PnP, TokenFlow",
    "PnP, fixed keyframes",
    "PnP, extended attention",
    "PnP, per frame",
)


# --------------------------------------------------------------------------------- list of clips


@dataclass(frozen=True)
class ClipList:
    """What a list of clips says; configs/table1_davis.yaml explains the keys."""

    path: Path
    latents_path: str
    output_path: str
    settings: dict[str, object]
    own: dict[str, dict[str, object]]  # settings of each technique
    preprocess: dict[str, object]
    protocol: Protocol
    clips: dict[str, dict[str, object]]  # by name

    def config(self, clip: str, method: Method) -> EditConfig:
        """The configuration of one row's edit of a clip."""
        family = method.technique if method.technique in TECHNIQUES else "pnp"
        entry = self.clips[clip]
        places = {"latents_path": self.latents_path, "output_path": self.output_path}
        own = {k: v for k, v in entry.items() if k not in (*TECHNIQUES, "inversion_prompt")}
        sections = (
            places,
            self.settings,
            self.own.get(family, {}),
            own,
            entry.get(family, {}),
            method.settings,
        )
        where = f"{self.path}: {clip}: {method.name}"
        return merged_config(method.made_by.config, sections, where)

    def inversion(self, clip: str) -> dict[str, object]:
        """The options of preprocess.py for a clip."""
        # The inversion's keys are the same in all rows; the source's features serve PnP's.
        config = self.config(clip, next(m for m in METHODS if m.technique == "pnp"))
        prompt = {"inversion_prompt": self.clips[clip]["inversion_prompt"]}
        return inversion_options(config) | prompt | self.preprocess


def read_list(path: Path) -> ClipList:
    """Read a list of clips, and check all of it that needs no model.

    Raises:
        UserError: naming the key that is unknown, missing or wrong.
    """
    given = load_yaml(path)
    known = {
        "latents_path", "output_path", "settings", *TECHNIQUES, "preprocess", "evaluate", "clips",
    }  # fmt: skip
    check_keys(given, known, str(path))
    entries = given.get("clips")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: clips: expected a list of clips")
    clips = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: clips: number {number}"
        entry = mapping(entry, where)
        for key in ("data_path", "inversion_prompt", "prompt"):
            text(entry.get(key), f"{where}: {key}")
        name = clip_name(entry["data_path"])
        if name in clips:
            raise UserError(f"{where}: a clip named {name} is in the list already")
        clips[name] = entry
    sections = {
        name: mapping(given.get(name, {}), f"{path}: {name}")
        for name in ("settings", "preprocess", "evaluate", *TECHNIQUES)
    }
    for place, section, shared in _sections_of_settings(path, sections, clips):
        for key in section:
            if key in TOKENFLOW:
                raise UserError(f"{place}: {key}: is what tells the rows apart; leave it out")
            if key in ("sd_version", "model_key") and not shared:
                raise UserError(f"{place}: {key}: all rows share one inversion; put it in settings")
    plan = ClipList(
        path=path,
        latents_path=given.get("latents_path", "latents"),
        output_path=given.get("output_path", "tokenflow-results/table1"),
        settings=sections["settings"],
        own={name: sections[name] for name in TECHNIQUES},
        preprocess=sections["preprocess"],
        protocol=parse(Protocol, sections["evaluate"], f"{path}: evaluate"),
        clips=clips,
    )
    for clip in clips:
        for method in METHODS:
            plan.config(clip, method)
        preprocess.parse_args(arguments(plan.inversion(clip)))
    return plan


def _sections_of_settings(
    path: Path, sections: Mapping[str, dict], clips: Mapping[str, dict]
) -> Iterator[tuple[str, dict, bool]]:
    """All places of a list that hold settings, and whether they are of all techniques."""
    yield f"{path}: settings", sections["settings"], True
    for name in TECHNIQUES:
        yield f"{path}: {name}", sections[name], False
    for clip, entry in clips.items():
        yield f"{path}: {clip}", entry, True
        for name in TECHNIQUES:
            where = f"{path}: {clip}: {name}"
            yield where, mapping(entry.get(name, {}), where), False


# ------------------------------------------------------------------------------------- one clip


def make_rows(plan: ClipList, clip: str, methods: Sequence[Method]) -> list[Row]:
    """Invert one clip, edit it by every method, and score the results.

    A method whose input is refused (a ControlNet that is not there, say) or which needs more memory
    than there is, is logged and left out.
    """
    evaluator = Evaluator(plan.protocol)
    source = resolve_clip(plan.clips[clip]["data_path"])
    if plan.protocol.flow == "truth":
        truth_shape(truth_file(source, plan.protocol.truth))
    inversion = preprocess.parse_args(arguments(plan.inversion(clip)))
    preprocess.preprocess(inversion)
    rows = []
    for method in methods:
        try:
            folder = method.made_by.make(of_inversion(plan.config(clip, method), inversion))
            rows.append(evaluator.score_result(folder).model_copy(update={"method": method.name}))
        except (UserError, MemoryError, torch.OutOfMemoryError) as error:
            log.error("%s: %s: %s", clip, method.name, error or "out of memory")
            continue
        with atomic_file(rows_file(plan, clip)) as temporary:
            temporary.write_text(rows_as_json(rows), encoding="utf-8")
    return rows


def rows_file(plan: ClipList, clip: str) -> Path:
    """Where the rows of a clip are kept; its messages are in a .log beside it."""
    return Path(plan.output_path) / "rows" / f"{clip}.json"


# ------------------------------------------------------------------------------------ all clips


def make_clips(plan: ClipList, words: Sequence[str], jobs: int) -> None:
    """Make the rows of every clip, `jobs` clips at a time, each in a process of its own.

    Args:
        words: what more to say on each process's command line.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **os.environ}
    environment["PYTHONPATH"] = str(ROOT)

    started: list[subprocess.Popen] = []

    def make(clip: str) -> tuple[int, float]:
        file = rows_file(plan, clip)
        file.unlink(missing_ok=True)  # of other settings, maybe; from finished edits soon made anew
        command = [sys.executable, "-m", "scripts.table1.table1", str(plan.path), "--clip", clip]
        start = time.monotonic()
        with file.with_suffix(".log").open("w", encoding="utf-8") as messages:
            process = subprocess.Popen(
                [*command, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
            )
            started.append(process)
            return process.wait(), time.monotonic() - start

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(plan.clips), unit="clip") as bar:
        running = {pool.submit(make, clip): clip for clip in plan.clips}
        try:
            for finished in as_completed(running):
                clip = running[finished]
                status, seconds = finished.result()
                log_file = rows_file(plan, clip).with_suffix(".log")
                how = f"failed, see {log_file}" if status else "done"
                bar.write(f"{clip}: {how} ({seconds:.0f} s)", file=sys.stderr)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise


# ---------------------------------------------------------------------------------------- table

SHOWN = ("warp_error", "clip_score", "clip_frame", "psnr_background", "seconds_per_frame")
PAPER_NOTE = (
    "The paper's figures are of other data: its own DAVIS and web clips, Stable Diffusion 2.1 (but "
    "for the baselines' own models), RAFT, 512x512."
)


def table(summaries: Sequence[Summary]) -> list[list[str]]:
    """Lines of cells, headings first: each method's means, and what the paper has for it.

    Measures that no method has are left out.
    """
    means = {summary.method: summary for summary in summaries}
    shown = [c for c in SHOWN if any(s.means[c] is not None for s in summaries)]
    head = [
        "method",
        "clips",
        *(COLUMNS[c].heading for c in shown),
        "paper: warp error",
        "paper: CLIP",
    ]
    lines = [head]
    papers = {method.name: method.paper for method in METHODS} | dict(ELSEWHERE)
    others = [name for name in means if name not in papers]
    for name, paper in (*papers.items(), *((name, None) for name in others)):
        cells = [name, "-", *("-" for _ in shown)]
        if name in means:
            own = means[name]
            cells[1] = str(own.clips)
            cells[2:] = [COLUMNS[c].shown(own.means[c]) for c in shown]
        elif paper is None:
            continue
        lines.append([*cells, *(("-", "-") if paper is None else map("{:g}".format, paper))])
    return lines


def verdict(rows: Sequence[Row]) -> tuple[bool | None, str]:
    """Whether the mean warp errors are in the paper's order: None where that is not measured.

    The means are over the clips of which every method of that order has a row.
    """
    errors = {(row.method, row.clip): row.warp_error for row in rows}
    clips = {row.clip for row in rows}
    shared = [c for c in clips if all(errors.get((name, c)) is not None for name in ORDER)]
    asked = f"The paper's order, {' < '.join(ORDER)}"
    if not shared:
        return None, f"{asked}: not measured, no clip has them all"
    means = {name: float(np.mean([errors[name, clip] for clip in shared])) for name in ORDER}
    found = sorted(ORDER, key=means.get)
    held = "holds" if found == list(ORDER) else f"does not hold, but {' < '.join(found)}"
    return found == list(ORDER), f"{asked}: {held} (means of {len(shared)} clips)"


def settings_line(plan: ClipList) -> str:
    """What the list sets for all clips, in a line."""
    sections = {"all": plan.settings, **plan.own, "preprocess": plan.preprocess}
    told = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in section.items())
        for name, section in sections.items()
        if section
    ]
    return f"Settings ({plan.path}): {'; '.join(told) or 'defaults'}"


# ------------------------------------------------------------------------------------ the script


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("clips", type=Path, metavar="CLIPS_YAML", help="see configs/table1_davis.yaml")
    add("--jobs", type=int, default=1, help="clips at a time (default: 1)")
    names = ", ".join(f'"{method.name}"' for method in METHODS)
    add("--methods", nargs="+", metavar="NAME", help=f"some of {names} (default: all)")
    add("--clip", metavar="NAME", help="make this clip's rows only, in this process, no table")
    add(
        "--also",
        nargs="+",
        type=Path,
        default=[],
        metavar="ROWS",
        help="more rows for the table, of other programs' videos: what evaluate.py --json wrote",
    )
    add("--check", action="store_true", help="fail unless the warp errors are in the paper's order")
    add("--json", type=Path, metavar="FILE", help="write all rows there, as evaluate.py does")
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {args.jobs}")
    known = {method.name: method for method in METHODS}
    for name in args.methods or ():
        if name not in known:
            raise UserError(f"--methods: expected some of {names}; got {name}")
    for name in ("json", "markdown"):
        if path := getattr(args, name):
            check_report_path(path, f"--{name}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the script; returns the rows.

    Raises:
        UserError: the input is wrong, or, after all else is done and written, rows are missing.
    """
    setup_logging()
    args = parse_args(argv)
    methods = [m for m in METHODS if not args.methods or m.name in args.methods]
    plan = read_list(args.clips)
    check_writable(plan.output_path, "output_path")
    others = [row for path in args.also for row in read_rows(path)]
    if args.clip is not None:
        if args.clip not in plan.clips:
            raise UserError(f"--clip: expected one of {', '.join(plan.clips)}; got {args.clip}")
        rows = make_rows(plan, args.clip, methods)
        if len(rows) < len(methods):
            raise UserError(f"{args.clip}: {len(methods) - len(rows)} rows could not be made")
        return rows

    Evaluator(plan.protocol)  # fetches what it needs, or says now that it cannot
    rows_file(plan, "any").parent.mkdir(parents=True, exist_ok=True)
    words = ["--methods", *(m.name for m in methods)]
    make_clips(plan, words, args.jobs)
    files = [rows_file(plan, clip) for clip in plan.clips]
    rows = [row for file in files if file.is_file() for row in read_rows(file)]
    missing = len(plan.clips) * len(methods) - len(rows)
    rows += others
    reports = [(args.json, rows_as_json(rows))] if args.json else []
    text = "no rows"
    if rows:
        summaries = summarize(rows)
        lines = table(summaries)
        notes = [verdict(rows)[1], PAPER_NOTE, settings_line(plan), *protocols(rows)]
        if args.markdown:
            reports.append((args.markdown, "\n\n".join([aligned(lines, "pipe"), *notes]) + "\n"))
        text = "\n".join([aligned(lines), "", *notes])
    write_reports(text, reports)
    if missing:
        raise UserError(
            f"{missing} of {len(plan.clips) * len(methods)} rows are missing; why is in the logs, "
            f"{rows_file(plan, '*').with_suffix('.log')}"
        )
    if args.check and not verdict(rows)[0]:
        raise UserError(f"--check: {verdict(rows)[1]}")
    return rows


if __name__ == "__main__":
    command_line(main)
