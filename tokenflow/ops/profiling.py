"""What run.yaml records: seconds per stage, peak memory, versions."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import diffusers
import numpy as np
import torch
import transformers

CLEAR_REFS = Path("/proc/self/clear_refs")


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
        self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Adds seconds measured elsewhere."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 3)


def reset_peak_memory(device: torch.device) -> None:
    """Restarts `peak_memory_bytes`, on CUDA and where Linux allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5")  # proc(5): resets the resident set's high water mark


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since the last reset, of the CUDA allocator or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results may depend on."""
    modules = (torch, diffusers, transformers, np, av, cv2)
    found = {module.__name__: str(module.__version__) for module in modules}
    return {"python": platform.python_version(), **found}
