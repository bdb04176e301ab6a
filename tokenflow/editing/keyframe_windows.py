"""Extended attention over very many keyframes: in windows, and shared between processes.

The paper's Eq. 3-4 let every keyframe attend to all keyframes, which takes time that grows with the
square of their number. A bound on the keyframes that each one sees (`max_keyframes`) is not in the
paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from tokenflow.ops.distributed import Shard
from tokenflow_utils import extended_attention, from_heads, to_heads


@dataclass(frozen=True)
class Window:
    """Some keyframes, and those that they attend to."""

    queries: slice  # of 0..k-1
    seen: Tensor | slice  # (s,) int64 indices in 0..k-1, or their range


def keyframe_windows(
    n_keyframes: int, max_keyframes: int | None = None, at_once: int | None = None
) -> list[Window]:
    """Which keyframes each keyframe attends to: all of them, or at most max_keyframes.

    With a bound, every window sees the same anchors, a quarter of what it may see, spread evenly
    over the clip: they keep one appearance through the clip. The rest are neighbours in time, the
    middle half of which are the window's queries, so that windows overlap. Time then grows with k
    instead of its square.

    Args:
        n_keyframes: k.
        max_keyframes: >= 2, or None for the paper's Eq. 3-4. A bound of k or more has no effect.
        at_once: upper bound of the queries of a window; bounds memory, changes no result.

    Returns:
        windows whose queries are 0..k-1 in order, each once.
    """
    everyone = slice(0, n_keyframes)
    if max_keyframes is None or max_keyframes >= n_keyframes:
        return [Window(queries, everyone) for queries in _split(everyone, at_once)]
    n_anchors = max(1, max_keyframes // 4)
    anchors = torch.linspace(0, n_keyframes - 1, n_anchors + 2)[1:-1].round().long()
    span = max_keyframes - n_anchors
    windows = []
    for block in _split(everyone, max(1, span // 2)):
        start = (block.start + block.stop - span) // 2
        start = min(max(start, 0), n_keyframes - span)
        seen = torch.cat([anchors, torch.arange(start, start + span)]).unique()
        windows += [Window(queries, seen) for queries in _split(block, at_once)]
    return windows


def _split(span: slice, size: int | None) -> list[slice]:
    """A range in chunks of `size` at most."""
    starts = range(span.start, span.stop, size or max(1, span.stop - span.start))
    return [slice(start, min(start + starts.step, span.stop)) for start in starts]


class WindowedAttention:
    """`tokenflow_utils.attend` of the keyframes, window by window; a TokenFlowContext's `attend`.

    Args:
        windows: of all keyframes.
        device: the UNet's.
        shard: this process's keyframes; each process computes its own queries.
    """

    def __init__(self, windows: list[Window], device: torch.device, shard: Shard) -> None:
        self.shard, own = shard, shard.local
        self.windows = []
        for window in windows:
            first = max(window.queries.start, own.start)
            stop = min(window.queries.stop, own.stop)
            if first < stop:
                seen = window.seen
                seen = seen.to(device) if isinstance(seen, Tensor) else seen
                self.windows.append(Window(slice(first, stop), seen))

    def __call__(
        self, attn: Attention, query_tokens: Tensor, key_tokens: Tensor, value_tokens: Tensor
    ) -> Tensor:
        """The outputs (B, k, L, c) of all keyframes; arguments are those of `attend`."""
        key, value = to_heads(attn, attn.to_k, key_tokens), to_heads(attn, attn.to_v, value_tokens)
        outputs = []
        for window in self.windows:
            query = to_heads(attn, attn.to_q, query_tokens[:, window.queries])
            output = extended_attention(query, key[:, window.seen], value[:, window.seen])
            outputs.append(from_heads(attn, output))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.shard.gather(output, dim=1)
