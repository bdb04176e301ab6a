"""What benchmark.py measures with: seconds, image-forwards, FLOPs and memory of each stage.

An image-forward is one evaluation of the UNet on one image of one text branch: a unit of work that
does not depend on how images are batched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from tokenflow.ops.profiling import Stopwatch, peak_memory_bytes, reset_peak_memory

TOTAL = "total"  # the stage that stands for all


class Meter(Stopwatch):
    """A stopwatch that also measures work and memory.

    Args:
        count_flops: count FLOPs, with torch's FlopCounterMode; this slows the stages down.

    Attributes:
        seconds: by stage, not rounded.
        images: image-forwards by stage, of the UNet that is `watching`.
        flops: by stage.
        peak: bytes by stage; on a CPU of the whole process, including the models.
    """

    def __init__(self, device: torch.device, count_flops: bool = False) -> None:
        super().__init__(device)
        self.images: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._count_flops, self._stage = count_flops, ""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._stage = stage
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        reset_peak_memory(self.device)
        counting = FlopCounterMode(display=False) if self._count_flops else nullcontext()
        with super().__call__(stage), counting:
            yield
        self.peak[stage] = max(self.peak[stage], peak_memory_bytes(self.device))
        if self._count_flops:
            self.flops[stage] += counting.get_total_flops()

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def add_total(self, *stages: str) -> None:
        """Adds the stage TOTAL: the sums of some stages (default: all), and the highest peak."""
        stages = stages or tuple(self.seconds)
        for counts in (self.seconds, self.images, self.flops):
            counts[TOTAL] = sum(counts.get(stage, 0) for stage in stages)
        self.peak[TOTAL] = max(self.peak[stage] for stage in stages)

    def watching(self, unet: nn.Module) -> RemovableHandle:
        """Counts a UNet's image-forwards until the `with` block that it opens ends."""

        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.images[self._stage] += len(args[0] if args else kwargs["sample"])

        return unet.register_forward_pre_hook(count, with_kwargs=True)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the upper bound, as measured."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.2).median
