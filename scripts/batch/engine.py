"""Runs the jobs of a batch on Ray: one process a GPU, which keeps its model loaded.

Ray runs on this machine, or on the cluster that RAY_ADDRESS names. A job that kills its process
fails alone: the other jobs go on in a new process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import re
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preprocess import preprocess
from scripts.batch.clip_list import Job
from tokenflow.cache.options import PreprocessOptions
from tokenflow.diffusion.models import KeptModels
from tokenflow.ops.progress import duration
from util import Interrupted, UserError, setup_logging

log = logging.getLogger("tokenflow")

ROOT = Path(__file__).resolve().parents[2]
MADE, FOUND, FAILED = "made", "found", "failed"  # how a job ends; found: it was finished before
NOT_TRIED = "not tried: the inversion failed"
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum: jobs and outcomes are small
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # a job has one process


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    state: str  # MADE, FOUND or FAILED
    seconds: float = 0.0
    reason: str = ""  # why it failed, in one line
    folder: str = ""  # the cache or the result


# ------------------------------------------------------------------------------ in a Ray process


class Worker:
    """The Ray actor: runs one job after another.

    Args:
        folder: the working directory of the command, to which paths in jobs are relative.
    """

    def __init__(self, folder: Path) -> None:
        os.chdir(folder)
        faulthandler.enable()
        setup_logging()
        for name in LAUNCHER:
            os.environ.pop(name, None)
        self.load = KeptModels()

    def ready(self) -> None:
        """Returns when the process has started."""

    def run(self, job: Job, log_file: Path) -> Outcome:
        """Runs a job; everything that it prints is appended to the log file."""
        calls, start = self.load.calls, time.monotonic()
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with log_file.open("a") as file:  # of the whole process, libraries included
                for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                    stream.flush()
                    os.dup2(file.fileno(), number)
            log.info("--- %s, %s", time.strftime("%Y-%m-%d %H:%M:%S"), job.title)
            folder = make(job, self.load)
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            log.error("%s", reason(error))
            return Outcome(FAILED, time.monotonic() - start, reason(error))
        except Exception:  # a bug: the next job does not get models in an unknown state
            self.load.forget()
            raise
        finally:
            torch.cuda.empty_cache()
        state = MADE if self.load.calls > calls else FOUND
        return Outcome(state, time.monotonic() - start, folder=str(folder))


def make(job: Job, load: KeptModels) -> Path:
    """Builds a cache or a result, or finds it finished; returns its folder."""
    if job.variant is None:
        return preprocess(PreprocessOptions(**job.work), load=load)
    config = job.variant.config(**job.work)
    try:
        return job.variant.edit(config, load=load)
    finally:
        if config.compile:  # it changes the UNet for good
            load.forget()


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; lower chunk_size or n_frames, or H and W"
    if isinstance(error, MemoryError):
        return "out of memory; lower n_frames, or H and W"
    return " ".join(str(error).split()) or type(error).__name__


# -------------------------------------------------------------------------------- in the command


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Connects to RAY_ADDRESS or starts Ray on this machine; yields the `ray` module.

    A local Ray listens on the loopback interface only and reports no usage. At the end the
    processes of this command are stopped, also in the middle of a job.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "A worker died"  # the job's reason says it
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # `device: cuda:1` sees all GPUs
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if not os.environ.get("RAY_ADDRESS"):
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux: loopback only
            os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex()
            temporary = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # a short path
            options = {
                "address": "local",
                "include_dashboard": False,
                "num_gpus": torch.cuda.device_count(),
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": stack.enter_context(temporary),
            }
        import ray  # reads the variables above

        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except SystemExit as end:  # how Ray's handler answers SIGTERM
            raise Interrupted(signal.SIGTERM) from end
        finally:
            signal.signal(signal.SIGTERM, handler)
        stack.callback(ray.shutdown)
        yield ray


def run_jobs(
    jobs: Sequence[Job], log_folder: Path, n_processes: int | None = None
) -> dict[str, Outcome]:
    """Runs all jobs, an edit after its inversion, and logs the progress.

    Args:
        jobs: an inversion before the edits that need it.
        log_folder: for the log file of each clip.
        n_processes: how many jobs run at once; None: one on each GPU, else one on each machine.

    Returns:
        by the key of each job, how it ended.

    Raises:
        UserError: no process can be started.
    """
    with ray_cluster() as ray:
        start, n_processes = _starter(ray, jobs, n_processes)
        queue, running, outcomes = list(jobs), {}, {}
        idle = [start() for _ in range(n_processes)]
        try:
            ray.get([worker.ready.remote() for worker in idle])
        except ray.exceptions.RayActorError as error:
            raise UserError(f"no process can be started: {reason(error)}") from error
        while queue or running:
            ready = [job for job in queue if job.needs is None or job.needs in outcomes]
            for job in ready[: len(idle)]:
                queue.remove(job)
                worker = idle.pop()
                call = worker.run.remote(job, log_folder / job.log_name)
                running[call.future()] = job, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, worker = running.pop(future)
                try:
                    outcome = future.result()
                except ray.exceptions.RayError as error:
                    outcome = _crash(error, job, log_folder / job.log_name)
                    if not isinstance(error, ray.exceptions.RayTaskError) and queue:
                        worker = start()
                idle.append(worker)
                report(jobs, outcomes, job, outcome, n_processes)
                queue = [job for job in queue if job.key not in outcomes]
    return outcomes


def _starter(
    ray: Any, jobs: Sequence[Job], n_processes: int | None
) -> tuple[Callable[[], Any], int]:
    """The function that starts a process, and how many to start."""
    n_nodes = sum(node["Alive"] for node in ray.nodes())
    n_gpus = int(ray.cluster_resources().get("GPU", 0))
    if not any(job.work["device"] in ("auto", "cuda") for job in jobs):
        n_gpus = 0
    n_processes = min(n_processes or n_gpus or n_nodes, len(jobs))
    threads = max(1, (os.cpu_count() or 1) // math.ceil(n_processes / n_nodes))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        "TQDM_DISABLE": "1",
    }
    actor = ray.remote(Worker).options(
        num_cpus=0,
        num_gpus=1 / math.ceil(n_processes / n_gpus) if n_gpus else 0,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": environment},
    )
    return lambda: actor.remote(Path.cwd()), n_processes


def _crash(error: Exception, job: Job, log_file: Path) -> Outcome:
    """The outcome of a job that raised what it must not raise, or that ended its process."""
    if cause := getattr(error, "cause", None):  # a bug: its traceback belongs in the log
        with contextlib.suppress(OSError), log_file.open("a", encoding="utf-8") as messages:
            messages.write(f"{error}\n")
        return Outcome(FAILED, reason=f"{type(cause).__name__}: {cause}")
    said = log_file.read_text(errors="replace") if log_file.is_file() else ""
    if fatal := re.search("Fatal Python error: (.*)", said.rpartition(job.title)[2]):
        return Outcome(FAILED, reason=f"its process was killed: {fatal[1]}")
    if status := re.search(r"exit code (\d+)", str(error)):
        return Outcome(FAILED, reason=f"its process ended with status {status[1]}")
    return Outcome(FAILED, reason="its process was killed, perhaps because memory ran out")


# -------------------------------------------------------------------------------------- progress


def report(
    jobs: Sequence[Job], outcomes: dict[str, Outcome], job: Job, outcome: Outcome, n_processes: int
) -> None:
    """Records and logs how a job ended, with an estimate of the time left.

    The edits of a failed inversion fail too.
    """
    outcomes[job.key] = outcome
    if outcome.state == FAILED:
        waiting = [edit for edit in jobs if edit.needs == job.key]
        outcomes |= {edit.key: Outcome(FAILED, reason=NOT_TRIED) for edit in waiting}
    how = {
        MADE: f"{MADE} in {duration(outcome.seconds)}",
        FOUND: "found finished",
        FAILED: f"failed: {outcome.reason}",
    }[outcome.state]
    made = [each.seconds for each in outcomes.values() if each.state == MADE]
    if made and len(outcomes) < len(jobs):
        left = statistics.mean(made) * (len(jobs) - len(outcomes)) / n_processes
        how += f"; about {duration(left)} left"
    level = logging.ERROR if outcome.state == FAILED else logging.INFO
    log.log(level, "[%d/%d] %s: %s", len(outcomes), len(jobs), job.title, how)
