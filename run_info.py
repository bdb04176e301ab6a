"""What a run says of itself: seconds per stage, peak memory, versions."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av
import cv2
import diffusers
import numpy as np
import torch
import transformers


class Stopwatch:
    """Seconds per stage; `with watch("inversion"): ...` adds to that stage.

    Args:
        device: on CUDA, a stage ends when its kernels have.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elapsed = time.perf_counter() - start
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + elapsed, 3)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory the run has held: of the CUDA allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def device_name(device: torch.device) -> str:
    """A device's name for people: the card's, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """The versions that results may depend on."""
    modules = (torch, diffusers, transformers, np, av, cv2)
    found = {module.__name__: str(module.__version__) for module in modules}
    return {"python": platform.python_version(), **found}
