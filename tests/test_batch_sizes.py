"""Batches sized to memory: the deciding, which needs no GPU."""

from types import SimpleNamespace

import pytest
import torch

from batch_sizes import MOST, ON_CPU, SHARE, BatchSizes, choose_batch_sizes, fitting_batch_size

MIB = 2**20


@pytest.mark.parametrize(
    ("one", "two", "free", "expected"),
    [
        (100, 200, 1000, 8),  # 80 % of the memory
        (100, 150, 1000, 15),  # 50 are taken however many images there are
        (100, 200, 10**9, MOST),
        (1000, 2000, 500, 1),  # not even one fits: the attempt will say so
        (100, 200, 0, 1),
        (100, 100, 1000, MOST),  # a second image takes no more
        (300, 200, 1000, MOST),  # what no allocator should report
    ],
)
def test_as_many_as_fit(one, two, free, expected):
    found = fitting_batch_size(one * MIB, two * MIB, free * MIB)
    assert found == expected


def test_the_chosen_number_fits_and_one_more_does_not():
    one, two, free = 700 * MIB, 1100 * MIB, 9000 * MIB
    m = fitting_batch_size(one, two, free)
    taken = lambda m: one + (m - 1) * (two - one)  # noqa: E731
    assert taken(m) <= SHARE * free < taken(m + 1)


def test_a_number_is_taken_as_it_is_and_a_cpu_is_not_measured():
    models = SimpleNamespace(device=torch.device("cpu"))
    assert choose_batch_sizes(3, models, None, (64, 64)) == BatchSizes(3, 3)
    assert choose_batch_sizes(None, models, None, (64, 64)) == BatchSizes(ON_CPU, ON_CPU)
