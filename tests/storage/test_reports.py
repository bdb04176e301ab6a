"""Reports to files, links, pipes, devices and standard output."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import util
from tokenflow.storage.reports import check_report_path, write_reports
from util import UserError


@contextlib.contextmanager
def pipe_at(path: Path) -> Iterator[Callable[[], str]]:
    """A named pipe; yields a function that reads what was written to it."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield lambda: os.read(reader, 1 << 16).decode()
    finally:
        os.close(reader)


def test_a_report_replaces_a_file_and_what_a_link_leads_to(tmp_path):
    (tmp_path / "old").write_text("old")
    for link, target in (("to_old", "old"), ("to_new", "sub/new")):
        (tmp_path / link).symlink_to(target)
        check_report_path(tmp_path / link, "--json")
        write_reports("", [(tmp_path / link, "report\n")])
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target).read_text() == "report\n"


def test_a_report_goes_through_a_pipe_which_stays(tmp_path):
    with pipe_at(tmp_path / "pipe") as read:
        check_report_path(tmp_path / "pipe", "--json")
        write_reports("", [(tmp_path / "pipe", "report\n")])
        assert read() == "report\n"
    assert (tmp_path / "pipe").is_fifo()


def test_a_report_goes_through_a_device_which_stays(tmp_path):
    control, terminal = os.openpty()
    try:
        link = tmp_path / "terminal"
        link.symlink_to(os.ttyname(terminal))
        for path in (link, Path(os.ttyname(terminal))):
            check_report_path(path, "--json")
            write_reports("", [(path, "report\n")])
            assert os.read(control, 100) == b"report\r\n"
            assert path.is_char_device()
    finally:
        os.close(control)
        os.close(terminal)


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_report_on_standard_output_sends_the_text_to_standard_error(name, tmp_path, capsysbinary):
    check_report_path(Path(name), "--json")
    write_reports("table", [(Path(name), b"\x89PNG"), (tmp_path / "a", "report")])
    assert capsysbinary.readouterr() == (b"\x89PNG", b"table\n")
    assert (tmp_path / "a").read_text() == "report"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", "--json: .*: is a folder, expected a file"),
        ("file/a.json", "--json: .*file is a file, expected a folder"),
        ("loop", "--json: .*loop: is a link that leads to itself"),
        ("socket", "--json: .*socket: cannot be written to"),
    ],
)
def test_a_place_that_takes_no_report_is_refused(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    Path("file").touch()
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(UserError, match=message):
            check_report_path(Path(place), "--json")


SCRIPT = """
import sys
from pathlib import Path
from tokenflow.storage.reports import write_reports
from util import command_line
command_line(lambda argv: write_reports("table\\n" * {lines}, [(Path({report!r}), "report")]))
"""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_a_script_quietly_after_its_reports(lines, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    script = SCRIPT.format(lines=lines, report=str(tmp_path / "report"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(util.__file__).parent, stdout=writer, stderr=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    assert (tmp_path / "report").read_text() == "report"
