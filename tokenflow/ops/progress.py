"""How far a run is, and how long the rest will take."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("tokenflow")

T = TypeVar("T")
LEAST_SECONDS = 5.0  # between two lines of a log file
Listener = Callable[[str, float], None]  # takes the stage, and the share of all work that is done
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Has a function called as the runs in this block advance; what it raises ends the run."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """One bar over all stages of a run; in a log file, a line for each tenth, or for more.

    Args:
        total: the work of all stages, in any unit, such as UNet evaluations of a frame.
        shown: whether to show it; of several processes one does.
    """

    def __init__(self, total: float = 1.0, shown: bool = True) -> None:
        self.total, self.shown = total, shown
        self._listener = _listener.get() if shown else None
        self._done = self._new = 0.0  # with and without what earlier runs did
        self._tenths = 0  # that a line was written of
        self._begun = self._told = time.monotonic()
        hidden = not (shown and sys.stderr.isatty())
        form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=total, disable=hidden, bar_format=form, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()  # before an error is printed

    def over(
        self, items: Iterable[T], stage: str, cost: float = 1.0, done: float = 0
    ) -> Iterator[T]:
        """A stage's items, each of which is done when the next is asked for.

        Args:
            items: that are left to do.
            cost: of an item, in the unit of `total`.
            done: how many an earlier run did.
        """
        self._bar.set_description(stage)
        self.skip(done * cost)
        self._tell(stage)
        for item in items:
            yield item
            self._advance(stage, cost)

    def skip(self, work: float) -> None:
        """Counts work of an earlier run, which tells nothing about the speed."""
        self._done += work
        if not self._bar.disable:
            self._bar.initial += work
            self._bar.update(work)

    def _tell(self, stage: str) -> float:
        """Tells the listener the share of the work that is done, and returns it."""
        share = min(self._done / self.total, 1.0) if self.total else 1.0
        if self._listener:
            self._listener(stage, share)
        return share

    def _advance(self, stage: str, cost: float) -> None:
        self._done, self._new = self._done + cost, self._new + cost
        self._bar.update(cost)
        now, share = time.monotonic(), self._tell(stage)
        if not (self.shown and self._bar.disable) or now - self._told < LEAST_SECONDS:
            return
        tenths = int(10 * share + 1e-6)
        if tenths > self._tenths and self._new:
            self._told, self._tenths = now, tenths
            left = (1 - share) * self.total / self._new * (now - self._begun)
            log.info("%s: %.0f %% done, about %s left", stage, 100 * share, duration(left))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
