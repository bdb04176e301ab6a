"""TokenFlow (Geyer et al., ICLR 2024, arXiv 2307.10373): the method.

From the paper to this file:

    Sec. 4.1, keyframes, one drawn at random in each interval    sample_keyframes
    Eq. 3-4, extended attention over all keyframes               extended_attention, attend
    Eq. 5, nearest neighbours gamma+- of source tokens           nearest_tokens
    Eq. 6-7, blend of the two neighbours' edited tokens          neighbours, blend, propagate
    Algorithm 1, one sampling step                               tokenflow_step
    PnP (Tumanyan et al. 2023), injected features and attention  FEATURE_LAYER, ATTENTION_LAYERS

Symbols: n frames, k keyframes, m frames of a pass, L tokens of a layer, c channels, B branches
(unconditional and conditional). A layer is named by its key in `unet.attn_processors`.

All that TokenFlow changes lies between a transformer block's norm1 and its residual add. An attn1
processor receives the self-attention's input tokens (phi in the paper) and returns its output
(what is propagated). `tokenflow_patch` puts one `TokenFlowAttention` on each of these layers and a
hook on PnP's convolution; all share one `TokenFlowContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

# PnP injects the output of this convolution ("layer 4" of the decoder) ...
FEATURE_LAYER = "up_blocks.1.resnets.1.conv2"
# ... and the queries and keys of decoder self-attention layers 4-11.
ATTENTION_LAYERS = tuple(
    f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.attn1.processor"
    for block, indices in ((1, (1, 2)), (2, (0, 1, 2)), (3, (0, 1, 2)))
    for index in indices
)


# ---------------------------------------------------------------------------------------------
# Keyframes (Sec. 4.1)


def sample_keyframes(n_frames: int, interval: int, generator: torch.Generator) -> Tensor:
    """Draws one keyframe in each interval of frames; the last interval may be short.

    If n_frames is a multiple of interval, the draws are those of the released code.

    Args:
        n_frames, interval: frames of the clip and per interval, >= 1.
        generator: on the CPU; its state advances.

    Returns:
        (k,) int64, ascending, k = ceil(n_frames / interval).
    """
    starts = torch.arange(0, n_frames, interval)
    whole, rest = divmod(n_frames, interval)
    offsets = torch.randint(interval, (whole,), generator=generator)
    if rest:
        offsets = torch.cat([offsets, torch.randint(rest, (1,), generator=generator)])
    return starts + offsets


def fixed_keyframes(n_frames: int, interval: int) -> Tensor:
    """The middle frame of each interval, (k,) int64: the ablation "w/o random keyframes"."""
    starts = torch.arange(0, n_frames, interval)
    lengths = (n_frames - starts).clamp(max=interval)
    return starts + lengths // 2


def keyframe_schedule(
    n_frames: int, interval: int, n_steps: int, seed: int, kind: str = "random"
) -> Tensor:
    """The keyframes of every sampling step, a pure function of its arguments.

    Args:
        kind: "random" (drawn again at each step) or "fixed" (the same at each step).

    Returns:
        (n_steps, k) int64.
    """
    if kind == "fixed":
        return fixed_keyframes(n_frames, interval).expand(n_steps, -1)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([sample_keyframes(n_frames, interval, generator) for _ in range(n_steps)])


# ---------------------------------------------------------------------------------------------
# Attention (Eq. 3-4)


def extended_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Self-attention in which the queries of every frame see the keys of all frames (Eq. 3-4).

    Args:
        query, key: (B or 1, f, L, heads, d) and (B or 1, f', L, heads, d); 1 serves every branch.
        value: (B, f', L, heads, d). With f = f' = 1 this is ordinary self-attention.
    """
    frames = query.shape[1]
    query, key, value = (
        x.expand(len(value), *x.shape[1:]).flatten(1, 2) for x in (query, key, value)
    )  # (B, f * L, heads, d)
    return dispatch_attention_fn(query, key, value).unflatten(1, (frames, -1))


def attend(
    attn: Attention, query_tokens: Tensor, key_tokens: Tensor, value_tokens: Tensor
) -> Tensor:
    """The output (B, f, L, c) of a self-attention layer whose frames attend to each other.

    The sampling loop computes the same in windows: tokenflow/editing/keyframe_windows.py.

    Args:
        query_tokens, key_tokens: (B or 1, f, L, c) and (B or 1, f', L, c); 1 serves every branch.
        value_tokens: (B, f', L, c).
    """
    query = to_heads(attn, attn.to_q, query_tokens)
    key, value = to_heads(attn, attn.to_k, key_tokens), to_heads(attn, attn.to_v, value_tokens)
    return from_heads(attn, extended_attention(query, key, value))


def attend_alone(attn: Attention, query_key_tokens: Tensor, value_tokens: Tensor) -> Tensor:
    """The output (B, m, L, c) of a self-attention layer whose frames see only themselves.

    Args:
        query_key_tokens: (B or 1, m, L, c); 1 serves every branch.
        value_tokens: (B, m, L, c).
    """
    branches = len(value_tokens)
    query, key, value = (
        # every frame of every branch is a group: (B * m, 1, L, heads, d)
        to_heads(attn, layer, tokens).expand(branches, *[-1] * 4).flatten(0, 1)[:, None]
        for layer, tokens in (
            (attn.to_q, query_key_tokens), (attn.to_k, query_key_tokens), (attn.to_v, value_tokens)
        )
    )  # fmt: skip
    output = extended_attention(query, key, value)
    return from_heads(attn, output.squeeze(1).unflatten(0, (branches, -1)))


def to_heads(attn: Attention, projection: nn.Module, tokens: Tensor) -> Tensor:
    """Projects tokens (..., L, c) to queries, keys or values (..., L, heads, d)."""
    return projection(tokens).unflatten(-1, (attn.heads, -1))


def from_heads(attn: Attention, output: Tensor) -> Tensor:
    """Projects the heads' outputs (..., L, heads, d) to the layer's (..., L, c)."""
    output = output.flatten(-2)
    for layer in attn.to_out:  # projection, dropout (idle in evaluation mode)
        output = layer(output)
    return output


# ---------------------------------------------------------------------------------------------
# Correspondences (Eq. 5) and propagation (Eq. 6-7)


def nearest_tokens(tokens: Tensor, keyframe_tokens: Tensor, which: Tensor) -> Tensor:
    """For each token of each frame, the most similar token (cosine) of its keyframes (Eq. 5).

    This is the definition; tokenflow/ops/nearest.py computes the same in tiles, in less memory.

    Args:
        tokens, keyframe_tokens: (m, L, c) and (k, L', c).
        which: (m, j) int64 in 0..k-1, the keyframes that each frame is compared with.

    Returns:
        (m, j, L) int64 in 0..L'-1.
    """
    queries = F.normalize(tokens.float(), dim=-1)
    keys = F.normalize(keyframe_tokens.float(), dim=-1)[which]  # (m, j, L', c)
    return (queries[:, None] @ keys.mT).argmax(dim=-1)


@dataclass(frozen=True)
class Neighbours:
    """The two keyframes i- and i+ that each of m frames is propagated from, and their weights.

    `which` are indices 0..k-1 into the keyframes; a frame with one neighbour has it as both.
    """

    which: Tensor  # (m, 2) int64, i- and i+
    weight: Tensor  # (m,) float32 in [0, 1], of i+; i- has the rest

    def to(self, device: torch.device) -> Neighbours:
        return Neighbours(self.which.to(device), self.weight.to(device))


def neighbours(frames: Tensor, keyframes: Tensor, weighting: str = "sigmoid") -> Neighbours:
    """The closest keyframe at or before each frame, the closest one after it, the weights (Eq. 7).

    w_i = sigmoid(d- / (d+ + d-)), with d+- the distances to the two keyframes in frames. A keyframe
    itself has d- = 0 and thus w_i = 0.5.

    Args:
        frames, keyframes: (m,) and (k,) frame numbers; keyframes ascend.
        weighting: "sigmoid", or "linear": d- / (d+ + d-).
    """
    after = torch.searchsorted(keyframes, frames, right=True)  # the first keyframe beyond a frame
    previous, next_ = (after - 1).clamp(min=0), after.clamp(max=len(keyframes) - 1)
    before_distance = (frames - keyframes[previous]).float()
    after_distance = (keyframes[next_] - frames).float()
    # Frames with one neighbour have previous == next: any weight gives that neighbour alone.
    weight = before_distance / (before_distance + after_distance).clamp(min=1.0)
    if weighting == "sigmoid":
        weight = torch.sigmoid(weight)
    weight = torch.where(previous == next_, 1.0, weight)
    return Neighbours(torch.stack([previous, next_], dim=1), weight)


def blend(previous: Tensor, next_: Tensor, weight: Tensor) -> Tensor:
    """weight * next + (1 - weight) * previous of (B, m, L, c), weight (m,) in [0, 1] (Eq. 6)."""
    return torch.lerp(previous, next_, weight.to(previous)[:, None, None])


def propagate(base: Tensor, where: Tensor, near: Neighbours) -> Tensor:
    """The output tokens (B, m, L, c) of frames, from the keyframes' output tokens (Eq. 6).

    F(T_base, i, p) = w_i * T_base[i+][gamma+(p)] + (1 - w_i) * T_base[i-][gamma-(p)].

    Args:
        base: T_base, (B, k, L, c).
        where: gamma- and gamma+ of m frames, (m, 2, L) int64.
        near: i-, i+ and w_i of m frames.
    """
    rows = base.flatten(1, 2)  # (B, k * L, c)
    chosen = near.which[..., None] * base.shape[2] + where  # (m, 2, L)
    previous, next_ = (
        rows.index_select(1, index.flatten()).unflatten(1, index.shape)  # (B, m, L, c)
        for index in chosen.unbind(dim=1)
    )
    return blend(previous, next_, near.weight)


# ---------------------------------------------------------------------------------------------
# Algorithm 1


class Pass(Enum):
    """What a forward of the patched UNet computes."""

    SOURCE = auto()  # source frames, ordinary attention; keeps their tokens and features
    MATCH = auto()  # source frames of a chunk; matched against the keyframes of SOURCE
    EXTENDED = auto()  # edited keyframes attend to each other; keeps their outputs: T_base
    PROPAGATE = auto()  # edited frames of a chunk: no attention, T_base at the matches of MATCH
    PER_FRAME = auto()  # edited frames on their own (consistency: none)
    FIRST_FRAME = auto()  # edited frames see the first of them alone (consistency: first_frame)


class Source(Protocol):
    """Supplies the source features of a step by filling a TokenFlowContext."""

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` and, if features are injected, `features` of frames (m,) at timestep t."""

    def load_chunk(self, t: int, frames: Tensor) -> None:
        """Fills `matches` of frames (m,) in `context.neighbours`' keyframes, and `features`."""


def tokenflow_step(
    edit: Callable[[Tensor, int, Tensor], Tensor],
    source: Source,
    context: TokenFlowContext,
    x: Tensor,
    t: int,
    keyframes: Tensor,
    chunks: Sequence[Tensor],
    find_neighbours: Callable[[Tensor, Tensor], Neighbours],
) -> Tensor:
    """Algorithm 1, one sampling step: the guided noise of every frame, (n, 4, h, w).

    `EditSession.edit_latents` (tokenflow/editing/loop.py) calls it and chooses the arguments.

    Args:
        edit: eps(x, t, frames) of the patched UNet under the edit's prompt, with guidance.
        source: loads phi(x_t), gamma+- and the features that PnP injects into `context`.
        x, t: (n, 4, h, w) latents J_t at timestep t.
        keyframes: (k,) frame numbers.
        chunks: frame numbers (m,) of each chunk; frames in no chunk keep an undefined noise.
        find_neighbours: `neighbours`, on the UNet's device.
    """
    eps = torch.empty_like(x)
    source.load_keyframes(t, keyframes)  # phi(x_t^i) of the keyframes
    context.mode = Pass.EXTENDED
    edit(x[keyframes], t, keyframes)  # Eq. 3-4: T_base
    for chunk in chunks:
        context.neighbours = find_neighbours(chunk, keyframes)  # i+, i- and w_i of Eq. 7
        source.load_chunk(t, chunk)  # Eq. 5: gamma+-
        context.mode = Pass.PROPAGATE
        eps[chunk] = edit(x[chunk], t, chunk)  # Eq. 6
    return eps


# ---------------------------------------------------------------------------------------------
# The patch


@dataclass
class TokenFlowContext:
    """The state of a run that its processors share; layers by their names."""

    # Set by the sampling loop.
    mode: Pass = Pass.SOURCE
    branches: int = 1  # B of edit passes, batched (B * m, ...); source passes have one
    inject_attention: bool = False  # PnP: queries and keys are the source's
    inject_features: bool = False  # PnP: the features of FEATURE_LAYER are the source's
    neighbours: Neighbours | None = None  # of the chunk's frames, on the UNet's device
    propagate_source: bool = False  # `propagation: released`: MATCH passes propagate too
    keep_base: bool = True  # whether EXTENDED passes keep their outputs
    keep_matched_tokens: bool = False  # whether MATCH passes keep their tokens
    # Eq. 5; None if the source fills `matches` itself.
    nearest: Callable[[Tensor, Tensor, Tensor], Tensor] | None = nearest_tokens
    # Eq. 3-4 for all keyframes of an EXTENDED pass.
    attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor] = attend
    # Eq. 6; a source whose `matches` are no single tokens brings its own.
    propagate: Callable[..., Tensor] = propagate
    # With several processes, SOURCE and EXTENDED passes compute this process's keyframes: `shard`
    # takes their part of (k, ...) along `dim`, `gather` is the inverse.
    shard: Callable[..., Tensor] = lambda x, dim=0: x
    gather: Callable[..., Tensor] = lambda x, dim=0: x

    # Filled by the processors, or by the source from its cache.
    tokens: dict[str, Tensor] = field(default_factory=dict)  # phi of SOURCE, (k, L, c)
    features: Tensor | None = None  # of the last source pass, (m, C, h, w)
    source_base: dict[str, Tensor] = field(default_factory=dict)  # outputs of SOURCE, (1, k, L, c)
    base: dict[str, Tensor] = field(default_factory=dict)  # T_base of EXTENDED, (B, k, L, c)
    matches: dict[str, Tensor] = field(default_factory=dict)  # gamma-, gamma+ of MATCH, (m, 2, L)
    matched_tokens: dict[str, Tensor] = field(default_factory=dict)  # phi of MATCH, (m, L, c)


class TokenFlowAttention:
    """The attention processor of the self-attention layer with key `layer`."""

    def __init__(self, layer: str, context: TokenFlowContext) -> None:
        self.layer, self.context = layer, context
        self.injectable = layer in ATTENTION_LAYERS

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The self-attention's output, (B * m, L, c), for its input tokens of that shape."""
        context, layer = self.context, self.layer
        if context.mode is Pass.SOURCE:
            return self._source(attn, hidden_states)
        if context.mode is Pass.MATCH:
            return self._match(attn, hidden_states)
        tokens = hidden_states.unflatten(0, (context.branches, -1))  # (B, m, L, c)
        match context.mode:
            case Pass.EXTENDED:
                output = self._extended(attn, tokens)
            case Pass.PROPAGATE:
                base, matches = context.base[layer], context.matches[layer]
                output = context.propagate(base, matches, context.neighbours)
            case Pass.PER_FRAME:
                output = attend_alone(attn, self._query_key_tokens(tokens), tokens)
            case Pass.FIRST_FRAME:
                query_key = self._query_key_tokens(tokens)
                output = attend(attn, query_key, query_key[:, :1], tokens[:, :1])
        return output.flatten(0, 1)

    def _source(self, attn: Attention, tokens: Tensor) -> Tensor:
        context = self.context
        context.tokens[self.layer] = context.gather(tokens)
        output = attend_alone(attn, tokens[None], tokens[None])
        if context.propagate_source:
            context.source_base[self.layer] = context.gather(output, dim=1)
        return output[0]

    def _match(self, attn: Attention, tokens: Tensor) -> Tensor:
        context, near = self.context, self.context.neighbours
        if context.keep_matched_tokens:
            context.matched_tokens[self.layer] = tokens
        if context.nearest is not None:
            matches = context.nearest(tokens, context.tokens[self.layer], near.which)
            context.matches[self.layer] = matches  # (m, 2, L)
        if context.propagate_source:
            base, where = context.source_base[self.layer], context.matches[self.layer]
            return propagate(base, where, near)[0]
        return attend_alone(attn, tokens[None], tokens[None])[0]

    def _extended(self, attn: Attention, tokens: Tensor) -> Tensor:
        context = self.context
        tokens = context.gather(tokens, dim=1)  # (B, k, L, c)
        query_key = self._query_key_tokens(tokens)
        output = context.attend(attn, query_key, query_key, tokens)  # (B, k, L, c)
        if context.keep_base:
            context.base[self.layer] = output
        return context.shard(output, dim=1)

    def _query_key_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens of queries and keys; under PnP's injection the source's, (1, m, L, c)."""
        if self.injectable and self.context.inject_attention:
            return self.context.tokens[self.layer][None]
        return tokens


def self_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """The names of a UNet's self-attention layers, from the input to the output."""
    return [key for key in unet.attn_processors if key.endswith(".attn1.processor")]


@contextmanager
def tokenflow_patch(
    unet: UNet2DConditionModel, context: TokenFlowContext, backend: str = "native"
) -> Iterator[TokenFlowContext]:
    """Puts TokenFlow's processors and hook on a UNet; leaving restores the UNet exactly.

    Args:
        unet: with Stable Diffusion's block structure; changed in place.
        context: read and filled by the processors.
        backend: name of a diffusers attention backend: native, xformers, flash, ...

    Raises:
        RuntimeError: if the UNet is already patched, or the backend cannot be used here.
    """
    original = unet.attn_processors
    if any(isinstance(processor, TokenFlowAttention) for processor in original.values()):
        raise RuntimeError("this UNet is already patched by TokenFlow")
    ours = {layer: TokenFlowAttention(layer, context) for layer in self_attention_layers(unet)}

    with ExitStack() as undo:
        undo.enter_context(attention_backend(backend))
        # set_attn_processor empties the dict that it is given.
        undo.callback(unet.set_attn_processor, dict(original))
        unet.set_attn_processor({**original, **ours})
        layer = dict(unet.named_modules()).get(FEATURE_LAYER)
        if layer is not None:  # else PnP refuses this UNet; other techniques inject nothing
            handle = layer.register_forward_hook(partial(_inject_features, context))
            undo.callback(handle.remove)
        yield context


def _inject_features(
    context: TokenFlowContext, module: nn.Module, args: tuple, output: Tensor
) -> Tensor | None:
    """PnP's forward hook: keeps the source's features and replaces those of the edit by them."""
    if not context.inject_features:
        return None
    if context.mode in (Pass.SOURCE, Pass.MATCH):
        context.features = output
        return None
    return context.features.repeat(context.branches, 1, 1, 1)


# ---------------------------------------------------------------------------------------------
# propagation: released


def released_neighbours(frames: Tensor, interval: int) -> Neighbours:
    """The neighbours and weights of the published code, which differ from the paper's.

    A frame of interval b mixes the keyframes of intervals b - 1 and b, wherever they lie (b = 0:
    its own alone), by its distances to the intervals' centres b*B + B//2:
    w_own = sigmoid(d_prev / (d_own + d_prev)).

    Args: frames: (m,) frame numbers; interval: B, frames per interval.
    """
    own = frames // interval
    previous = (own - 1).clamp(min=0)
    own_distance = (frames - (own * interval + interval // 2)).abs().float()
    previous_distance = (frames - (previous * interval + interval // 2)).abs().float()
    weight = torch.sigmoid(previous_distance / (own_distance + previous_distance).clamp(min=1.0))
    weight = torch.where(previous == own, 1.0, weight)
    return Neighbours(torch.stack([previous, own], dim=1), weight)
