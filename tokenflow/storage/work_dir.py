"""Atomic, resumable output directories, and locks on them.

    <parent>/<name>/                 the finished directory
    <parent>/.<name>.lock            locked by the process that writes it
    <parent>/.<name>.work/           unfinished work
        checkpoint.safetensors       where it resumes, and what it depends on: other work is
                                     discarded
        folder/                      becomes <name>
        old/                         what <name> replaces, between two renames

A process may be killed at any moment: every file is written under a temporary name, synced and
renamed (`util.atomic_file`), and so is the directory, last. A lock ends with its process. Readers
take no lock: they check at their end that what they read was not replaced.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.storage.manifest import FileRecord
from util import MissingFileError, UserError, save_tensors, sha256_file, sync_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tokenflow")

CHECKPOINT = "checkpoint.safetensors"


# ---------------------------------------------------------------------------------------- locks


@contextmanager
def locked(folder: Path, group: ProcessGroup = SINGLE_PROCESS, wait: bool = True) -> Iterator[bool]:
    """Keeps other writers off a directory, which need not exist yet, or waits for their end.

    Args:
        group: processes that write it together; the main one holds the lock.
        wait: if not, and another process writes it, it is not locked.

    Yields:
        whether it is locked.
    """
    if not group.is_main:
        yield True
        return
    path = _lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            yield False
            return
        log.info("%s: waiting for another process that works on it (Ctrl-C gives up)", folder)
        lock.acquire()
    try:
        yield True
    finally:
        with suppress(OSError):  # a lock file that stays does no harm
            path.unlink()  # while it is held: whoever waits for it locks a new file instead
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process writes the directory now."""
    path = _lock_file(folder)
    try:
        if path.exists():
            with FileLock(path, timeout=0):
                pass
    except (Timeout, PermissionError):  # a lock file of another user is one at work
        return True
    return False


def begun_dirs(parent: Path, pattern: str) -> list[Path]:
    """The directories in `parent` that a process works on, or has left unfinished, by name."""
    traces = [*parent.glob(f".{pattern}.lock"), *parent.glob(f".{pattern}.work")]
    return sorted({path.with_name(path.stem.removeprefix(".")) for path in traces})


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


# --------------------------------------------------------------------------- atomic directories


@contextmanager
def atomic_dir(folder: Path, own: Sequence[str] | None = None) -> Iterator[Path]:
    """Yields an empty directory to fill; on success it replaces `folder`, which may be missing.

    On failure `folder` is as it was, and what was written is removed. It is locked meanwhile.
    `own` is as in `resumable_dir`.
    """
    with locked(folder), resumable_dir(folder, {}, own=own) as work:
        yield work.folder


def recover(folder: Path) -> None:
    """Ends what a process that was killed between two renames had begun. Call it locked."""
    place = _work_place(folder)
    if (place / "old").exists() and not folder.exists():
        (place / "old").rename(folder)
    # Without a directory to fill, the filled one is in its place, or there never was any.
    _remove(place / "old" if (place / "folder").exists() else place)


def unfinished_bytes(folder: Path) -> int:
    """The size of the unfinished work on a directory."""
    files = [path for path in _work_place(folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _put_in_place(folder: Path, own: Sequence[str] | None) -> None:
    place = _work_place(folder)
    if own is not None:
        _keep_others(folder, place / "folder", own)
    for path, _, _ in os.walk(place / "folder"):
        sync_folder(path)
    if folder.exists():
        folder.rename(place / "old")
    (place / "folder").rename(folder)
    sync_folder(folder.parent)
    _remove(place)


def _keep_others(old: Path, new: Path, own: Sequence[str]) -> None:
    """Adds a directory's files to the one that replaces it, except those that we wrote."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        target = new / name
        is_ours = any(fnmatchcase(name.as_posix(), pattern) for pattern in own)
        is_blocked = any(parent.is_file() for parent in (target, *target.parents))
        if is_ours or is_blocked or not (path.is_file() or path.is_symlink()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:  # not on every file system
            shutil.copy2(path, target, follow_symlinks=False)


def _work_place(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.work")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------ resumable work


@dataclass(frozen=True)
class Checkpoint:
    """Where work resumes: its stage, its tensors, and figures as plain values."""

    stage: str
    tensors: dict[str, torch.Tensor]
    figures: dict[str, Any]


@dataclass
class WorkDir:
    """A directory that is being filled, by one process after another if need be.

    Work that resumes may read what was written before the checkpoint; what came after is removed,
    and written again. The methods raise a MissingFileError if a file of the last checkpoint has
    vanished.
    """

    folder: Path
    checkpoint: Checkpoint | None = None  # as last saved, by this process or an earlier one
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the files there then, by path
    writes: bool = True  # whether `save` writes; of several processes, that of the main one does
    work: str = ""  # all that the contents depend on, as JSON

    def save(self, stage: str, tensors: Mapping[str, torch.Tensor], **figures: Any) -> None:
        """Writes the checkpoint that work resumes from, with all files that are there now."""
        self.checkpoint = Checkpoint(stage, dict(tensors), figures)
        if not self.writes:
            return
        self._list_files()
        # Copies, since safetensors takes no two tensors that share memory.
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        state = {"work": self.work, "stage": stage, "figures": figures, "sizes": self.sizes}
        save_tensors(self.folder.parent / CHECKPOINT, copies, {"state": json.dumps(state)})

    def record_files(self) -> dict[str, FileRecord]:
        """What a manifest says of each file: bytes and sha256, by path within the directory."""
        return {
            name: {"bytes": n_bytes, "sha256": sha256_file(self.folder / name)}
            for name, n_bytes in self._list_files().items()
        }

    def _list_files(self) -> dict[str, int]:
        found = {
            path.relative_to(self.folder).as_posix(): path.stat().st_size
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        for name in self.sizes:
            if name not in found:
                raise MissingFileError(
                    f"{self.folder / name}: vanished while it was in use; run the same command "
                    "again"
                )
        self.sizes = found
        return found


@contextmanager
def resumable_dir(
    folder: Path,
    work: Mapping[str, Any],
    group: ProcessGroup = SINGLE_PROCESS,
    own: Sequence[str] | None = None,
) -> Iterator[WorkDir]:
    """Yields a directory to fill; on success it replaces `folder`, which may be missing.

    If the block fails, the next call with the same `work` resumes from the last `save`. Other
    work is discarded; so is work whose files are missing or cut, with a warning. Call it locked.

    Args:
        work: all that the contents depend on, as plain values.
        group: the processes that fill it together, each of which calls this.
        own: keep the files of the replaced directory that the new one lacks, since the user may
            have added them, except those whose paths match one of these patterns; None: keep none.
    """
    if not group.is_main:
        resumed = group.broadcast(None)
        work_dir = WorkDir(_work_place(folder) / "folder", writes=False)
        if resumed:
            work_dir.checkpoint, _ = _read_checkpoint(_work_place(folder))
            if work_dir.checkpoint is None:
                raise UserError(f"{folder}: this process does not see the work that is resumed")
        yield work_dir
        group.barrier()
        return
    recover(folder)
    label, place = json.dumps(work, sort_keys=True), _work_place(folder)
    work_dir = _resume(folder, label)
    if work_dir is None:
        _remove(place)
        (place / "folder").mkdir(parents=True)
        work_dir = WorkDir(place / "folder", work=label)
    group.broadcast(work_dir.checkpoint is not None)
    try:
        yield work_dir
    except BaseException:
        if work_dir.checkpoint is None:
            _remove(place)  # there is nothing to resume from
        raise
    _put_in_place(folder, own)
    group.barrier()


def _resume(folder: Path, label: str) -> WorkDir | None:
    """The same work as last saved; None where nothing was saved, or it is damaged."""
    place = _work_place(folder)
    if not (place / CHECKPOINT).is_file():
        return None
    checkpoint, state = _read_checkpoint(place)
    if checkpoint is None:
        log.warning("%s: damaged; the work starts from the beginning", place / CHECKPOINT)
        return None
    if state.get("work") != label:
        return None
    known = {place / "folder" / name: size for name, size in state["sizes"].items()}
    for path in (place / "folder").rglob("*"):
        if path.is_file() and path not in known:
            path.unlink()  # written later: a manifest would list itself, another file be cut
    for path, size in known.items():
        if not path.is_file() or path.stat().st_size != size:
            log.warning("%s: damaged; the work starts from the beginning", path)
            return None
    log.info("%s: resuming where an earlier run stopped", folder)
    return WorkDir(place / "folder", checkpoint, state["sizes"], work=label)


def _read_checkpoint(place: Path) -> tuple[Checkpoint | None, dict[str, Any]]:
    """The last checkpoint, and all that its header says; None if it cannot be read."""
    try:
        with safe_open(place / CHECKPOINT, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads((file.metadata() or {})["state"])
        return Checkpoint(state["stage"], tensors, state["figures"]), state
    except (SafetensorError, OSError, ValueError, KeyError):
        return None, {}
