"""Folders that hold the result of long work: they appear whole, and work on them can go on.

    <parent>/<name>/              the finished folder
    <parent>/.<name>.lock         locked by the process that works on it, or by those that read it
    <parent>/.<name>.work/        unfinished work
        work.json                 what it is; work on anything else is thrown away
        state.safetensors         where it goes on
        folder/                   what will be <name>
        old/                      what <name> replaces, between two renames

A process may be killed at any moment: every file is written under a temporary name, synced and
renamed (`util.atomic_file`), and so is the folder, last. Locks are flock(2)'s, which end with the
process that holds them. Nothing here knows diffusion.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from util import (
    MissingFileError,
    UserError,
    atomic_file,
    sha256_file,
    sync_folder,
    write_safetensors,
)

log = logging.getLogger("tokenflow")

LABEL = "work.json"

# Where a reader has no right to make a lock it does without: an edit whose cache was replaced
# meanwhile is refused at its end.
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Busy(UserError):
    """Another process works on the folder."""


# ---------------------------------------------------------------------------------------- locks


@contextmanager
def locked(
    folder: Path, *, shared: bool = False, wait: bool = True, group: ProcessGroup = SINGLE_PROCESS
) -> Iterator[None]:
    """Keeps other processes off a folder, which need not exist yet.

    Args:
        shared: only those that write; several may read at once.
        wait: until the others are done, which the log says; else Busy is raised.
        group: processes that work on the folder together: the main one keeps all others off.

    Raises:
        Busy: if another process is at it and `wait` is false.
    """
    lock = _acquire(folder, shared, wait) if group.is_main else None
    if lock is None:
        yield
        return
    try:
        if not shared:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        _release(folder, lock)


def _acquire(folder: Path, shared: bool, wait: bool) -> int | None:
    """The descriptor of the folder's lock, held; None where a reader needs none."""
    path, kind = _lock_path(folder), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        lock = _open_lock(path, read_only=shared)
        if lock is None:
            return None
        try:
            _flock(lock, kind, folder, wait)
            if _is_at(path, lock):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # removed by its holder while this process waited for it


def _flock(lock: int, kind: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.pread(lock, 200, 0).decode(errors="replace") or "another process"
        if not wait:
            raise Busy(f"{folder}: {who} works on it; try again when it has ended") from error
        log.info("%s: waiting for %s, which works on it (Ctrl-C gives up)", folder, who)
        fcntl.flock(lock, kind)


def _release(folder: Path, lock: int) -> None:
    """Lets go of a lock; whoever is the last to hold it removes its file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(_lock_path(folder), lock) and os.access(folder.parent, os.W_OK):
            _lock_path(folder).unlink()
    except OSError:
        pass  # others hold it still; or, on NFS, it is open for reading only: the file stays
    finally:
        os.close(lock)


def begun_folders(parent: Path, pattern: str) -> list[Path]:
    """The folders in `parent` that somebody works on, or has left unfinished, by their names."""
    traces = [*parent.glob(f".{pattern}.lock"), *parent.glob(f".{pattern}.work")]
    return sorted({path.with_name(path.stem.removeprefix(".")) for path in traces})


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is (still) the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_locked(folder: Path) -> bool:
    """Whether a process works on the folder now."""
    try:
        lock = os.open(_lock_path(folder), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _open_lock(path: Path, read_only: bool) -> int | None:
    """A descriptor of a lock file, made if need be; None where it can be neither made nor read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if not read_only or error.errno not in _READ_ONLY:
            raise
        return os.open(path, os.O_RDONLY) if path.is_file() else None


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


# ------------------------------------------------------------------------------ whole folders


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it takes the place of `folder`, old or missing.

    On failure `folder` is as it was, and what was written is removed. It is locked meanwhile.
    """
    place = _work_place(folder)
    with locked(folder):
        recover(folder)
        _remove(place)
        (place / "folder").mkdir(parents=True)
        try:
            yield place / "folder"
        except BaseException:
            _remove(place)
            raise
        _put_in_place(folder)


def recover(folder: Path) -> None:
    """Ends what a process that was killed between two renames had begun. Call it locked."""
    place = _work_place(folder)
    if (place / "old").exists() and not folder.exists():
        (place / "old").rename(folder)
    # Without a folder to fill, the one that was filled is in its place, or there never was any.
    _remove(place / "old" if (place / "folder").exists() else place)


def unfinished_bytes(folder: Path) -> int:
    """The size of the unfinished work on a folder."""
    files = [path for path in _work_place(folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _put_in_place(folder: Path) -> None:
    place = _work_place(folder)
    for path, _, _ in os.walk(place / "folder"):
        sync_folder(path)
    if folder.exists():
        folder.rename(place / "old")
    (place / "folder").rename(folder)
    sync_folder(folder.parent)
    _remove(place)


def _work_place(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.work")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------- work that goes on


@dataclass(frozen=True)
class State:
    """Where work goes on: the stage that it was in, its tensors, and plain figures."""

    stage: str
    tensors: dict[str, torch.Tensor]
    figures: dict[str, Any]


@dataclass
class Workplace:
    """A folder that is being filled, by one process after another if need be.

    Attributes:
        folder: to fill; a file counts from the `save` after it was written.
        state: as last saved, by this process or one before it; None at the beginning.
        files: bytes and sha256 of the files that were there then, by path within the folder.
        writes: whether this process does what these methods say; of a group, the main one.
    """

    folder: Path
    state: State | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    writes: bool = True

    def save(self, stage: str, tensors: Mapping[str, torch.Tensor], **figures: Any) -> None:
        """Makes this the state that work goes on from, with all files that are there now."""
        if not self.writes:
            self.state = State(stage, dict(tensors), figures)
            return
        self.record_files()
        # Copies, since safetensors takes no two tensors that share memory.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        text = json.dumps({"stage": stage, "figures": figures, "files": self.files})
        metadata = {"state": text, "sha256": _digest(text, plain)}
        with atomic_file(_state_file(self.folder.parent)) as temporary:
            write_safetensors(temporary, plain, metadata)
        self.state = State(stage, plain, figures)

    def record_files(self) -> dict[str, FileRecord]:
        """Records the files that are there by now; returns all of them.

        Raises:
            MissingFileError: one that was recorded is there no more.
        """
        for name in self.files:
            if not (self.folder / name).is_file():
                raise MissingFileError(
                    f"{self.folder / name}: vanished while the work went on; run the same command "
                    "again"
                )
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name not in self.files and path.is_file():
                self.files[name] = file_record(path)
        return self.files


class FileRecord(TypedDict):
    """What manifests say of a file."""

    bytes: int
    sha256: str


def file_record(path: Path) -> FileRecord:
    """What manifests say of a file now."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


@contextmanager
def resumable_folder(
    folder: Path, work: Mapping[str, Any], group: ProcessGroup = SINGLE_PROCESS
) -> Iterator[Workplace]:
    """Yields a place to fill; on success it takes the place of `folder`, old or missing.

    However it is left otherwise, the next one with the same `work` goes on from the last `save`.
    Work on anything else is thrown away; so is what is damaged since, with a warning.
    Call it locked.

    Args:
        work: all that the folder's contents depend on, as plain values.
        group: the processes that fill it together, each of which calls this.
    """
    if not group.is_main:
        resumed = group.broadcast(None)
        state, _ = _read_state(_work_place(folder)) if resumed else (None, {})
        if resumed and state is None:
            raise UserError(
                f"{folder}: this process does not see the work that another goes on with"
            )
        yield Workplace(_work_place(folder) / "folder", state, writes=False)
        group.barrier()
        return
    recover(folder)
    workplace = _reopen(folder, work) or _begin(folder, work)
    group.broadcast(workplace.state is not None)
    try:
        yield workplace
    except BaseException:
        if workplace.state is None:
            _remove(_work_place(folder))  # there is nothing to go on from
        raise
    _put_in_place(folder)
    group.barrier()


def _begin(folder: Path, work: Mapping[str, Any]) -> Workplace:
    place = _work_place(folder)
    _remove(place)
    (place / "folder").mkdir(parents=True)
    with atomic_file(place / LABEL) as temporary:
        temporary.write_text(_label(work), encoding="utf-8")
    return Workplace(place / "folder")


def _reopen(folder: Path, work: Mapping[str, Any]) -> Workplace | None:
    """The same work as it was last saved; None where nothing was, or it is damaged since."""
    place = _work_place(folder)
    label, path = place / LABEL, _state_file(place)
    if not label.is_file() or label.read_bytes() != _label(work).encode() or not path.is_file():
        return None
    state, files = _read_state(place)
    if state is None:
        log.warning("%s: damaged; the work begins anew", path)
        return None
    workplace = Workplace(place / "folder", state, files)
    for name, record in files.items():
        path = workplace.folder / name
        if not path.is_file() or file_record(path) != record:
            log.warning("%s: damaged; the work begins anew", path)
            return None
    for path in list(workplace.folder.rglob("*")):
        if path.is_file() and path.relative_to(workplace.folder).as_posix() not in files:
            path.unlink()  # written after the last save, perhaps in part
    log.info("%s: going on where an earlier run stopped", folder)
    return workplace


def _label(work: Mapping[str, Any]) -> str:
    return json.dumps(work, indent=1, sort_keys=True)


def _read_state(place: Path) -> tuple[State | None, dict[str, dict[str, Any]]]:
    """The last saved state, and what it says of the files; no state if it is damaged."""
    try:
        with safe_open(_state_file(place), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None, {}
    text = metadata.get("state", "")
    if metadata.get("sha256") != _digest(text, tensors):
        return None, {}
    found = json.loads(text)
    return State(found["stage"], tensors, found["figures"]), found["files"]


def _state_file(place: Path) -> Path:
    return place / "state.safetensors"


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
