"""Errors, the command line, files."""

import errno
import io
import logging
import os
import stat
import sys

import pytest
import torch

import util
from util import MissingFileError, UserError

# ---------------------------------------------------------------- errors and the command line


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("bad\nnews"), 2, "error: bad news\n"),
        (util.PartialFailure("1 of 2 failed"), 1, "error: 1 of 2 failed\n"),
        (MissingFileError("no such file"), 2, "error: no such file\n"),
        (OSError(errno.ENOSPC, "No space left", "a.png"), 2, "error: a.png: No space left; once"),
        (KeyboardInterrupt(), 130, "\ninterrupted; run the same command again"),
        (util.Interrupted(15), 143, "\ninterrupted; run the same command again"),
        (None, 0, ""),
    ],
)
def test_command_line_exits(raised, status, message, capsys):
    def main(arguments):
        assert arguments is None
        if raised:
            raise raised

    with pytest.raises(SystemExit) as exit_info:
        util.command_line(main)
    assert exit_info.value.code == status
    said = capsys.readouterr().err
    assert said.startswith(message) and bool(said) == bool(message)
    assert len(said.strip().splitlines()) <= 1


def test_an_ascii_terminal_shows_escapes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as exit_info:
        util.command_line(lambda arguments: print("a \N{WOLF FACE}"))
    assert exit_info.value.code == 0
    assert terminal.buffer.getvalue() == b"a \\U0001f43a\n"


def test_command_line_explains_out_of_memory(capsys):
    def main(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(SystemExit) as exit_info:
        util.command_line(main)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in ("--batch_size", "chunk_size", "n_frames", "--H"))


def test_command_line_keeps_the_traceback_of_bugs():
    def main(arguments):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        util.command_line(main)


@pytest.mark.parametrize("arguments", [["--steps", "x"], ["--ste", "3"], ["--what"]])
def test_argument_parser_raises_and_takes_no_abbreviation(arguments, capsys):
    parser = util.ArgumentParser()
    parser.add_argument("--steps", type=int)
    assert parser.parse_args(["--steps", "3"]).steps == 3
    with pytest.raises(UserError):
        parser.parse_args(arguments)
    assert capsys.readouterr().err == ""


def test_logging_shows_ours_and_only_warnings_of_others(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    util.setup_logging()
    for name in ("tokenflow", "tokenflow.storage.video", "library"):
        logging.getLogger(name).info("i %s", name)
        logging.getLogger(name).warning("w %s", name)
    assert capsys.readouterr().err.splitlines() == [
        "i tokenflow",
        "warning: w tokenflow",
        "i tokenflow.storage.video",
        "warning: w tokenflow.storage.video",
        "warning: w library",
    ]


# ---------------------------------------------------------------- names and hashes


def test_sha256_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert util.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(MissingFileError, match="b: no such file"):
        util.sha256_file(tmp_path / "b")
    with pytest.raises(MissingFileError, match="a folder, not a file"):
        util.sha256_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A marble sculpture, 4K!", "a-marble-sculpture-4k"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "prompt"),
        ("", "prompt"),
        ("a\0b\nc\td", "a-b-c-d"),
        ("Café Ångström ﬁne", "cafe-angstrom-fine"),
        ("🐺 wolf 🐺", "wolf"),
        ("волк 狼", "prompt"),
        ("\ud800", "prompt"),
        ("--rf *", "rf"),
        ("x" * 10_000, "x" * 48),
        ("x" * 47 + " y", "x" * 47),
    ],
)
def test_slug(text, expected):
    assert util.slug(text) == expected
    assert util.slug("one two three", limit=7) == "one-two"


# ---------------------------------------------------------------- files


def test_atomic_file_replaces_only_on_success(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with util.atomic_file(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_file_leaves_nothing_of_a_failure(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), util.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no permission bits")
def test_atomic_file_follows_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with util.atomic_file(tmp_path / "a.yaml") as temporary:
            temporary.write_text("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.yaml").stat().st_mode) == 0o644


def test_nothing_replaces_a_device(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(null)  # devices are for root
    with pytest.raises(UserError, match="null: is a device or pipe"):
        util.save_tensors(null, {})
    assert not null.is_file() and os.listdir(tmp_path) == ["null"]


def test_another_broken_pipe_is_a_bug():
    def main(arguments):
        raise BrokenPipeError(errno.EPIPE, "of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        util.command_line(main)


# ---------------------------------------------------------------- tensors


def test_tensors_survive_saving(tmp_path):
    tensors = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(2).bfloat16(),
        "turned": torch.arange(6.0).reshape(2, 3).T.requires_grad_(),
        "index": torch.tensor([1, 2]),
    }
    path = tmp_path / "a.safetensors"
    util.save_tensors(path, tensors)
    loaded = util.load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_damaged_tensors_are_a_user_error(tmp_path):
    path = tmp_path / "a.safetensors"
    util.save_tensors(path, {"x": torch.zeros(100)})
    data = path.read_bytes()
    for damaged in (data[:-50], data[:4], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.safetensors: truncated or not a safetensors"):
            util.load_tensors(path)
    with pytest.raises(MissingFileError, match="no such file"):
        util.load_tensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize("word", ["a\0b", os.fsdecode(b"caf\xe9.mp4")])
def test_a_command_line_that_is_no_text_is_refused(word):
    parser = util.ArgumentParser()
    parser.add_argument("--data_path")
    with pytest.raises(UserError, match=r"command line: '.*' (holds a NUL|is not valid Unicode)"):
        parser.parse_args(["--data_path", word])
    assert parser.parse_args(["--data_path", "a\nb 狼"]).data_path == "a\nb 狼"


def test_a_path_that_no_file_system_takes_is_refused(tmp_path):
    for folder, message in (
        (tmp_path / ("x" * 256), "--out: 'xxx.*' is too long for a folder's name .256 bytes"),
        (tmp_path / ("狼" * 86), "too long for a folder's name .258 bytes"),
        (tmp_path / "/".join(["x" * 100] * 40), "too long for a path"),
        (f"{tmp_path}/a\0b", "holds a NUL"),
    ):
        with pytest.raises(UserError, match=message):
            util.check_writable(folder, "--out")
    util.check_writable(tmp_path / ("狼" * 85) / "../x", "--out")


def test_a_link_that_leads_to_no_folder_is_no_place_to_write(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("gone", "loop", "gone/a", "loop/a"):
        with pytest.raises(UserError, match=r"--out: .* is a link that leads to no folder"):
            util.check_writable(tmp_path / name, "--out")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    util.check_writable(tmp_path / "link" / "new", "--out")


def test_an_error_is_one_line_without_control_characters():
    assert str(UserError("a\nb\x1b]0;title\x07\r\nc \x7f 狼")) == (
        "a b\\x1b]0;title\\x07 c \\x7f 狼"
    )
