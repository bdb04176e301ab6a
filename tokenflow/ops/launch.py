"""How a script starts: its command line is read before torch is imported, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from util import setup_logging

if TYPE_CHECKING:
    from tokenflow.ops.distributed import ProcessGroup

T = TypeVar("T")


@contextmanager
def started(read: Callable[[], T]) -> Iterator[tuple[ProcessGroup, T]]:
    """Reads a script's command line and joins the processes that the launcher started.

    Args:
        read: reads it; of several processes that raise a UserError, one tells it.

    Yields:
        the processes, and what was read.
    """
    alone = "WORLD_SIZE" not in os.environ
    if alone:
        setup_logging()
        given = read()
    from tokenflow.ops.distributed import start_process_group

    with start_process_group() as group:
        if not alone:
            setup_logging(quiet=not group.is_main)
            with group.raise_together():
                given = read()
        yield group, given
