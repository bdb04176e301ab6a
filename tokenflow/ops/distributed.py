"""The processes of one run (`accelerate launch --multi_gpu ...`), and what each of them computes.

Each process runs the same script. Independent things (frames, sampling steps) are split into
shards; results that all need are gathered. A single process is a group too, `SINGLE_PROCESS`,
which never touches torch.distributed. Only the main process writes results, shows progress and
logs; all of them read the cache, and each writes its part of the source features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from util import UserError

# Long, since the main process may wait for another run's lock while the others wait for it. The
# launcher ends all processes when one is lost.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run; `local_rank` is a process's number on its machine and of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and shows progress."""
        return self.rank == 0

    def shard(self, n: int, joint: bool = False) -> Shard:
        """This process's part of n things; see `Shard`."""
        return Shard(self, n, joint)

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        return self.all_gather(value)[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        values = [value] * self.size
        if self.size > 1:
            with _one_line_errors():
                dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Returns once every process has called it."""
        self.all_gather(None)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """If any process raises a UserError in the block, all end and one of them prints it.

        Without it, the launcher would kill the others after the first failure, perhaps before
        anything is printed, or each would print the same.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.all_gather(error is not None)
        if any(failed):
            if failed.index(True) == self.rank:
                raise error
            raise SystemExit(0)  # the other one prints the error

    def assert_same(self, text: str, what: str) -> None:
        """Raises a UserError, on one process, if `text` is not the same on all of them."""
        with self.raise_together():
            if self.broadcast(text) != text:
                raise UserError(
                    f"process {self.rank} of this run does not see the {what} that process 0 sees; "
                    "all of them need the same folders and settings"
                )


SINGLE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class Shard:
    """One process's part of n things: a contiguous range, as even as can be.

    For a single process `take` and `gather` return their argument, whatever n is.

    Attributes:
        joint: the things are computed in step, with collectives in between, so no process may
            have none: with more processes than things some compute what others do, which `gather`
            drops. Otherwise a shard may be empty.
    """

    group: ProcessGroup
    n: int
    joint: bool = False

    @property
    def local(self) -> slice:
        """This process's range of 0..n-1."""
        rank, size = self.group.rank, self.group.size
        if self.joint and self.n < size:
            rank %= self.n
        return slice(*(r * (self.n // size) + min(r, self.n % size) for r in (rank, rank + 1)))

    @property
    def local_indices(self) -> Tensor:
        """The indices of `local`, int64."""
        return torch.arange(self.local.start, self.local.stop)

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """This process's part of a tensor with n entries along a dimension."""
        if self.group.size == 1:
            return x
        return x.narrow(dim, self.local.start, self.local.stop - self.local.start)

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of `take`: all processes' parts, in order, on every process."""
        size = self.group.size
        if size == 1 or self.n == 0:
            return x
        lengths = [self.n // size + (rank < self.n % size) for rank in range(size)]
        part = x.movedim(dim, 0)
        if len(part) < lengths[0]:  # all_gather wants equal shapes; the first shards are longest
            part = torch.cat([part, part.new_zeros(lengths[0] - len(part), *part.shape[1:])])
        parts = part.new_empty(size, *part.shape)
        with _one_line_errors():
            dist.all_gather(list(parts), part.contiguous())
        if lengths[0] == lengths[-1]:
            return parts.flatten(0, 1).movedim(0, dim)
        kept = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(kept).movedim(0, dim)


@contextmanager
def start_process_group() -> Iterator[ProcessGroup]:
    """Joins the processes that the launcher started; SINGLE_PROCESS if there are no others.

    CPU tensors are exchanged by gloo, GPU tensors by NCCL.

    Raises:
        UserError: if several processes were asked for and the launcher started one.
    """
    # accelerate sets MASTER_PORT where more than one process is asked for
    several = {"MASTER_PORT", "ACCELERATE_USE_CPU"} <= os.environ.keys()
    if several and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, however many are asked for; for several "
            "on the CPU too: accelerate launch --multi_gpu --num_processes N"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield SINGLE_PROCESS
        return
    # Slow to import, and only needed here.
    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging

    has_gpu = int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    state = PartialState(cpu=not has_gpu, backend=backend, timeout=TIMEOUT)
    if not state.is_main_process:
        transformers_logging.disable_progress_bar()
    yield ProcessGroup(state.process_index, state.num_processes, state.local_process_index)
    state.destroy_process_group()  # not after an error: it might wait for others that wait for us


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns the failure of a collective after another process has ended into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise UserError(
            "another process of this run has ended and says why, if it could"
        ) from error
