"""What benchmark.py measures with: seconds, image-forwards, FLOPs and memory of each stage.

An image-forward is one evaluation of the UNet on one image of one text branch: a unit of work that
does not depend on how images are batched.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from tokenflow.ops.profiling import Stopwatch, peak_memory_bytes, reset_peak_memory

MATRIX_SIZE = {"cuda": 8192}  # side of the matrices whose product is timed; elsewhere 1024


class Meter(Stopwatch):
    """A stopwatch that also measures work and memory.

    Args:
        count_flops: count FLOPs, with torch's FlopCounterMode; this slows the stages down.

    Attributes:
        seconds: by stage, not rounded.
        processor: seconds of processor time by stage, of all threads of this process.
        images: image-forwards by stage, of the UNet that is `watching`.
        flops: by stage.
        peak: bytes by stage; on a CPU of the whole process, including the models.
    """

    def __init__(self, device: torch.device, count_flops: bool = False) -> None:
        super().__init__(device)
        self.count_flops = count_flops
        self.processor: Counter[str] = Counter()
        self.images: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._stage = ""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._stage = stage
        synchronize(self.device)
        reset_peak_memory(self.device)
        start = time.process_time()
        with super().__call__(stage), self._counter() as counter:
            yield
        self.processor[stage] += time.process_time() - start
        self.peak[stage] = max(self.peak.get(stage, 0), peak_memory_bytes(self.device))
        if counter is not None:
            self.flops[stage] += counter.get_total_flops()

    def _counter(self) -> FlopCounterMode | nullcontext:
        return FlopCounterMode(display=False) if self.count_flops else nullcontext()

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def watching(self, unet: nn.Module) -> Iterator[None]:
        """Count a UNet's image-forwards."""

        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.images[self._stage] += len(args[0] if args else kwargs["sample"])

        hook = unet.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device's kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the upper bound, as measured."""
    size = MATRIX_SIZE.get(device.type, 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.2).median


def limit_memory(device: torch.device, gib: float) -> None:
    """Let PyTorch take no more of a CUDA device's memory than this: beyond, it runs out."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
