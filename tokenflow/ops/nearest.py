"""Nearest neighbours of source tokens (Eq. 5 of TokenFlow), the bottleneck of a live edit.

For m frames of L tokens and keyframes of L' tokens, a layer takes 2 * L * L' * c floating-point
operations and L * L' similarities for each frame and neighbour. To save memory the product is
computed in tiles, and only each tile's largest similarity and its index are kept: by a Triton
kernel on CUDA (nearest_triton.py), else by PyTorch.

The similarity is the cosine, except that queries are not normalised: a query's norm scales all of
its similarities equally, and does not change the largest.

Symbols: m frames, k keyframes, L and L' tokens of a frame and of a keyframe, c channels, j
neighbours of a frame.
"""

from __future__ import annotations

import logging
import subprocess
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

log = logging.getLogger("tokenflow")

# Similarities of a tile. On the CPU a tile fits in the caches: 2 MiB in float32, 4 MiB for many
# channels, where reading the keys once for more queries gains more. On a GPU it is large enough to
# occupy it, 64 MiB. With few keys, more than CPU_QUERIES rows would leave the cache.
TILE_KEYS = 4096
CPU_TILE, CPU_TILE_LONG, GPU_TILE = 1 << 19, 1 << 20, 1 << 24
CPU_QUERIES = 1024
LONG_PRODUCT = 128  # channels
# Up to this number of keys PyTorch's arg-max over a whole row is faster than two levels.
FEW_KEYS = 128


@torch.library.custom_op("tokenflow::nearest_tokens", mutates_args=())
def nearest_tokens(
    tokens: torch.Tensor, keyframe_tokens: torch.Tensor, which: torch.Tensor
) -> torch.Tensor:
    """For each token of each frame, the most similar token (cosine) of each of its keyframes.

    A custom operator of PyTorch: torch.compile keeps it as one node, and `FlopCounterMode` counts
    its product. It has no gradient.

    Args:
        tokens: (m, L, c), of any floating dtype; similarities are summed in float32.
        keyframe_tokens: (k, L', c), the same dtype and device.
        which: (m, j) int64 in 0..k-1, the keyframes that each frame is compared with; a keyframe
            named twice for a frame is compared once.

    Returns:
        (m, j, L) int64 in 0..L'-1; of equally similar tokens, the first.

    Source: Eq. 5.
    """
    if tokens.device.type == "cuda" and _triton_works(tokens.device, tokens.dtype):
        return _nearest_tokens_triton(tokens, keyframe_tokens, which)
    return nearest_tokens_pytorch(tokens, keyframe_tokens, which)


@nearest_tokens.register_fake
def _(tokens: Tensor, keyframe_tokens: Tensor, which: Tensor) -> Tensor:
    return which.new_empty((*which.shape, tokens.shape[1]))


@register_flop_formula(torch.ops.tokenflow.nearest_tokens)
def nearest_tokens_flop(tokens_shape, keyframe_tokens_shape, which_shape, *_, **__) -> int:
    """2 * m * j * L * L' * c: what naming no keyframe twice costs."""
    (m, length, channels), keys, j = tokens_shape, keyframe_tokens_shape[1], which_shape[1]
    return 2 * m * j * length * keys * channels


@cache
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is installed and can build a kernel for this; if not, the log says so once.

    Not every build of PyTorch brings Triton, and Triton needs a C compiler and Python's headers.
    For GPUs before compute capability 8.0 it uses no matrix units, and PyTorch does.
    """
    if find_spec("triton") is None:
        log.info("nearest neighbours are computed by PyTorch: Triton is not installed")
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        log.info("nearest neighbours are computed by PyTorch: the GPU is too old for Triton")
        return False
    from triton.errors import TritonError

    probe = torch.ones(1, 1, 1, device=device, dtype=dtype)
    try:
        _nearest_tokens_triton(probe, probe, torch.zeros_like(probe[0], dtype=torch.long))
    except (
        TritonError, RuntimeError, OSError, subprocess.CalledProcessError,
    ) as error:  # fmt: skip
        log.warning(
            "nearest neighbours are computed by PyTorch, which is slower: Triton builds no kernel "
            "here (%s)",
            str(error).splitlines()[0],
        )
        return False
    return True


def _nearest_tokens_triton(tokens: Tensor, keyframe_tokens: Tensor, which: Tensor) -> Tensor:
    # Importing it needs Triton, which not every build of PyTorch brings.
    from tokenflow.ops import nearest_triton

    norms = inverse_norms(keyframe_tokens)
    return nearest_triton.nearest_tokens(tokens, keyframe_tokens, norms, which)


# ---------------------------------------------------------------------------------------------
# With PyTorch


def nearest_tokens_pytorch(tokens: Tensor, keyframe_tokens: Tensor, which: Tensor) -> Tensor:
    """`nearest_tokens` on any device: one tiled product for each keyframe in `which`.

    Synchronises on CUDA, to read `which`.
    """
    length = tokens.shape[1]
    found = torch.empty((*which.shape, length), dtype=torch.long, device=tokens.device)
    for keyframe in which.unique():
        named = which == keyframe  # (m, j)
        times = named.sum(dim=1)
        queries = tokens[times > 0].flatten(0, 1).float()
        rows = _nearest_rows(queries, normalised(keyframe_tokens[keyframe]))
        found[named] = rows.unflatten(0, (-1, length)).repeat_interleave(times[times > 0], dim=0)
    return found


def normalised(tokens: Tensor) -> Tensor:
    """Tokens (..., c) of norm 1, float32; a zero token stays zero.

    In half precision most similarities of adjacent frames would round to the same few values.
    """
    return tokens.float() * inverse_norms(tokens)[..., None]


def inverse_norms(tokens: Tensor) -> Tensor:
    """1 / |token| of tokens (..., c), float32; finite for a zero token."""
    norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
    return norms.clamp_min(1e-12).reciprocal()


def _nearest_rows(queries: Tensor, keys: Tensor) -> Tensor:
    """The row of keys (L', c) with the largest product with each of queries (n, c): (n,) int64."""
    if len(keys) <= FEW_KEYS:
        return (queries @ keys.T).argmax(dim=1)
    tile_keys = min(len(keys), TILE_KEYS)
    block = round(tile_keys**0.5)
    blocks = -(-tile_keys // block)
    bound, most_queries = GPU_TILE, len(queries)
    if queries.device.type == "cpu":
        bound = CPU_TILE_LONG if queries.shape[1] >= LONG_PRODUCT else CPU_TILE
        most_queries = min(most_queries, CPU_QUERIES)
    tile_queries = min(most_queries, bound // (blocks * block))
    memory = queries.new_empty(blocks * block * tile_queries)

    found = []
    for some_queries in queries.split(tile_queries):
        tile = memory[: blocks * block * len(some_queries)].view(blocks, block, len(some_queries))
        best, nearest = _best_of_tile(some_queries, keys[:tile_keys], tile)
        for start in range(tile_keys, len(keys), tile_keys):
            value, place = _best_of_tile(some_queries, keys[start : start + tile_keys], tile)
            better = value > best  # not >=: of equals, the first
            nearest = torch.where(better, place + start, nearest)
            best = torch.where(better, value, best)
        found.append(nearest)
    return torch.cat(found)


def _best_of_tile(queries: Tensor, keys: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """The largest product of each query with a few keys, and the key's row, both (n,).

    PyTorch's arg-max on the CPU looks at one number at a time, but its maximum at a vector's worth.
    So the maximum of each block of keys is taken first, then the best block, then its best row.
    `tile` is memory to work in, (blocks, block, n), for keys (L', c) with L' <= blocks * block.
    """
    _, block, n = tile.shape
    products = tile.view(-1, n)
    torch.mm(keys, queries.T, out=products[: len(keys)])  # keys first: neighbours in memory are
    products[len(keys) :] = -torch.inf  # queries, which the maxima are vectorised over
    best, best_block = tile.amax(dim=1).max(dim=0)
    rows = tile.gather(0, best_block.expand(1, block, n))[0].argmax(dim=0)
    return best, best_block * block + rows
