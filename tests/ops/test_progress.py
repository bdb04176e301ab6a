"""How far a run is: a bar in a terminal, lines in a log file."""

import io
import logging
import sys

import pytest

from tokenflow.ops import progress
from tokenflow.ops.progress import Progress, duration, listen


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 1 s whenever it is read."""
    seconds = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))


def test_a_log_file_gets_a_line_for_each_tenth(clock, caplog):
    caplog.set_level(logging.INFO)
    with Progress(200) as bar:
        for _ in bar.over(range(50), "invert", cost=2, done=25):  # 25 more by an earlier run
            pass
        list(bar.over(range(50), "features"))
    lines = [message.partition(" left")[0] for message in caplog.messages]
    assert lines[0] == "invert: 30 % done, about 70 s"
    assert lines[-1] == "features: 100 % done, about 0 s"
    assert [line.split()[1] for line in lines] == [f"{tenth}0" for tenth in range(3, 11)]


def test_fast_work_is_told_less_often(clock, caplog):
    caplog.set_level(logging.INFO)
    list(Progress(10).over(range(10), "edit"))
    assert [message.split()[1] for message in caplog.messages] == ["50", "100"]
    caplog.clear()
    list(Progress(10, shown=False).over(range(10), "edit"))
    assert not caplog.messages


def test_a_process_may_have_nothing_to_do(clock):
    list(Progress(0).over(range(10), "invert", cost=0))


def test_a_terminal_gets_one_bar(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4) as bar:
        list(bar.over(range(2), "invert"))
        list(bar.over(range(1), "features", done=1))
        assert bar._bar.n == 4
    shown = terminal.getvalue()
    assert "invert:   0%" in shown and not caplog.messages
    assert shown.endswith("\r")  # and is gone at the end


def test_a_listener_hears_of_stages_and_can_end_the_run():
    heard = []

    def listener(stage, share):
        heard.append((stage, share))
        if share == 0.75:
            raise KeyError(stage)

    with pytest.raises(KeyError), listen(listener), Progress(4) as bar:
        list(Progress(4, shown=False).over(range(4), "another process"))
        list(bar.over(range(1), "invert", done=1))
        list(bar.over(range(2), "edit"))
    assert heard == [("invert", 0.25), ("invert", 0.5), ("edit", 0.5), ("edit", 0.75)]
    list(Progress(4).over(range(4), "unheard"))
    assert len(heard) == 4


def test_durations_are_said_as_people_say_them():
    assert [duration(s) for s in (99, 600, 7200)] == ["99 s", "10 min", "2.0 h"]
