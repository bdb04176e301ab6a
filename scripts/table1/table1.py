"""Reproduce the paper's Table 1 on a list of clips: edits by every row's method, and their scores.

    sh scripts/table1.sh latents/shapes/clips.yaml --jobs 2

Each clip is inverted once and edited by every row's method, as a batch (scripts/batch); then the
results are scored (evaluate.py). Finished work is skipped. Rows that are missing at the end are
named in an error, and the exit status is not 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from run_tokenflow_pnp import PnPConfig
from scripts.batch.clip_list import SECTIONS, VARIANTS, Batch, ClipList, Variant, read_batch
from scripts.batch.engine import FAILED, Outcome, log, run_jobs
from scripts.table1 import baselines, text2video_zero, tune_a_video
from scripts.table1.text2video_zero import Text2VideoZeroConfig
from scripts.table1.tune_a_video import TuneAVideoConfig
from tokenflow.cache.options import default
from tokenflow.diffusion.model_names import CONTROLNETS
from tokenflow.evaluation import score_table
from tokenflow.evaluation.evaluator import Evaluator, Protocol
from tokenflow.evaluation.motion import truth_file, truth_shape
from tokenflow.evaluation.score_table import COLUMNS, Row
from tokenflow.storage.reports import check_report_path, write_report, write_reports
from tokenflow.storage.schema import parse
from tokenflow.storage.yaml_files import load_yaml
from util import ArgumentParser, UserError, at_least, check_writable, command_line, setup_logging

_ROWS = load_yaml(Path(__file__).with_name("rows.yaml"))
TOKENFLOW = _ROWS["tokenflow"]
DEPTH = "text2video_zero_depth"  # has a section of its own, for its ControlNet
BASELINES = {name: ("pnp", PnPConfig, edit) for name, edit in baselines.BASELINES.items()} | {
    "tune_a_video": ("tune_a_video", TuneAVideoConfig, tune_a_video.edit),
    "text2video_zero": ("controlnet", Text2VideoZeroConfig, text2video_zero.edit),
    DEPTH: (DEPTH, Text2VideoZeroConfig, text2video_zero.edit),
}


def variant(name: str, technique: str, changes: Mapping[str, object]) -> Variant:
    """A row: its technique, and the settings in which it differs from TokenFlow."""
    if technique in BASELINES:
        return Variant(name, *BASELINES[technique], TOKENFLOW | changes)
    settings = changes if "preset" in changes else TOKENFLOW | changes  # they would win over it
    return replace(VARIANTS[technique], name=name, settings=settings)


METHODS = tuple(variant(*row) for row in _ROWS["rows"])
PAPER = _ROWS["paper"]
ORDER = tuple(PAPER)[:5]  # the methods whose order `verdict` checks
SHOWN = ("warp_error", "clip_score", "clip_frame", "psnr_background", "seconds_per_frame")


def read_list(
    path: Path,
    methods: Sequence[Variant] = METHODS,
    overrides: Mapping[str, object] | None = None,
) -> tuple[Batch, Protocol]:
    """Reads a list of clips: the jobs of these rows, and how their results are scored.

    Args:
        overrides: as in `read_batch`.

    Raises:
        UserError: naming the key that is unknown, missing or wrong.
    """
    batch = read_batch(path, overrides, variants=available(path, methods))
    clips = enumerate(batch.given.clips, start=1)
    for where, keys in [("", batch.given), *((f"clips: number {i}: ", clip) for i, clip in clips)]:
        for place, section in keys.sections():
            for key in {*TOKENFLOW, "preset"} & section.keys():
                place = f"{place}: {key}" if place else key
                raise UserError(f"{path}: {where}{place}: distinguishes the rows; leave it out")
    return batch, parse(Protocol, batch.given.evaluate, f"{path}: evaluate")


def available(path: Path, methods: Sequence[Variant]) -> list[Variant]:
    """These rows, but for those that need what is not there; logs what that is.

    Args:
        path: of the list of clips.
    """
    given = load_yaml(path)
    settings = {}
    for section in (given.get("settings"), given.get(DEPTH)):
        # What is wrong in them is told when the list is read.
        settings |= section if isinstance(section, Mapping) else {}
    version = settings.get("sd_version", default("sd_version"))
    missing = {}
    if not settings.get("controlnet_key") and (version, "depth") not in CONTROLNETS:
        missing["depth"] = (
            f"no ControlNet of depth is known for sd_version {version}; name one in {path}: "
            f"{DEPTH}: {{controlnet_key: ...}}"
        )
    if not baselines.has_patch_match():
        missing["patches"] = "PyPatchMatch is not installed (requirements-optional.txt)"
    found = []
    for method in methods:
        is_patches = method.edit is baselines.patch_propagation
        need = "depth" if method.section == DEPTH else "patches" if is_patches else None
        if need in missing:
            log.warning("%s is left out: %s", method.name, missing[need])
        else:
            found.append(method)
    return found


# ------------------------------------------------------------------------------------- the rows


def score(batch: Batch, outcomes: Mapping[str, Outcome], evaluator: Evaluator) -> list[Row]:
    """The rows of all results, clip by clip; a result that cannot be scored is logged."""
    rows = []
    done = [j for j in batch.jobs if j.variant and outcomes[j.key].state != FAILED]
    for job in sorted(done, key=lambda job: batch.clips.index(job.clip)):
        try:
            row = evaluator.score_result(Path(outcomes[job.key].folder))
            rows.append(row.model_copy(update={"method": job.kind, "clip": job.clip}))
        except UserError as error:
            log.error("%s: %s", job.title, error)
    return rows


def write_rows(batch: Batch, rows: Sequence[Row]) -> None:
    """Writes each clip's rows to <output_path>/rows/<clip>.json."""
    for clip in batch.clips:
        own = [row for row in rows if row.clip == clip]
        path = batch.output_path / "rows" / f"{clip}.json"
        write_report(path, score_table.rows_as_json(own))


# ------------------------------------------------------------------------------------- the table


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of cells, headings first: each method's means, and what the paper has for it.

    The warp error and its interval are of the clips' means. Other measures that no method has are
    left out.
    """
    summaries = score_table.summarize(rows)
    means = {summary.method: summary for summary in summaries}
    measured = [c for c in SHOWN[1:] if any(s.means[c] is not None for s in summaries)]
    shown = {c: COLUMNS[c] for c in (SHOWN[0], *measured)}
    headings = [column.heading for column in shown.values()]
    lines = [
        ["method", "clips", headings[0], "95 %", *headings[1:], "paper: warp error", "paper: CLIP"]
    ]
    for name in dict.fromkeys([*(m.name for m in METHODS), *PAPER, *means]):
        own, paper = means.get(name), PAPER.get(name)
        if own or paper:
            _, *cells = (column.shown(own and own.means[c]) for c, column in shown.items())
            cells = [*_warp_error(rows, name), *cells]
            figures = map("{:g}".format, paper) if paper else ("-", "-")
            lines.append([name, str(own.clips) if own else "-", *cells, *figures])
    return lines


def _warp_error(rows: Sequence[Row], method: str) -> tuple[str, str]:
    """The mean over clips, and its interval."""
    errors = list(score_table.by_clip(rows, method, "warp_error").values())
    if not errors:
        return "-", "-"
    mean, *bounds = map(COLUMNS["warp_error"].shown, score_table.interval(errors))
    return mean, " to ".join(bounds) if len(errors) > 1 else "-"


def verdict(rows: Sequence[Row]) -> tuple[bool | None, str]:
    """Whether the mean warp errors are in the paper's order: None where that is not measured.

    The means are over the clips and prompts of which every method of that order has a row.
    """
    errors = {(row.method, (row.clip, row.prompt)): row.warp_error for row in rows}
    edits = {(row.clip, row.prompt) for row in rows}
    shared = [e for e in edits if all(errors.get((name, e)) is not None for name in ORDER)]
    if not shared:
        return None, f"The paper's order, {' < '.join(ORDER)}: not measured, no clip has them all"
    means = {name: float(np.mean([errors[name, e] for e in shared])) for name in ORDER}
    holds, text = score_table.order_verdict(means, ORDER)
    return holds, f"{text} (means of {len(shared)} clips)"


def differences(rows: Sequence[Row]) -> list[str]:
    """The paired differences of the warp errors of neighbours in the paper's order, a line each."""
    shown = [name for name in ORDER if score_table.by_clip(rows, name, "warp_error")]
    return [score_table.paired_difference(rows, *pair, "warp_error") for pair in pairwise(shown)]


def settings_line(path: Path, given: ClipList) -> str:
    """What the list sets for all clips, in a line."""
    sections = {"all": given.settings} | {name: getattr(given, name) for name in SECTIONS}
    sections["preprocess"] = given.preprocess
    parts = [f"{name}: " + ", ".join(f"{key} {value}" for key, value in section.items())
            for name, section in sections.items() if section]  # fmt: skip
    return f"Settings ({path}): {'; '.join(parts) or 'defaults'}"


# ------------------------------------------------------------------------------------ the script


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = [method.name for method in METHODS]
    add("clips", type=Path, metavar="CLIPS_YAML", help="see configs/table1_davis.yaml")
    add("--jobs", type=at_least(1), metavar="N",
        help="how many edits run at once (default: one on each GPU, else one)")  # fmt: skip
    add("--methods", nargs="+", metavar="NAME", choices=names, default=names,
        help=f"some of {', '.join(names)} (default: all)")  # fmt: skip
    add("--clip", metavar="NAME", help="only the rows of this clip, and no table")
    add("--also", nargs="+", type=Path, default=[], metavar="ROWS",
        help="more rows for the table: of other videos, by evaluate.py --json")  # fmt: skip
    add("--check", action="store_true", help="fail unless the warp errors are in the paper's order")
    add("--json", type=Path, metavar="FILE", help="write all rows there, as evaluate.py does")
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args(argv)
    for name in ("json", "markdown"):
        if path := getattr(args, name):
            check_report_path(path, f"--{name}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the script; returns the rows.

    Raises:
        UserError: the input is wrong, or, after all else is done and written, rows are missing.
    """
    setup_logging()
    args = parse_args(argv)
    batch, protocol = read_list(args.clips, [m for m in METHODS if m.name in args.methods])
    if args.clip is not None:
        if args.clip not in batch.clips:
            raise UserError(f"--clip: expected one of {', '.join(batch.clips)}; got {args.clip}")
        batch = replace(batch, jobs=[job for job in batch.jobs if job.clip == args.clip])
    check_writable(batch.output_path, "output_path")
    others = [row for path in args.also for row in score_table.read_rows(path)]
    if protocol.flow == "truth":
        for data_path in {job.work["data_path"] for job in batch.jobs}:
            truth_shape(truth_file(data_path, protocol.truth))
    evaluator = Evaluator(protocol)  # fetches what it needs, or raises now
    log_folder = batch.output_path / "batch"
    rows = score(batch, run_jobs(batch.jobs, log_folder, args.jobs), evaluator)
    write_rows(batch, rows)
    n_edits = sum(job.variant is not None for job in batch.jobs)
    missing = n_edits - len(rows)
    rows += others
    text, reports = "no rows", [(args.json, score_table.rows_as_json(rows))] if args.json else []
    if rows and args.clip is None:
        lines = table(rows)
        notes = [verdict(rows)[1], *differences(rows), _ROWS["paper_note"]]
        notes.append(settings_line(args.clips, batch.given))
        notes += score_table.protocols(rows)
        text = "\n".join([score_table.aligned(lines), "", *notes])
        if args.markdown:
            blocks = [score_table.aligned(lines, "pipe"), *notes]
            reports.append((args.markdown, "\n\n".join(blocks) + "\n"))
    write_reports(text, reports)
    if missing:
        raise UserError(f"{missing} of {n_edits} rows are missing; see the logs in {log_folder}")
    if args.check and not verdict(rows)[0]:
        raise UserError(f"--check: {verdict(rows)[1]}")
    return rows


if __name__ == "__main__":
    command_line(main)
