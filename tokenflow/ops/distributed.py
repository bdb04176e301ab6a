"""Several processes at work on one clip: what each of them does, and what they tell each other.

    accelerate launch --multi_gpu --num_processes 2 run_tokenflow_pnp.py --config ...

Each process runs the same script. What is independent (frames, sampling steps) is shared out in a
`Share`; what one process found and others need is gathered. One process alone is a `Team` too,
`ALONE`, which shares nothing out and never touches torch.distributed.

Only the main process writes results, shows progress and logs; all of them read the cache, and
each writes its part of the source features.
"""

from __future__ import annotations

import itertools
import json
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

# The main process may wait for another run's lock while the others wait for it. A process that is
# lost is seen by the launcher, which ends the rest.
TIMEOUT = timedelta(days=7)


class OtherProcessFailed(SystemExit):
    """Ends a process that has nothing to say itself: the one that failed says why.

    Its status is 0, so that the launcher waits for the other's message and status.
    """


@dataclass(frozen=True)
class Team:
    """The processes that work on one clip, as one of them sees them.

    Attributes:
        rank: this process's number, 0 to size - 1.
        size: how many there are.
        local_rank: its number among those of this machine, which is its GPU's.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and shows progress."""
        return self.rank == 0

    def share(self, n: int) -> Share:
        """This process's part of n things that are independent; it may be empty."""
        return Share(self, n)

    def share_jointly(self, n: int) -> Share:
        """This process's part of n things that are worked on in step, with exchanges in between.

        No process may have none of them then, since all must come to each exchange: where there
        are more processes than things, some do what others do too, and that is not gathered.
        """
        return Share(self, n, joint=True)

    def agree(self, value: Any) -> Any:
        """The main process's value, which must be what JSON can hold."""
        if self.size == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        with _exchange():
            dist.broadcast(length, src=0)
            if not self.is_main:
                data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))

    def of_all(self, number: int) -> list[int]:
        """The number of every process, in the order of their ranks."""
        return self.share(self.size).gather(torch.tensor([number])).tolist()

    def wait(self) -> None:
        """Returns once every process has come here."""
        self.of_all(0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Holds checks that every process makes: if one refuses, all end, and one says why.

        Without this, the first process to fail would have the others killed, perhaps before
        they have said anything, or each would say the same.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.of_all(error is not None)
        if any(failed):
            if failed.index(True) == self.rank:
                raise error
            raise OtherProcessFailed(0)

    def check_same(self, text: str, what: str) -> None:
        """Refuses to go on where the processes do not start from the same.

        Raises:
            UserError: naming `what` differs.
        """
        with self.together():
            if self.agree(text) != text:
                raise UserError(
                    f"process {self.rank} of this run does not see the {what} that process 0 sees; "
                    "all of them need the same folders and settings"
                )


@dataclass(frozen=True)
class Share:
    """One process's part of n things: a contiguous range, as even as can be.

    For one process alone `take` and `gather` return what they are given, whatever n is.

    Attributes:
        joint: of `Team.share_jointly`.
    """

    team: Team
    n: int
    joint: bool = False

    @property
    def own(self) -> slice:
        """The range of 0..n-1 that is this process's."""
        ends, rank = self._ends(), self.team.rank
        if self.joint and self.n < self.team.size:
            rank %= self.n
        return slice(ends[rank], ends[rank + 1])

    @property
    def numbers(self) -> Tensor:
        """The numbers in `own`, int64."""
        return torch.arange(self.own.start, self.own.stop)

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """This process's part of what there is one of for each thing along a dimension."""
        if self.team.size == 1:
            return x
        return x.narrow(dim, self.own.start, self.own.stop - self.own.start)

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of `take`: all processes' parts, in order, on every process."""
        team = self.team
        if team.size == 1 or self.n == 0:
            return x
        ends = self._ends()
        longest = ends[1]  # the first shares are the longest
        part = x.movedim(dim, 0)
        if len(part) < longest:  # all_gather wants equal shapes
            part = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        found = part.new_empty(team.size * longest, *part.shape[1:])
        with _exchange():
            dist.all_gather(list(found.split(longest)), part.contiguous())
        if self.n < len(found):  # without what was padded or done twice
            lengths = [stop - start for start, stop in itertools.pairwise(ends)]
            parts = zip(found.split(longest), lengths, strict=True)
            found = torch.cat([part[:length] for part, length in parts])
        return found.movedim(0, dim)

    def _ends(self) -> list[int]:
        """Where the parts of all processes begin and end, size + 1 numbers."""
        each, more = divmod(self.n, self.team.size)
        return [rank * each + min(rank, more) for rank in range(self.team.size + 1)]


ALONE = Team()


@contextmanager
def start_team() -> Iterator[Team]:
    """Joins the processes that the launcher started with this one; ALONE if there are none.

    What is on the CPU is exchanged by gloo, what is on a GPU by NCCL.

    Raises:
        UserError: if several processes were asked for and the launcher started one.
    """
    environment = os.environ
    several = "MASTER_PORT" in environment  # accelerate sets it where more than one are asked for
    if several and "WORLD_SIZE" not in environment and "ACCELERATE_USE_CPU" in environment:
        raise UserError(
            "accelerate launch --cpu starts one process, however many are asked for; for several "
            "on the CPU too: accelerate launch --multi_gpu --num_processes N"
        )
    size = int(environment.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    team = Team(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]))
    backend = "gloo"
    if team.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(team.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not team.is_main:
        from transformers.utils import logging as transformers_logging  # slow to import

        transformers_logging.disable_progress_bar()
    dist.init_process_group(backend, timeout=TIMEOUT)
    yield team
    dist.destroy_process_group()  # not after an error: it may wait for processes that wait for this


@contextmanager
def _exchange() -> Iterator[None]:
    """Makes one line of an exchange that breaks off since another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise UserError(
            "another process of this run has ended and says why, if it could"
        ) from error
