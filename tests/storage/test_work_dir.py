"""Output directories appear whole, are locked, and work on them resumes after an interruption."""

import json
import multiprocessing
import os
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tokenflow.storage import work_dir as folders
from tokenflow.storage.work_dir import (
    atomic_dir,
    is_locked,
    locked,
    recover,
    resumable_dir,
)
from util import MissingFileError, atomic_file, sha256_file

WORK = {"prompt": "a wolf", "steps": 5, "scale": 0.1}


def files(folder):
    """All files below a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- locks

# Not forked: a fork of a process with threads, such as those of Ray, may wait for their locks.
spawn = multiprocessing.get_context("spawn")


def hold(folder, pipe):
    """Holds a folder's lock from a word to the next."""
    with locked(folder):
        pipe.send("locked")
        pipe.recv()
    pipe.send("released")


@contextmanager
def other_process(folder):
    """Another process that holds the lock; it lets go at a word through the pipe yielded."""
    here, there = spawn.Pipe()
    process = spawn.Process(target=hold, args=(folder, there))
    process.start()
    assert here.recv() == "locked"
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


def test_a_killed_process_leaves_no_lock(tmp_path):
    folder = tmp_path / "cache"
    with other_process(folder):
        assert is_locked(folder)
    assert not is_locked(folder)
    with locked(folder):
        assert is_locked(folder)
    assert files(tmp_path) == []


def test_waiting_ends_when_the_other_has_ended(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "cache"
    with other_process(folder) as (_, pipe):
        waits = spawn.Process(target=_wait_and_write, args=(folder, tmp_path / "order"))
        waits.start()
        assert not (tmp_path / "order").exists()
        pipe.send("go on")
        assert pipe.recv() == "released"
        waits.join()
    assert (tmp_path / "order").read_text() == "second"
    assert not is_locked(folder) and files(tmp_path) == ["order"]


def _wait_and_write(folder, path):
    with locked(folder):
        path.write_text("second")


def test_many_processes_one_at_a_time(tmp_path):
    """Each reads a number, adds one and writes it: with two at a time some would be lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [spawn.Process(target=_count, args=(counter, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "200"


def _count(path, times):
    for _ in range(times):
        with locked(path):
            path.write_text(str(int(path.read_text()) + 1))


# ---------------------------------------------------------------- whole folders


def test_a_replaced_folder_is_new_or_old_never_both(tmp_path):
    folder = tmp_path / "report"
    for text in ("one", "two"):
        with atomic_dir(folder) as partial:
            (partial / text).write_text(text)
            assert not (folder / text).exists()
        assert files(tmp_path) == [f"report/{text}"]
    with pytest.raises(ZeroDivisionError), atomic_dir(folder) as partial:
        (partial / "three").write_text("three")
        _ = 1 / 0
    assert files(tmp_path) == ["report/two"]


@pytest.mark.parametrize("links", [True, False])
def test_files_that_a_user_added_stay(tmp_path, monkeypatch, links):
    folder = tmp_path / "report"
    with atomic_dir(folder) as partial:
        for name in ("page", "1-old", "part"):
            (partial / name).write_text("ours")
    (folder / "mine" / "deep").mkdir(parents=True)
    (folder / "mine" / "deep" / "notes").write_text("mine")
    (folder / "link").symlink_to("nowhere")
    (folder / "part").unlink()
    (folder / "part").mkdir()  # where the new directory has a file
    (folder / "part" / "x").touch()
    if not links:
        monkeypatch.setattr(os, "link", lambda *args, **kwargs: os.stat(tmp_path / "no links"))
    with atomic_dir(folder, own=("[0-9]-*",)) as partial:
        for name in ("page", "2-new", "part"):
            (partial / name).write_text("new")
    assert files(tmp_path) == [f"report/{n}" for n in ("2-new", "mine/deep/notes", "page", "part")]
    assert (folder / "page").read_text() == "new" and (folder / "link").is_symlink()
    assert (folder / "mine" / "deep" / "notes").read_text() == "mine"


@pytest.mark.parametrize("killed_before", ["first", "second"])
def test_a_kill_between_the_renames_loses_neither(tmp_path, monkeypatch, killed_before):
    """Of an old folder that makes room, and of the new one that takes its place."""
    folder = tmp_path / "cache"
    with atomic_dir(folder) as partial:
        (partial / "old").write_text("old")
    renames = []

    class Killed(BaseException):
        pass

    def rename(self, target):
        renames.append(target)
        if len(renames) == {"first": 1, "second": 2}[killed_before]:
            raise Killed
        return os.rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.Path, "rename", rename)
        with pytest.raises(Killed), resumable_dir(folder, WORK) as work:
            (work.folder / "new").write_text("new")
            work.save("done", {})
    recover(folder)
    assert files(folder) == ["old"]
    with resumable_dir(folder, WORK) as work:
        assert work.checkpoint.stage == "done" and list(work.sizes) == ["new"]
    assert files(tmp_path) == ["cache/new"]


# ---------------------------------------------------------------- work that goes on


def interrupted(folder, **tensors):
    """Begin some work: one file before the save, one after it."""
    with pytest.raises(KeyboardInterrupt), resumable_dir(folder, WORK) as place:
        (place.folder / "frames").mkdir()
        (place.folder / "frames" / "a").write_text("a")
        place.save("half", tensors, t=3, past=[1, 2], seconds={"vae": 0.5})
        (place.folder / "b").write_text("b")
        (place.folder / ".tmp-b").write_text("half of b")  # of a process that was killed
        raise KeyboardInterrupt


def test_work_goes_on_from_the_last_save(tmp_path):
    folder = tmp_path / "cache"
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    interrupted(folder, x=x, same=x, half=x.half(), integer=torch.arange(3))
    assert not folder.exists()
    with resumable_dir(folder, dict(WORK)) as work:
        state = work.checkpoint
        assert (state.stage, state.figures["t"], state.figures["past"]) == ("half", 3, [1, 2])
        assert state.figures["seconds"] == {"vae": 0.5}
        assert torch.equal(state.tensors["x"], x) and torch.equal(state.tensors["same"], x)
        assert torch.equal(state.tensors["half"], x.half())
        assert files(work.folder) == ["frames/a"]  # what came after the save is gone
        (work.folder / "b").write_text("b")
        found = work.record_files()
    assert files(tmp_path) == ["cache/b", "cache/frames/a"]
    assert {name: r["sha256"] for name, r in found.items()} == {
        name: sha256_file(folder / name) for name in files(folder)
    }


@pytest.mark.parametrize("changes", [{"prompt": "a fox"}, {"scale": 0.2}, {"more": None}])
def test_other_work_starts_from_the_beginning(tmp_path, changes):
    interrupted(tmp_path / "cache")
    with resumable_dir(tmp_path / "cache", WORK | changes) as work:
        assert work.checkpoint is None and files(work.folder) == []
    assert files(tmp_path) == []


def test_a_checkpoint_of_an_earlier_version_is_discarded(tmp_path):
    """It does not say what it is a checkpoint of."""
    interrupted(tmp_path / "cache")
    state = json.dumps({"stage": "half", "figures": {}, "sizes": {}})
    save_file({}, tmp_path / ".cache.work" / "checkpoint.safetensors", {"state": state})
    with resumable_dir(tmp_path / "cache", WORK) as work:
        assert work.checkpoint is None and files(work.folder) == []


def test_work_without_a_save_starts_from_the_beginning(tmp_path):
    with pytest.raises(ZeroDivisionError), resumable_dir(tmp_path / "cache", WORK) as work:
        (work.folder / "a").write_text("a")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "folder/frames/a"])
@pytest.mark.parametrize("length", [0, -1])
def test_damaged_work_starts_from_the_beginning(tmp_path, caplog, name, length):
    interrupted(tmp_path / "cache", x=torch.ones(4))
    path = tmp_path / ".cache.work" / name
    path.write_bytes(path.read_bytes()[:length])
    with resumable_dir(tmp_path / "cache", WORK) as work:
        assert work.checkpoint is None and files(work.folder) == []
    assert f"{path}: damaged; the work starts from the beginning" in caplog.text


# ---------------------------------------------------------------- loss of power


def test_every_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    """And its folder after; a finished folder is synced throughout before it is moved."""
    done, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", of(fd))), fsync(fd)))
    for name, call in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(
            os, name, lambda a, b, call=call: (done.append(("move", str(a), str(b))), call(a, b))
        )
    folder = tmp_path / "cache"
    with resumable_dir(folder, WORK) as work:
        with atomic_file(work.folder / "inner" / "a") as temporary:
            temporary.write_text("a")
        work.save("half", {"x": torch.ones(2)})
    place = tmp_path / ".cache.work"
    moves = [i for i, (what, *_) in enumerate(done) if what == "move"]
    for i in moves[:-1]:
        source, target = done[i][1:]
        assert done[i - 1] == ("sync", source)
        assert done[i + 1] == ("sync", os.path.dirname(target))
    assert done[moves[-1]][1:] == (str(place / "folder"), str(folder))
    synced = {path for what, path, *_ in done[moves[-2] + 2 : moves[-1]] if what == "sync"}
    assert synced == {str(place / "folder"), str(place / "folder" / "inner")}
    assert done[-1] == ("sync", str(tmp_path))


# ---------------------------------------------------------------- what is left behind


def test_finished_work_leaves_nothing(tmp_path, monkeypatch):
    """Not even if it is killed before what it leaves is removed."""
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_remove", lambda folder: None)
        with resumable_dir(tmp_path / "cache", WORK) as work:
            (work.folder / "a").write_text("a")
            work.save("done", {})
    assert (tmp_path / ".cache.work" / "checkpoint.safetensors").is_file()
    recover(tmp_path / "cache")
    assert files(tmp_path) == ["cache/a"]


def test_files_that_vanish_from_unfinished_work_are_missed(tmp_path):
    vanished = pytest.raises(MissingFileError, match="a: vanished")
    with vanished, resumable_dir(tmp_path / "cache", WORK) as work:
        (work.folder / "a").write_text("a")
        work.save("half", {})
        (work.folder / "a").unlink()
        work.save("whole", {})
    assert not (tmp_path / "cache").exists()


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError) as caught, resumable_dir(tmp_path / "cache", WORK) as work:
            work.save("half", {"x": torch.ones(2)})
    path = tmp_path / ".cache.work" / "checkpoint.safetensors"
    assert (caught.value.errno, caught.value.filename) == (28, str(path))
