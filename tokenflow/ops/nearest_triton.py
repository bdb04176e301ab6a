"""The Triton kernel of nearest.py: product and arg-max in one, for CUDA.

Imported only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 128 queries x 64 keys are large enough for the matrix units, and small enough that similarities
# lie in registers (32 a thread) and three stages of loads in shared memory (48 KiB, on Hopper 72).
QUERIES, KEYS, CHANNEL_BYTES = 128, 64, 128
WARPS, STAGES = 8, 3


def nearest_tokens(
    tokens: Tensor, keyframe_tokens: Tensor, inverse_norms: Tensor, which: Tensor
) -> Tensor:
    """`nearest.nearest_tokens` of tensors on one CUDA device; waits for nothing.

    Args:
        inverse_norms: 1 / |token| of keyframe_tokens, (k, L') float32.
    """
    tokens, keyframe_tokens = tokens.contiguous(), keyframe_tokens.contiguous()
    (m, length, channels), keys, slots = tokens.shape, keyframe_tokens.shape[1], which.shape[1]
    found = torch.empty((m, slots, length), dtype=torch.long, device=tokens.device)
    grid = (triton.cdiv(length, QUERIES), m * slots)
    # Triton launches on the current device.
    with torch.cuda.device_of(tokens):
        nearest_kernel[grid](
            tokens,
            keyframe_tokens,
            inverse_norms,
            which.contiguous(),
            found,
            length,
            keys,
            channels,
            slots,
            QUERIES=QUERIES,
            KEYS=KEYS,
            CHANNELS=CHANNEL_BYTES // tokens.element_size(),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return found


@triton.jit
def nearest_kernel(
    tokens,  # (m, length, channels)
    keyframe_tokens,  # (k, n_keys, channels)
    inverse_norms,  # (k, n_keys) float32
    which,  # (m, slots) int64
    found,  # (m, slots, length) int64
    length,
    n_keys,
    channels,
    slots,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of a frame's tokens against all tokens of one of the frame's keyframes."""
    frame = tl.program_id(1) // slots
    slot = tl.program_id(1) % slots
    frame = frame.to(tl.int64)  # offsets may pass 2^31
    keyframe = tl.load(which + frame * slots + slot)
    named_before = 0
    for earlier in range(0, slot):
        same = tl.load(which + frame * slots + earlier) == keyframe
        named_before += same.to(tl.int32)

    if named_before == 0:
        rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        query_rows = tokens + (frame * length + rows[:, None]) * channels
        best = tl.full([QUERIES], float("-inf"), tl.float32)
        nearest = tl.zeros([QUERIES], tl.int32)
        for start in range(0, n_keys, KEYS):
            columns = start + tl.arange(0, KEYS)
            key_columns = keyframe_tokens + (keyframe * n_keys + columns[None, :]) * channels
            similarity = products(
                query_rows, key_columns, rows < length, columns < n_keys, channels,
                QUERIES, KEYS, CHANNELS,
            )  # fmt: skip
            scale = tl.load(
                inverse_norms + keyframe * n_keys + columns, mask=columns < n_keys, other=0.0
            )
            similarity = similarity * scale[None, :]
            similarity = tl.where(columns[None, :] < n_keys, similarity, float("-inf"))
            value, place = tl.max(
                similarity, axis=1, return_indices=True, return_indices_tie_break_left=True
            )
            better = value > best  # not >=: of equals, the first
            nearest = tl.where(better, start + place.to(tl.int32), nearest)
            best = tl.where(better, value, best)
        for later in range(slot, slots):
            if tl.load(which + frame * slots + later) == keyframe:
                tl.store(
                    found + (frame * slots + later) * length + rows,
                    nearest.to(tl.int64),
                    mask=rows < length,
                )


@triton.jit
def products(
    query_rows,  # (QUERIES, 1) pointers to the first channel
    key_columns,  # (1, KEYS) pointers to the first channel
    valid_queries,  # (QUERIES,) bool
    valid_keys,  # (KEYS,) bool
    channels,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The inner products of a tile, (QUERIES, KEYS) float32; 0 where one is not valid."""
    similarity = tl.zeros([QUERIES, KEYS], tl.float32)
    for first_channel in range(0, channels, CHANNELS):
        channel = first_channel + tl.arange(0, CHANNELS)
        query = tl.load(
            query_rows + channel[None, :],
            mask=valid_queries[:, None] & (channel[None, :] < channels),
            other=0.0,
        )
        key = tl.load(
            key_columns + channel[:, None],
            mask=valid_keys[None, :] & (channel[:, None] < channels),
            other=0.0,
        )
        # "ieee": float32 is not rounded to TF32's 10 bits. Other dtypes ignore it.
        similarity = tl.dot(query, key, similarity, input_precision="ieee")
    return similarity
