"""Invert and edit many clips: a list of them, or a DAVIS tree, by several prompts and techniques.

    sh scripts/run_davis.sh configs/davis.yaml
    sh scripts/run_davis.sh configs/davis.yaml --davis data/DAVIS --prompt "a {clip} of marble"

Each clip is inverted once and each edit is made once; what is finished is not made again, what was
interrupted goes on, and what fails leaves the rest alone. Any number of these processes may run at
once, on one machine or on several with a common file system: they share the jobs out by locks.
Messages go to <output_path>/batch/, a .log for each clip; the table at the end to summary.yaml
there too.

Exit status: 0, all is made; 1 to 100, so many clips (100: or more) of which something failed; 255,
the list or an option is wrong, or no worker can be started; 130, 143 and others of 128 + a signal's
number, interrupted: the same command goes on. Of several processes that a launcher started, only
the one of rank 0 says what failed; the others end with 0, else the launcher would kill those left.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import shlex
import signal
import socket
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from scripts.batch.clip_list import TECHNIQUES, check_keys
from scripts.batch.jobs import INVERSION, Batch, Job, Overrides, read_batch, shown
from scripts.batch.worker import BUSY, FAILED, FOUND, MADE, Outcome, Worker
from tokenflow.cache.options import preprocess_command
from tokenflow.evaluation.score_table import aligned
from util import (
    ArgumentParser,
    Interrupted,
    UserError,
    check_writable,
    command_line,
    load_yaml,
    save_yaml,
    setup_logging,
    slug,
)

log = logging.getLogger("tokenflow")

WRONG = 255  # exit status: see above
MOST_FAILED = 100  # as exit status; larger ones mean other things
NOT_REACHED = 130
NOT_TRIED = "not tried, for the inversion failed"


# ---------------------------------------------------------------------------- processes and runs


@dataclass(frozen=True)
class Crew:
    """This process among those that share the batch.

    Attributes:
        place, size: which of how many it is, all together.
        rank: which it is among those of its launcher; that of rank 0 reports.
        device: for jobs that leave the device open.
        run: what the processes that share one summary have in common.
    """

    place: int = 0
    size: int = 1
    rank: int = 0
    device: str = "auto"
    run: str = "run"


def find_crew(environment: Mapping[str, str], run: str | None) -> Crew:
    """Reads what accelerate, torchrun and SLURM say in the environment.

    Raises:
        UserError: processes on several machines, and no --run by which they share a summary.
    """
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    local = int(environment.get("LOCAL_RANK", rank))
    tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    task = int(environment.get("SLURM_ARRAY_TASK_ID", 0))
    task -= int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    device = "auto"
    if world > 1 and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
    if run is None and int(environment.get("LOCAL_WORLD_SIZE", world)) < world:
        raise UserError("--run: is needed with several machines: a name of your own for this run")
    if run is None and world > 1:  # they are children of one launcher
        run = f"{socket.gethostname()}-{os.getppid()}-{_start_of(os.getppid())}"
    elif run is None:
        run = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
    return Crew(
        place=task // step * world + rank,
        size=tasks * world,
        rank=rank,
        device=device,
        run=slug(run, limit=100),
    )


def _start_of(process: int) -> str:
    """When a process started, which tells it from others of its number; empty if not known."""
    file = Path(f"/proc/{process}/stat")
    if not file.is_file():
        return ""
    return file.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]


class Ledger:
    """What came of the jobs of one run: the first that any process says of a job counts.

    But for one thing: who made it may say so after another found it made.

    Args:
        folder: where the processes that share the run write it down, a small file for each job.
    """

    def __init__(self, folder: Path, jobs: Iterable[Job]) -> None:
        self.folder = folder
        self.jobs = {job.key: job for job in jobs}
        self.outcomes: dict[str, Outcome] = {}

    def record(self, job: Job, outcome: Outcome) -> None:
        """Writes an outcome down."""
        self.look(job)
        known = self.outcomes.get(job.key)
        if known is not None and (known.state, outcome.state) != (FOUND, MADE):
            return
        self.outcomes[job.key] = outcome
        file = self._file(job.key, outcome.state)
        try:
            save_yaml(file, asdict(outcome))
        except OSError as error:  # the others may come to the job too, and find it made
            log.warning("%s: cannot be written (%s)", file, error.strerror)

    def forget_failures(self) -> None:
        """Lets jobs that failed in an earlier run of this name be tried again."""
        for key in self.jobs:
            self._file(key, FAILED).unlink(missing_ok=True)

    def look(self, job: Job) -> None:
        """Reads whether another process has settled a job, or what it needs."""
        for key in (job.key, job.needs):
            if key is not None and key not in self.outcomes:
                self._read(key)

    def look_at_all(self, again: bool = False) -> None:
        """Reads all that other processes have settled by now.

        Args:
            again: also of jobs that this process knows to be settled.
        """
        for key in {file.stem.partition("-")[0] for file in self.folder.glob("*.yaml")}:
            if key in self.jobs and (again or key not in self.outcomes):
                self._read(key)

    def state(self, job: Job) -> str | None:
        """MADE, FOUND or FAILED: an edit also if its inversion failed; None: not settled yet."""
        if job.key in self.outcomes:
            return self.outcomes[job.key].state
        if job.needs is not None and self.state(self.jobs[job.needs]) == FAILED:
            return FAILED
        return None

    def _read(self, key: str) -> None:
        # Each state has a file of its own: processes that write at once overwrite nothing.
        for state in (FAILED, MADE, FOUND):
            file = self._file(key, state)
            if not file.is_file():
                continue
            try:
                self.outcomes[key] = Outcome(**load_yaml(file))
                return
            except (UserError, TypeError) as error:
                log.warning("%s: no outcome of a job (%s)", file, error)

    def _file(self, key: str, state: str) -> Path:
        return self.folder / f"{key}-{state}.yaml"


# --------------------------------------------------------------------------------------- the work


@dataclass
class Progress:
    """How far the batch is, and how long the rest will take."""

    ledger: Ledger
    crew: Crew
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of jobs made here, by kind

    def report(self, job: Job, outcome: Outcome) -> None:
        """Says what came of a job."""
        if outcome.state == MADE:
            self.seconds.setdefault(job.kind, []).append(outcome.seconds)
        self.ledger.look_at_all()
        left = [other for other in self.ledger.jobs.values() if self.ledger.state(other) is None]
        total = len(self.ledger.jobs)
        told = {
            MADE: f"made in {duration(outcome.seconds)}",
            FOUND: "is there already",
            FAILED: f"failed: {outcome.reason}",
        }[outcome.state]
        say = log.error if outcome.state == FAILED else log.info
        say("[%d/%d] %s: %s%s", total - len(left), total, job.title, told, self._rest(left))

    def _rest(self, left: Sequence[Job]) -> str:
        """The time that is left: by the mean of what was made, jobs that were found do not count.

        A kind of which none was made yet is taken to be as long as the others are in the mean.
        """
        if not left or not self.seconds:
            return ""
        overall = statistics.mean(s for of_kind in self.seconds.values() for s in of_kind)
        seconds = sum(statistics.mean(self.seconds.get(job.kind, [overall])) for job in left)
        return f"; about {duration(seconds / self.crew.size)} left"


def run_jobs(batch: Batch, worker: Worker, ledger: Ledger, crew: Crew, log_folder: Path) -> None:
    """Does all jobs that no other process does, and waits for those that others are at.

    An edit waits for its inversion. What another process works on is left for later; when all
    that is left is such, it waits for one of these, and so finds it finished or does it.
    """
    progress = Progress(ledger, crew)
    queue = deque(in_turn(batch.jobs, crew))
    busy = 0  # so many jobs in a row could not be had
    while queue:
        job = queue.popleft()
        ledger.look(job)
        if ledger.state(job) is not None:
            busy = 0
            continue
        outcome = Outcome(BUSY)
        if job.needs is None or ledger.state(ledger.jobs[job.needs]) is not None:
            outcome = worker.do(order_for(job, crew, log_folder, wait=busy > len(queue)))
        if outcome.state == BUSY:
            queue.append(job)
            busy += 1
            continue
        busy = 0
        ledger.record(job, outcome)
        progress.report(job, outcome)


def in_turn(jobs: Sequence[Job], crew: Crew) -> list[Job]:
    """The jobs in the order of one process: each begins at another inversion of the list."""
    starts = [i for i, job in enumerate(jobs) if job.needs is None]
    first = starts[crew.place % crew.size * len(starts) // crew.size]  # of 0,3 the place is 3
    return [*jobs[first:], *jobs[:first]]


def order_for(job: Job, crew: Crew, log_folder: Path, wait: bool) -> dict[str, object]:
    """What a worker is told of a job."""
    part = "options" if job.kind == INVERSION else "config"
    work = job.work
    if work[part]["device"] == "auto":
        work = {part: work[part] | {"device": crew.device}}
    return {
        "kind": job.kind,
        "title": job.title,
        "work": work,
        "wait": wait,
        "log": str(log_folder / job.log_name),
    }


# ------------------------------------------------------------------------------------ the summary


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    batch: Batch
    ledger: Ledger
    run: str  # its name
    command: Sequence[str]  # that does all of it

    @property
    def failed_clips(self) -> list[str]:
        """Clips of which something failed."""
        failed = {j.clip for j in self.batch.jobs if self.ledger.state(j) == FAILED}
        return [clip for clip in self.batch.clips if clip in failed]

    @property
    def open_jobs(self) -> list[Job]:
        """Jobs that nobody came to."""
        return [job for job in self.batch.jobs if self.ledger.state(job) is None]

    @property
    def status(self) -> int:
        """The exit status."""
        if self.open_jobs:
            return NOT_REACHED
        return min(len(self.failed_clips), MOST_FAILED)

    def lines(self) -> list[str]:
        """The table of clips and techniques, and what failed."""
        kinds = [INVERSION, *(k for k in TECHNIQUES if any(j.kind == k for j in self.batch.jobs))]
        table = [["clip", *kinds]]
        for clip in self.batch.clips:
            of_clip = [job for job in self.batch.jobs if job.clip == clip]
            table.append(
                [shown(clip), *(self._cell([j for j in of_clip if j.kind == k]) for k in kinds)]
            )
        edits = Counter(self.ledger.state(j) for j in self.batch.jobs if j.kind != INVERSION)
        lines = [aligned(table), "", f"{self._counts(edits)} of {edits.total()} edits"]
        if self.failed_clips:
            lines[-1] += f"; something failed of {len(self.failed_clips)} of "
            lines[-1] += f"{len(self.batch.clips)} clips:"
        for job in self.batch.jobs:
            outcome = self.ledger.outcomes.get(job.key)
            if outcome is not None and outcome.state == FAILED:
                lines += [f"  {job.title}: {outcome.reason}", f"    alone: {self._alone(job)}"]
        if self.open_jobs:
            lines.append(f"{len(self.open_jobs)} jobs were not reached; the same command goes on")
        return lines

    def record(self) -> dict[str, object]:
        """All of it, for programs."""
        clips: dict[str, list[dict[str, object]]] = {clip: [] for clip in self.batch.clips}
        for job in self.batch.jobs:
            told: dict[str, object] = {"kind": job.kind}
            if job.kind != INVERSION:
                told["prompt"] = job.prompt
            state = self.ledger.state(job)
            told["state"] = state or "not reached"
            if outcome := self.ledger.outcomes.get(job.key):
                told["seconds"] = round(outcome.seconds, 2)
            if state == FAILED:
                told["reason"] = outcome.reason if outcome else NOT_TRIED
                told["alone"] = self._alone(job)
            clips[job.clip].append(told)
        return {
            "run": self.run,
            "command": shlex.join(self.command),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "status": self.status,
            "failed_clips": self.failed_clips,
            "clips": clips,
        }

    def _cell(self, jobs: Sequence[Job]) -> str:
        if not jobs:
            return "-"
        outcomes = [o for job in jobs if (o := self.ledger.outcomes.get(job.key))]
        seconds = sum(outcome.seconds for outcome in outcomes if outcome.state == MADE)
        counts = self._counts(Counter(map(self.ledger.state, jobs)))
        return counts + (f", {duration(seconds)}" if seconds else "")

    @staticmethod
    def _counts(states: Mapping[str | None, int]) -> str:
        names = {MADE: "made", FOUND: "found", FAILED: "failed", None: "not reached"}
        return ", ".join(f"{states[s]} {name}" for s, name in names.items() if states.get(s))

    def _alone(self, job: Job) -> str:
        if job.kind == INVERSION:
            return preprocess_command(job.work["options"])
        return shlex.join([*self.command, "--only", job.key])


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------- the script


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = ArgumentParser(
        description="Invert and edit many clips.", epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("list", type=Path, metavar="LIST_YAML", help="see configs/davis.yaml")
    add("--davis", metavar="ROOT", help="a DAVIS tree, all of whose sequences are clips too")
    add("--image_set", metavar="FILE", help="of that tree, only the sequences that it names")
    add("--prompt", nargs="+", default=[], metavar="TEXT",
        help="in the place of the list's prompts; {clip} stands for the clip's name")  # fmt: skip
    add("--technique", nargs="+", default=[], metavar="NAME",
        help=f"in the place of the list's techniques: {', '.join(TECHNIQUES)}")  # fmt: skip
    add("--verify", action="store_true", help="compare all checksums of what is found made")
    add("--only", nargs="+", default=[], metavar="KEY",
        help="only the jobs with these keys, which the summary gives for what failed")  # fmt: skip
    add("--run", metavar="NAME",
        help="what the processes that share one summary have in common, another name for each run "
        "(default: their launcher)")  # fmt: skip
    add("--summary", action="store_true", help="do nothing, but give the summary of that --run")
    add("--quiet", action="store_true", help="give no summary; the exit status tells no failures")
    args = parser.parse_args(argv)
    check_keys(args.technique, TECHNIQUES, "--technique")
    if args.summary and args.run is None:
        raise UserError("--summary: of which run? Name it by --run")
    return args


def run(argv: Sequence[str] | None) -> Summary | None:
    """Runs the script, but for what it says at the end; None where that is another process's part.

    Raises:
        UserError: the list or an option is wrong, and nothing was begun; or no worker can be.
    """
    args = parse_args(argv)
    overrides = Overrides(args.davis, args.image_set, args.prompt, args.technique, args.verify)
    batch = read_batch(args.list, overrides)
    crew = find_crew(os.environ, args.run)
    folder = Path(batch.output_path) / "batch"
    check_writable(folder, "output_path")
    if args.only:
        batch = batch.only(args.only)
    ledger = Ledger(folder / "runs" / crew.run, batch.jobs)
    if not args.summary:
        ledger.forget_failures()
        worker = Worker()
        try:
            run_jobs(batch, worker, ledger, crew, folder)
        finally:
            worker.end()
    ledger.look_at_all(again=True)
    if args.quiet or crew.rank > 0:
        return None
    return Summary(batch, ledger, crew.run, ["python", "-m", "scripts.batch.batch", *_words(args)])


def _words(args: argparse.Namespace) -> list[str]:
    """The command line of the same jobs."""
    words = [str(args.list)]
    for name in ("davis", "image_set", "prompt", "technique"):
        if value := getattr(args, name):
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return [*words, *["--verify"] * args.verify]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the script and leaves."""
    setup_logging()
    sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold anything
    if "RANK" in os.environ:  # the launcher passes Ctrl-C on, which a shell may have had ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        summary = run(argv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG)
    except KeyboardInterrupt as error:
        if "--quiet" not in (sys.argv if argv is None else argv):
            raise
        # The script that started this process says how to go on: by a command of its own.
        sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))
    if summary is None:
        sys.exit(0)
    print("\n".join(["", *summary.lines()]))
    file = Path(summary.batch.output_path) / "batch" / "summary.yaml"
    try:
        save_yaml(file, summary.record())
    except OSError as error:
        log.warning("%s: cannot be written (%s)", file, error.strerror)
    sys.exit(summary.status)


if __name__ == "__main__":
    command_line(main)
