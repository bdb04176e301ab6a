"""Nearest neighbours of tokens, against a loop in float64; the Triton kernel against PyTorch."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import randn
from tokenflow.ops import nearest
from tokenflow.ops.nearest import nearest_tokens, nearest_tokens_pytorch

ROOT = Path(__file__).parents[2]


def clip(m, length, k, keys, channels, seed=0):
    """Tokens of frames and keyframes, and two keyframes of each frame."""
    which = torch.randint(k, (m, 2), generator=torch.Generator().manual_seed(seed))
    return randn(m, length, channels, seed=seed), randn(k, keys, channels, seed=seed + 1), which


def similarities(tokens, keyframe_tokens, which):
    """The cosines, (m, j, L, L') float64."""
    tokens, keys = (F.normalize(x.double(), dim=-1) for x in (tokens, keyframe_tokens))
    return tokens[:, None] @ keys[which].mT


def assert_nearest(found, tokens, keyframe_tokens, which, atol=1e-6):
    """That each token found is as similar as the most similar one, to rounding."""
    cosines = similarities(tokens, keyframe_tokens, which)
    assert found.dtype == torch.long
    chosen = cosines.gather(-1, found[..., None])[..., 0]
    assert (cosines.amax(-1) - chosen).max() <= atol


# Numbers of tokens about the sizes of blocks and tiles, odd ones, and those of 384x672.
@pytest.mark.parametrize(
    ("m", "length", "k", "keys", "channels"),
    [
        (1, 1, 1, 1, 1),
        (3, 5, 2, 7, 3),
        (5, 66, 3, 66, 40),
        (4, 129, 2, 128, 33),
        (4, 128, 2, 129, 32),
        (3, 252, 3, 252, 130),
        (2, 997, 4, 1008, 16),
        (2, 70, 1, 9001, 8),
    ],
)
def test_the_nearest_token_is_the_most_similar(m, length, k, keys, channels):
    arguments = clip(m, length, k, keys, channels)
    found = nearest_tokens(*arguments)
    assert found.shape == (m, 2, length)
    assert_nearest(found, *arguments)


@pytest.mark.parametrize("keys", [9, 130, 300])
@pytest.mark.parametrize("tile_keys", [16, 4096])
@pytest.mark.parametrize("tile", [256, 1 << 19])
def test_the_size_of_tiles_changes_nothing(monkeypatch, keys, tile_keys, tile):
    arguments = clip(3, 77, 3, keys, 24)
    expected = similarities(*arguments).argmax(-1)
    monkeypatch.setattr(nearest, "FEW_KEYS", 4)
    monkeypatch.setattr(nearest, "TILE_KEYS", tile_keys)
    monkeypatch.setattr(nearest, "CPU_TILE", max(tile, 2 * tile_keys))
    assert torch.equal(nearest_tokens(*arguments), expected)


def test_the_lengths_of_tokens_do_not_matter():
    tokens, keyframe_tokens, which = clip(3, 150, 2, 140, 16)
    expected = nearest_tokens(tokens, keyframe_tokens, which)
    # Powers of two scale without rounding.
    longer = tokens * 2.0 ** torch.randint(-9, 9, (3, 150, 1))
    assert torch.equal(nearest_tokens(longer, keyframe_tokens, which), expected)
    longer = keyframe_tokens * 2.0 ** torch.randint(-9, 9, (2, 140, 1))
    assert torch.equal(nearest_tokens(tokens, longer, which), expected)


@pytest.mark.parametrize("keys", [100, 500, 5000])
def test_of_equal_tokens_the_first_is_taken(keys):
    # Four directions at right angles, whose products are exact, each in many places.
    directions = torch.arange(keys).remainder(4)
    keyframe_tokens = torch.eye(4)[directions.flip(0)][None]
    tokens = 3.0 * torch.eye(4)[None]
    expected = [directions.flip(0).tolist().index(direction) for direction in range(4)]
    found = nearest_tokens(tokens, keyframe_tokens, torch.zeros(1, 1, dtype=torch.long))
    assert found.flatten().tolist() == expected


@pytest.mark.parametrize("keys", [20, 200])
def test_tokens_of_zeros_are_similar_to_nothing(keys):
    tokens, keyframe_tokens, which = clip(1, 3, 1, keys, 8)
    tokens, keyframe_tokens = tokens.abs(), keyframe_tokens.abs()
    tokens[0, 1] = 0.0
    keyframe_tokens[0, 4] = 0.0
    found = nearest_tokens(tokens, keyframe_tokens, which)
    assert found[0, 0, 1] == 0  # equal to all: the first
    assert not (found == 4).any(dim=-1)[0, 0]


def test_a_keyframe_named_twice_is_compared_once(monkeypatch):
    tokens, keyframe_tokens, _ = clip(4, 30, 3, 30, 8)
    which = torch.tensor([[0, 0], [0, 2], [2, 2], [2, 0]])
    compared = []
    rows = nearest._nearest_rows
    monkeypatch.setattr(
        nearest, "_nearest_rows", lambda q, k: compared.append(len(q)) or rows(q, k)
    )
    found = nearest_tokens(tokens, keyframe_tokens, which)
    assert compared == [3 * 30, 3 * 30]  # keyframes 0 and 2, each with the three frames that ask
    assert torch.equal(found, similarities(tokens, keyframe_tokens, which).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    # Tokens of neighbouring frames: similarities that bfloat16 itself could not tell apart.
    common = 10.0 * randn(1, 200, 64)
    tokens = (common + 0.1 * randn(2, 200, 64, seed=1)).to(dtype)
    keyframe_tokens = (common + 0.1 * randn(2, 200, 64, seed=2)).to(dtype)
    which = torch.tensor([[0, 1], [1, 1]])
    found = nearest_tokens(tokens, keyframe_tokens, which)
    assert torch.equal(found, similarities(tokens, keyframe_tokens, which).argmax(-1))


def test_it_works_without_autograd_and_on_views():
    arguments = clip(3, 40, 2, 40, 12)
    expected = nearest_tokens(*arguments)
    tokens, keyframe_tokens, which = arguments
    with torch.inference_mode():
        views = tokens.transpose(1, 2).clone().transpose(1, 2), keyframe_tokens.expand(2, -1, -1)
        assert torch.equal(nearest_tokens(*views, which.T.clone().T), expected)


def test_compiling_it_breaks_no_graph():
    def doubled(tokens, keyframe_tokens, which):
        return nearest_tokens(2.0 * tokens, keyframe_tokens, which) + 1

    arguments = clip(3, 40, 2, 50, 12)
    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), doubled(*arguments))


def test_the_operator_keeps_pytorch_s_rules():
    torch.library.opcheck(torch.ops.tokenflow.nearest_tokens.default, clip(3, 40, 2, 50, 12))


def test_flops_are_those_of_the_product():
    arguments = clip(3, 40, 2, 50, 12)
    with FlopCounterMode(display=False) as counter:
        nearest_tokens(*arguments)
    assert counter.get_total_flops() == 2 * 3 * 2 * 40 * 50 * 12


# ---------------------------------------------------------------- the Triton kernel

KERNEL_CASES = """
import torch
from tokenflow.ops import nearest

for m, length, k, keys, channels, slots, dtype in [
    (1, 1, 1, 1, 1, 1, torch.float32),
    (2, 37, 3, 70, 40, 2, torch.float32),
    (2, 130, 2, 129, 72, 3, torch.float16),
    (1, 200, 2, 65, 320, 2, torch.float32),
]:
    generator = torch.Generator().manual_seed(m * length)
    tokens = torch.randn((m, length, channels), generator=generator).to(dtype)
    keyframe_tokens = torch.randn((k, keys, channels), generator=generator).to(dtype)
    which = torch.randint(k, (m, slots), generator=generator)
    found = nearest._nearest_tokens_triton(tokens, keyframe_tokens, which)
    assert torch.equal(found, nearest.nearest_tokens_pytorch(tokens, keyframe_tokens, which))

# Equal tokens, also in different tiles of keys; a keyframe named twice; a token of zeros.
keyframe_tokens = torch.eye(4)[torch.arange(150).remainder(4)][None]
tokens = torch.cat([2 * torch.eye(4), torch.zeros(1, 4)])[None]
found = nearest._nearest_tokens_triton(tokens, keyframe_tokens, torch.zeros(1, 2).long())
assert found.tolist() == [[[0, 1, 2, 3, 0]] * 2], found
"""


def test_the_triton_kernel_on_its_interpreter():
    """In a process of its own: Triton decides what `jit` does when it is imported.

    Without bfloat16, whose products the interpreter computes of the bits as if of integers.
    """
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KERNEL_CASES], cwd=ROOT, env=environment, check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [66, 1008, 4096])
def test_the_triton_kernel_on_a_gpu(dtype, length):
    pytest.importorskip("triton")
    tokens, keyframe_tokens, which = (x.cuda() for x in clip(4, length, 3, length, 320))
    tokens, keyframe_tokens = tokens.to(dtype), keyframe_tokens.to(dtype)
    found = nearest._nearest_tokens_triton(tokens, keyframe_tokens, which)
    assert_nearest(found, tokens, keyframe_tokens, which)
    assert_nearest(
        nearest_tokens_pytorch(tokens, keyframe_tokens, which), tokens, keyframe_tokens, which
    )


def test_a_missing_triton_is_said(monkeypatch, caplog):
    monkeypatch.setattr(nearest, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert not nearest._triton_works.__wrapped__(torch.device("cuda"), torch.float16)
    assert "computed by PyTorch: Triton is not installed" in caplog.text
