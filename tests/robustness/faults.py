"""Processes that are killed: what tests of faults need.

A `Child` is a fork of the test's process, which has all imported and the models loaded, so that
one costs milliseconds. It may be killed at any moment, or let kill itself at an exact one: before
the n-th of the `CALLS` by which a program changes what lies on the disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenflow.cache.source_cache import MANIFEST
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.storage import work_dir as folders
from tokenflow.storage.yaml_files import load_yaml

# What orders the steps of writing; the data themselves go through the libraries.
CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
REMOVALS = ("unlink", "rmdir")
OF_THE_RUN = ("seconds", "peak_memory_bytes")


@dataclass
class Child:
    """A forked process that runs a function in a folder.

    Args:
        run: its exit status is that of the SystemExit that it raises, 0 if it returns, 1 with a
            traceback in the output otherwise.
        place: the folder it runs in.
        die_at: kill itself before this one of the CALLS, from 0.
        fails_with: instead, all from this one on fail with this error number, but for those that
            remove something (unless the disk is read-only).
    """

    run: Callable[[], object]
    place: Path
    die_at: int | None = None
    fails_with: int | None = None
    status: int | None = field(default=None, init=False)
    _output: bytes = field(default=b"", init=False)
    _report: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        # Pipes, since no file may be writable; what runs here says much less than one holds.
        (self._said, said), (self._reported, reported) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(said, reported)
        self._handle = os.pidfd_open(self.pid)
        for descriptor in (said, reported):
            os.close(descriptor)

    def end(self, timeout: float | None = None) -> int | None:
        """Waits for the end, or that long: the exit status, -N for a signal; None: it runs on."""
        if self.status is None and select.select([self._handle], [], [], timeout)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._handle)
            self._output, self._report = map(_all_of, (self._said, self._reported))
        return self.status

    def send(self, number: int) -> None:
        """Sends a signal to a child whose end was not yet waited for."""
        assert self.status is None
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What one that has ended wrote to stdout and stderr."""
        return self._output.decode(errors="replace")

    @property
    def report(self) -> dict[str, int]:
        """Of one that came to its end: its evaluations of the UNet, and its number of CALLS."""
        return json.loads(self._report)

    def _live(self, said: int, reported: int) -> None:
        status = 1
        try:
            os.chdir(self.place)
            sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115
            logging.getLogger().handlers.clear()  # pytest's
            logging.getLogger().setLevel(logging.INFO)
            logging.getLogger().addHandler(logging.StreamHandler())
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
            denoisers, calls = _count_evaluations(), _count_calls(self.die_at, self.fails_with)
            self.run()
            evaluated = sum(denoiser.image_forwards for denoiser in denoisers)
            report = {"evaluated": evaluated, "calls": len(calls)}
            os.write(reported, json.dumps(report).encode())
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


def _all_of(pipe: int) -> bytes:
    """What is in a pipe, of which other forks may hold the other end; closes it."""
    parts = []
    while select.select([pipe], [], [], 0)[0] and (part := os.read(pipe, 1 << 16)):
        parts.append(part)
    os.close(pipe)
    return b"".join(parts)


def _count_evaluations() -> list[Denoiser]:
    made: list[Denoiser] = []
    init = Denoiser.__init__

    def remember(self: Denoiser, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    Denoiser.__init__ = remember
    return made


def _count_calls(die_at: int | None, fails_with: int | None) -> list[str]:
    """Counts the calls of CALLS from now on; dies before one, a file to be synced cut in half.

    Args: as in `Child`.
    """
    made: list[str] = []

    def counted(name: str) -> None:
        call = getattr(os, name)

        def count(*args: Any, **options: Any) -> Any:
            if not _changes(name, *args, **options):
                return call(*args, **options)
            failing = fails_with is not None and die_at is not None and len(made) >= die_at
            if failing and (name not in REMOVALS or fails_with == errno.EROFS):
                raise OSError(fails_with, os.strerror(fails_with))
            if len(made) == die_at and fails_with is None:
                if name == "fsync":
                    os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(name)
            # A kill loses nothing that the kernel has, and the tests' disk may be a slow one.
            return call(*args, **options) if name != "fsync" else None

        setattr(os, name, count)

    for name in CALLS:
        counted(name)
    return made


def _changes(name: str, target: Any, *args: Any, dir_fd: int | None = None) -> bool:
    """Whether a call of CALLS will change what is on the disk; a file to be synced is new there."""
    if name == "fsync":
        return os.path.isfile(f"/proc/self/fd/{target}")
    if name == "mkdir":
        return not os.path.exists(target)
    return name != "unlink" or dir_fd is not None or os.path.lexists(target)


# ---------------------------------------------------------------------------------------------
# What lies in a folder


def visible(folder: Path) -> list[Path]:
    """The files below a folder but for hidden ones, and what lies in hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def hidden(folder: Path) -> list[str]:
    """All hidden names below a folder: locks, temporary files, unfinished work."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def snapshot(folder: Path, without: str | None = None) -> dict[str, Any]:
    """The bytes of a folder's files by name; of manifests all but how long the work took.

    Args:
        without: a folder in it to leave out.
    """
    found: dict[str, Any] = {}
    for path in visible(folder):
        name = path.relative_to(folder).as_posix()
        if without is not None and name.startswith(f"{without}/"):
            continue
        if path.name in (MANIFEST, "run.yaml"):
            data = load_yaml(path)
            found[name] = {key: value for key, value in data.items() if key not in OF_THE_RUN}
        else:
            found[name] = path.read_bytes()
    return found


def saved_figures(folder: Path) -> dict[str, Any]:
    """The figures of a folder's unfinished work, as last saved; {} if nothing was."""
    place = folder.with_name(f".{folder.name}.work")
    path = place / "checkpoint.safetensors"
    if not path.is_file() or not (place / "folder").exists():
        return {}
    with folders.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])["figures"]
