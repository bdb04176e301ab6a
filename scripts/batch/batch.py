"""Invert and edit many clips: a list of them, or a DAVIS tree, by several prompts and techniques.

    sh scripts/run_davis.sh configs/davis.yaml
    sh scripts/run_davis.sh configs/davis.yaml --davis data/DAVIS --prompt "a {clip} of marble"

Each clip is inverted once and each edit is made once. Finished work is skipped, interrupted work is
resumed, and a job that fails does not stop the others. Jobs run on Ray: one at a time on each GPU
of this machine, or of the cluster that RAY_ADDRESS names, whose machines need a common file system.
Each clip has a log in <output_path>/batch/; the table at the end is also in summary.yaml there.

Exit status: 0: all jobs succeeded; 1 to 100: number of clips with a failed job (100: or more);
255: the list or an option is wrong, or no process can be started; 130, 143 and others of 128 + a
signal's number: interrupted; run the same command again to resume.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scripts.batch.clip_list import INVERSION, VARIANTS, Batch, read_batch, shown_name
from scripts.batch.engine import FAILED, FOUND, MADE, NOT_TRIED, Outcome, log, run_jobs
from tokenflow.evaluation.score_table import aligned
from tokenflow.ops.progress import duration
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import ArgumentParser, UserError, at_least, check_writable, command_line, setup_logging

WRONG = 255  # exit status: see above
MAX_STATUS = 100  # for failed clips; larger ones have other meanings


# ------------------------------------------------------------------------------------ the summary


def summary_of(
    batch: Batch, outcomes: Mapping[str, Outcome], run: str, command: Sequence[str]
) -> dict[str, Any]:
    """What <output_path>/batch/summary.yaml holds.

    Args:
        outcomes: by the key of each job.
        run: a name for this run.
        command: runs the whole batch.
    """
    clips: dict[str, list[dict[str, Any]]] = {clip: [] for clip in batch.clips}
    for job in batch.jobs:
        outcome = outcomes[job.key]
        entry = {"title": job.title, "kind": job.kind, "state": outcome.state}
        if outcome.reason != NOT_TRIED:
            entry["seconds"] = round(outcome.seconds, 2)
        if outcome.state == FAILED:
            entry |= {"reason": outcome.reason, "alone": shlex.join([*command, "--only", job.key])}
        clips[job.clip].append(entry)
    failed = [clip for clip, jobs in clips.items() if any(j["state"] == FAILED for j in jobs)]
    return {
        "run": run,
        "command": shlex.join(command),
        "results": str(batch.output_path),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "status": min(len(failed), MAX_STATUS),
        "failed_clips": failed,
        "clips": clips,
    }


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of clips and techniques, and what failed."""
    clips = summary["clips"]
    jobs = [job for of_clip in clips.values() for job in of_clip]
    found = {job["kind"] for job in jobs}
    kinds = [kind for kind in (INVERSION, *VARIANTS) if kind in found]
    table = [["clip", *kinds]]
    for clip, of_clip in clips.items():
        cells = [_cell([job for job in of_clip if job["kind"] == kind]) for kind in kinds]
        table.append([shown_name(clip), *cells])
    edits = [job for job in jobs if job["kind"] != INVERSION]
    lines = [aligned(table), "", f"{_counts(edits)} of {len(edits)} edits"]
    if n_failed := len(summary["failed_clips"]):
        lines[-1] += f"; something failed of {n_failed} of {len(clips)} clips:"
    for job in jobs:
        if job["state"] == FAILED and job["reason"] != NOT_TRIED:
            lines += [
                f"  {job.get('title', job['kind'])}: {job['reason']}",
                f"    alone: {job['alone']}",
            ]
    if any(job["state"] != FAILED for job in edits) and "results" in summary:
        lines += [f"all on a page: {shlex.join(['python', 'report.py', summary['results']])}"]
    return lines


def _cell(jobs: Sequence[Mapping[str, Any]]) -> str:
    if not jobs:
        return "-"
    seconds = sum(job["seconds"] for job in jobs if job["state"] == MADE)
    return _counts(jobs) + (f", {duration(seconds)}" if seconds else "")


def _counts(jobs: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(job["state"] for job in jobs)
    return ", ".join(f"{counts[s]} {s}" for s in (MADE, FOUND, FAILED) if counts[s])


# ------------------------------------------------------------------------------------- the script


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Invert and edit many clips.", epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("list", type=Path, metavar="LIST_YAML", help="see configs/davis.yaml")
    add("--davis", metavar="ROOT", help="a DAVIS tree, all of whose sequences are clips too")
    add("--image_set", metavar="FILE", help="only the sequences of that tree that this file names")
    add("--prompt", nargs="+", metavar="TEXT",
        help="replace the list's prompts; {clip} stands for the clip's name")  # fmt: skip
    add("--technique", nargs="+", metavar="NAME", choices=list(VARIANTS),
        help=f"replace the list's techniques: {', '.join(VARIANTS)}")  # fmt: skip
    add("--jobs", type=at_least(1), metavar="N",
        help="jobs at a time (default: one on each GPU, else one on each machine)")  # fmt: skip
    add("--verify", action="store_true", help="check all checksums of finished work")
    add("--only", nargs="+", default=[], metavar="KEY",
        help="only the jobs with these keys, which the summary gives for failed jobs")  # fmt: skip
    add("--run", metavar="NAME", help="a name for this run in the summary")
    add("--summary", action="store_true", help="run no job; print the last summary")
    add("--quiet", action="store_true", help="do not print the summary")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the batch, or reads the summary of the last run; returns the summary.

    Raises:
        UserError: the list or an option is wrong and nothing was started, or no process can be.
    """
    davis = {"root": args.davis, "image_set": args.image_set}
    overrides = {
        "davis": {key: value for key, value in davis.items() if value is not None},
        "prompts": args.prompt,
        "techniques": args.technique,
    }
    batch = read_batch(args.list, {k: v for k, v in overrides.items() if v}, verify=args.verify)
    folder = batch.output_path / "batch"
    if args.summary:
        return load_yaml(folder / "summary.yaml")
    check_writable(folder, "output_path")
    if args.only:
        batch = batch.only(args.only)
    outcomes = run_jobs(batch.jobs, folder, args.jobs)
    name = args.run or time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
    summary = summary_of(batch, outcomes, name, _command(args))
    try:
        save_yaml(folder / "summary.yaml", summary)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", folder / "summary.yaml", error.strerror)
    return summary


def _command(args: argparse.Namespace) -> list[str]:
    """The command that runs the whole batch."""
    words = ["python", "-m", "scripts.batch.batch", str(args.list)]
    for name in ("davis", "image_set", "prompt", "technique"):
        if value := getattr(args, name):
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return [*words, *["--verify"] * args.verify]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    setup_logging()
    sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold anything
    try:
        args = parse_args(argv)
        summary = run(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG)
    if not args.quiet:
        print("\n".join(["", *summary_lines(summary)]))
    sys.exit(summary["status"])


if __name__ == "__main__":
    command_line(main)
