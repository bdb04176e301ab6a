"""What run.yaml records: seconds per stage, peak memory, versions."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
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


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate; None for a GPU that is not there."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def memory_text(peaks: Mapping[str, int], device: torch.device) -> str:
    """What stages need at most: "about 5.4 GB on the GPU (edit 3.7 GB, ...); 78.0 GB are free"."""
    free = free_memory(device)
    where = "on the GPU" if device.type == "cuda" else "of main memory, beside the program's own"
    stages = ", ".join(f"{stage} {_size(peak)}" for stage, peak in peaks.items())
    left = "there is no GPU here" if free is None else f"{_size(free)} are free"
    return f"about {_size(max(peaks.values()))} {where} ({stages}); {left}"


def disk_text(needed: float, folder: Path) -> str:
    """The same for the disk that a folder is or will be on."""
    return f"at most {_size(needed)} in {folder}; {_size(free_disk(folder))} are free"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be made."""
    parents = (folder, *folder.absolute().parents)
    return shutil.disk_usage(next(place for place in parents if place.exists())).free


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
