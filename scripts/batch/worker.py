"""The process that does a batch's jobs, one after another, and the end of it that gives them.

Run by batch.py. It reads a job a line from its standard input, as JSON, and writes what came of it
to its standard output. What goes wrong in a foreseen way is an outcome; what does not ends the
process, and batch.py starts another one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from preprocess import preprocess
from scripts.batch.clip_list import TECHNIQUES
from scripts.batch.jobs import INVERSION
from tokenflow.cache.options import arguments, parse_args
from tokenflow.diffusion.models import StableDiffusion, load_stable_diffusion
from tokenflow.storage.work_dir import Busy
from util import Interrupted, UserError, command_line, setup_logging

log = logging.getLogger("tokenflow")

ROOT = Path(__file__).resolve().parents[2]

# States of a job that was handed to a worker.
MADE, FOUND, FAILED, BUSY = "made", "found", "failed", "busy"
READY = {"state": "ready"}
PATIENCE = 30.0  # seconds that a process which was asked to end may take
MOST_STARTS = 3  # of workers that end before they are ready
PR_SET_PDEATHSIG = 1  # prctl(2)
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        state: MADE, FOUND made already, FAILED, or BUSY: another process is at it.
        reason: in one line, why it failed.
    """

    state: str
    seconds: float = 0.0
    reason: str = ""


class WorkerError(UserError):
    """No worker can be started."""


# ------------------------------------------------------------------------------------ the process


class KeptModels:
    """Loads checkpoints, and keeps the last for those who ask for it again.

    Attributes:
        calls: how often models were asked for; what is finished asks for none.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._key: tuple | None = None
        self._models: StableDiffusion | None = None

    def __call__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, allow_pickle: bool = False
    ) -> StableDiffusion:
        """As `load_stable_diffusion`."""
        self.calls += 1
        key = folder.resolve(), device, dtype, allow_pickle
        if key != self._key:
            self.forget()  # never two of them in memory
            free_memory()
            self._models = load_stable_diffusion(folder, device, dtype, allow_pickle)
            self._key = key
        return self._models

    def forget(self) -> None:
        """Keeps the last models no longer."""
        self._key = self._models = None


def free_memory() -> None:
    """Gives the memory of tensors that are gone back to the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def serve(jobs: IO[str], outcomes: IO[str]) -> None:
    """Does jobs until there are no more."""
    load = KeptModels()
    tell(outcomes, READY)
    for line in jobs:
        tell(outcomes, asdict(do(json.loads(line), load)))
        free_memory()


def tell(outcomes: IO[str], answer: Mapping[str, Any]) -> None:
    """Writes a line that the other end waits for."""
    outcomes.write(json.dumps(answer) + "\n")
    outcomes.flush()


def do(job: Mapping[str, Any], load: KeptModels) -> Outcome:
    """Does one job; its messages go to its log file."""
    calls, start = load.calls, time.monotonic()
    try:
        send_messages_to(Path(job["log"]))
        log.info("--- %s, %s", time.strftime("%Y-%m-%d %H:%M:%S"), job["title"])
        make(job, load)
    except Busy as error:
        log.info("%s", error)
        return Outcome(BUSY)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        log.error("%s", reason(error))
        return Outcome(FAILED, time.monotonic() - start, reason(error))
    seconds = time.monotonic() - start
    return Outcome(MADE if load.calls > calls else FOUND, seconds)


def make(job: Mapping[str, Any], load: KeptModels) -> Path:
    """Makes what a job is about, or finds it made; returns its folder."""
    if job["kind"] == INVERSION:
        return preprocess(
            parse_args(arguments(job["work"]["options"])), load=load, wait=job["wait"]
        )
    technique = TECHNIQUES[job["kind"]]
    config = technique.config(**job["work"]["config"])
    try:
        return technique.make(config, load=load, wait=job["wait"])
    finally:
        if config.compile:  # which changes the UNet for good
            load.forget()


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory does not suffice; lower chunk_size or n_frames, or H and W"
    if isinstance(error, MemoryError):
        return "the memory does not suffice; lower n_frames, or H and W"
    return " ".join(str(error).split()) or type(error).__name__


def send_messages_to(path: Path) -> None:
    """Has all that is written to stdout and stderr, by whatever library, added to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    faulthandler.enable()
    setup_logging()
    end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as outcomes:
        os.dup2(2, 1)  # whatever a library prints shall be no answer
        try:
            serve(sys.stdin, outcomes)
        except KeyboardInterrupt as error:
            log.info("interrupted; what was saved by now is gone on with")
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            sys.exit(128 + number)


def end_with_parent() -> None:
    """Has Linux end this process by SIGTERM when its parent is gone, even amid a job."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# --------------------------------------------------------------------------------- the other end


class Worker:
    """Has jobs done by a process; where one ends in the middle of a job, by another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def do(self, job: Mapping[str, Any]) -> Outcome:
        """Has one job done, and waits for it.

        Raises:
            WorkerError: no process can be started.
            Interrupted: somebody asked the process to end.
        """
        if self._process is None:
            self._start()
        start = time.monotonic()
        answer = self._ask(json.dumps(job) + "\n")
        if answer is not None:
            return Outcome(**answer)
        return Outcome(FAILED, time.monotonic() - start, self._last_words(Path(job["log"])))

    def end(self) -> None:
        """Ends the process: at once, if it is at a job, whose work can be gone on with."""
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            log.warning("the worker (process %d) does not end; killing it", process.pid)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def _start(self) -> None:
        for _ in range(MOST_STARTS):
            with tempfile.TemporaryFile() as messages:
                self._process = start_process(messages)
                if self._ask("") == READY:
                    return
                self._process.wait()
                messages.seek(0)
                found = self._ended(last_line(messages.read()))
        raise WorkerError(f"no worker can be started: {found}")

    def _ask(self, line: str) -> dict[str, Any] | None:
        """Hands a line over; returns the answer, or None where the process ended."""
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer.endswith("\n") else None

    def _last_words(self, log_file: Path) -> str:
        self._process.wait()  # its last words come last
        try:
            said = log_file.read_bytes()[-(1 << 16) :]
        except OSError:  # it may not have come so far as to open it
            said = b""
        return self._ended(last_line(said))

    def _ended(self, said: str) -> str:
        """How the process ended, whose last line of messages was this."""
        process, self._process = self._process, None
        status = process.wait()
        process.stdout.close()
        for number in ASKED_TO_END:  # by somebody who means the batch
            if status in (-number, 128 + number):
                raise Interrupted(number)
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
            return f"its process was killed by {name}{hint}"
        return f"its process ended with status {status}" + (f": {said}" if said else "")


def start_process(messages: IO[bytes]) -> subprocess.Popen:
    """Starts a worker, out of reach of the terminal's signals: its other end passes them on."""
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in alone}
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.batch.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=messages,
        env=environment | {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)},
        encoding="utf-8",
        start_new_session=True,
    )


def last_line(text: bytes) -> str:
    """The last line that says something."""
    lines = text.decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    command_line(main)
