"""What a run says of itself."""

import os

import numpy as np
import pytest
import torch

from tokenflow.ops.profiling import CLEAR_REFS, Stopwatch, peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")


def test_seconds_add_up_by_stage():
    watch = Stopwatch(CPU)
    with watch("edit"):
        pass
    first = watch.seconds["edit"]
    watch.add("edit", 2.0)
    watch.add("decode", 1.5)
    assert watch.seconds == {"edit": round(first + 2.0, 3), "decode": 1.5}


@pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason="the peak cannot be reset here")
def test_peak_memory_counts_from_the_reset():
    big = np.ones(64 << 20, np.uint8)
    with_it = peak_memory_bytes(CPU)
    del big
    reset_peak_memory(CPU)
    without = peak_memory_bytes(CPU)
    assert without < with_it - (32 << 20)
    np.ones(64 << 20, np.uint8)
    assert peak_memory_bytes(CPU) > without + (32 << 20)
