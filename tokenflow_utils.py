"""TokenFlow (Geyer et al., ICLR 2024, arXiv 2307.10373): the method.

From the paper to this file:

    Sec. 4.1, keyframes, one drawn at random in each interval    sample_keyframes
    Eq. 3-4, extended attention over all keyframes               extended_attention
    Eq. 5, nearest neighbours gamma+- of source tokens           nearest.nearest_tokens
    Eq. 6-7, blend of the two neighbours' edited tokens          neighbours, blend, propagate
    (ours) joint attention of very many keyframes, in windows    keyframe_windows
    PnP (Tumanyan et al. 2023), injected features and attention  FEATURE_LAYER, ATTENTION_LAYERS

Symbols: n frames, k keyframes, m frames of a pass, L tokens of a layer, c channels, B branches
(unconditional and conditional). A layer is named by its key in `unet.attn_processors`.

All that TokenFlow changes lies between a transformer block's norm1 and its residual add. That is
what an attn1 processor is given (the self-attention's input tokens, phi in the paper) and returns
(the self-attention's output, which is what propagates). `tokenflow_patch` puts one
`TokenFlowAttention` on each of these layers, all of which share a `TokenFlowContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tokenflow.ops.distributed import ALONE, Share
from tokenflow.ops.nearest import nearest_tokens

# PnP injects the output of this convolution ("layer 4" of the decoder) ...
FEATURE_LAYER = "up_blocks.1.resnets.1.conv2"
# ... and the queries and keys of decoder self-attention layers 4-11.
ATTENTION_LAYERS = tuple(
    f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.attn1.processor"
    for block, indices in ((1, (1, 2)), (2, (0, 1, 2)), (3, (0, 1, 2)))
    for index in indices
)


# ---------------------------------------------------------------------------------------------
# Keyframes and neighbours


def sample_keyframes(n_frames: int, interval: int, generator: torch.Generator) -> Tensor:
    """Draws one keyframe in each interval of frames, the last of which may be short.

    For n_frames a multiple of interval, the draws are the released code's.

    Args:
        n_frames: frames of the clip, >= 1.
        interval: frames per interval, >= 1.
        generator: a CPU generator; its state advances.

    Returns:
        (k,) int64, ascending, k = ceil(n_frames / interval).

    Source: Sec. 4.2, "random keyframes".
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
        kind: "random" (drawn anew at each step) or "fixed" (the same at each step).

    Returns:
        (n_steps, k) int64.
    """
    if kind == "fixed":
        return fixed_keyframes(n_frames, interval).expand(n_steps, -1)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([sample_keyframes(n_frames, interval, generator) for _ in range(n_steps)])


@dataclass(frozen=True)
class Neighbours:
    """The two keyframes that each frame of a chunk is made from, and how they mix.

    Attributes:
        previous, next: (m,) int64, which keyframe (0..k-1, not a frame number). Where a frame has
            only one neighbour, both name it.
        weight: (m,) float32 in [0, 1], the weight of `next`; `previous` has the rest.
    """

    previous: Tensor
    next: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Neighbours:
        """The same on another device."""
        return Neighbours(*(x.to(device) for x in (self.previous, self.next, self.weight)))


def neighbours(frames: Tensor, keyframes: Tensor, blend: str = "sigmoid") -> Neighbours:
    """The closest keyframe at or before each frame, the closest one after it, and the weights.

    w_i = sigmoid(d- / (d+ + d-)), d+- the distances to the two keyframes in frames; `blend`
    "linear" leaves the sigmoid out.

    Args:
        frames: (m,) frame numbers.
        keyframes: (k,) frame numbers, ascending.
        blend: "sigmoid" or "linear".

    Source: Eq. 6-7.
    """
    after = torch.searchsorted(keyframes, frames, right=True)  # the first keyframe beyond a frame
    previous, next_ = (after - 1).clamp(min=0), after.clamp(max=len(keyframes) - 1)
    before_distance = (frames - keyframes[previous]).float()
    after_distance = (keyframes[next_] - frames).float()
    # Frames with one neighbour have previous == next: any weight gives that neighbour alone.
    weight = before_distance / (before_distance + after_distance).clamp(min=1.0)
    if blend == "sigmoid":
        weight = torch.sigmoid(weight)
    return Neighbours(previous, next_, torch.where(previous == next_, 1.0, weight))


def released_neighbours(frames: Tensor, interval: int) -> Neighbours:
    """The neighbours and weights of the published code, which differ from its paper's.

    A frame of interval b mixes the keyframes of intervals b - 1 and b, wherever these lie (b = 0:
    its own alone), by its distances to the intervals' centres b*B + B//2:
    w_own = sigmoid(d_prev / (d_own + d_prev)).

    Args:
        frames: (m,) frame numbers.
        interval: B, frames per interval.
    """
    own = frames // interval
    previous = (own - 1).clamp(min=0)
    own_distance = (frames - (own * interval + interval // 2)).abs().float()
    previous_distance = (frames - (previous * interval + interval // 2)).abs().float()
    weight = torch.sigmoid(previous_distance / (own_distance + previous_distance).clamp(min=1.0))
    return Neighbours(previous, own, torch.where(previous == own, 1.0, weight))


@dataclass(frozen=True)
class Window:
    """Some keyframes, and those that they attend to.

    Attributes:
        queries: a range of 0..k-1.
        seen: (s,) int64 numbers in 0..k-1, or None: all keyframes.
    """

    queries: slice
    seen: Tensor | None = None

    def to(self, device: torch.device) -> Window:
        """The same on another device."""
        return Window(self.queries, self.seen if self.seen is None else self.seen.to(device))


def keyframe_windows(
    n_keyframes: int, max_keyframes: int | None = None, at_once: int | None = None
) -> list[Window]:
    """Which keyframes each keyframe attends to: all of them, or at most max_keyframes.

    With a bound, every window sees the same anchors, a quarter of what it may see, spread evenly
    over the clip: they carry one appearance through it. The rest are neighbours in time, the middle
    half of which are the window's queries, so that windows overlap. Time then grows with k instead
    of its square.

    Args:
        n_keyframes: k.
        max_keyframes: >= 2, or None for the paper's Eq. 3-4. A bound of k or more is none.
        at_once: the most queries of a window; bounds memory, changes no result.

    Returns:
        windows whose queries are 0..k-1 in order, each once.
    """
    everyone = slice(0, n_keyframes)
    if max_keyframes is None or max_keyframes >= n_keyframes:
        return [Window(queries) for queries in _split(everyone, at_once)]
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


def windows_of(windows: Sequence[Window], own: slice) -> list[Window]:
    """The windows of a range of the keyframes, whose queries are counted from its start."""
    parts = []
    for window in windows:
        first = max(window.queries.start, own.start)
        end = min(window.queries.stop, own.stop)
        if first < end:
            parts.append(Window(slice(first - own.start, end - own.start), window.seen))
    return parts


def _split(span: slice, size: int | None) -> list[slice]:
    """A range in pieces of `size` at most."""
    starts = range(span.start, span.stop, size or max(1, span.stop - span.start))
    return [slice(start, min(start + starts.step, span.stop)) for start in starts]


# ---------------------------------------------------------------------------------------------
# Correspondences and propagation


@dataclass(frozen=True)
class Correspondence:
    """For each token of m frames, its counterpart in the frame's two neighbours: (m, L) int64."""

    previous: Tensor
    next: Tensor


def flow_tokens(flow: Tensor, grid: tuple[int, int]) -> Tensor:
    """Correspondences of a layer's tokens by optical flow: the token that a token's cell moves to.

    Args:
        flow: (m, 2, H, W) displacement in pixels (x, y) from each frame to its keyframe.
        grid: (h, w) of the layer, h * w = L.

    Returns:
        (m, L) int64, clamped to the grid.
    """
    h, w = grid
    scale = torch.tensor([w / flow.shape[-1], h / flow.shape[-2]])
    cells = F.interpolate(flow, grid, mode="area") * scale[:, None, None]  # in cells
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x = (x + cells[:, 0]).round().clamp(0, w - 1).long()
    y = (y + cells[:, 1]).round().clamp(0, h - 1).long()
    return (y * w + x).flatten(1)


def blend(previous: Tensor, next_: Tensor, weight: Tensor) -> Tensor:
    """w * next + (1 - w) * previous, with one weight per frame.

    Args:
        previous, next_: (B, m, L, c).
        weight: (m,) in [0, 1].

    Source: Eq. 6.
    """
    return torch.lerp(previous, next_, weight.to(previous)[:, None, None])


def propagate(base: Tensor, where: Correspondence, near: Neighbours) -> Tensor:
    """The output tokens of a chunk's frames, taken from the keyframes' output tokens.

    F(T_base, i, p) = w_i * T_base[i+][gamma+(p)] + (1 - w_i) * T_base[i-][gamma-(p)].

    Args:
        base: T_base, (B, k, L, c).
        where: gamma+- of m frames.
        near: the neighbours of these frames.

    Returns:
        (B, m, L, c).

    Source: Eq. 6.
    """

    n_tokens = base.shape[2]
    rows = base.flatten(1, 2)  # (B, k * L, c)

    def gather(keyframes: Tensor, index: Tensor) -> Tensor:
        chosen = keyframes[:, None] * n_tokens + index  # (m, L)
        return rows.index_select(1, chosen.flatten()).unflatten(1, index.shape)

    return blend(gather(near.previous, where.previous), gather(near.next, where.next), near.weight)


def extended_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Self-attention in which the queries of every frame see the keys of all frames.

    Args:
        query, key: (B or 1, f, L, heads, d) and (B or 1, f', L, heads, d); 1 serves every branch.
        value: (B, f', L, heads, d): the frames that are seen.

    Returns:
        (B, f, L, heads, d). With f = f' = 1 this is ordinary self-attention.

    Source: Eq. 3-4.
    """
    frames = query.shape[1]
    query, key, value = (
        x.expand(len(value), *x.shape[1:]).flatten(1, 2) for x in (query, key, value)
    )  # (B, f * L, heads, d)
    return dispatch_attention_fn(query, key, value).unflatten(1, (frames, -1))


# ---------------------------------------------------------------------------------------------
# The patch


class Pass(Enum):
    """What a forward of the patched UNet is for."""

    SOURCE = auto()  # source frames, ordinary attention; their tokens and features are kept
    MATCH = auto()  # source frames of a chunk; matched against the keyframes kept by SOURCE
    EXTENDED = auto()  # edited keyframes attend to each other; their outputs are kept: T_base
    PROPAGATE = auto()  # edited frames of a chunk: no attention, T_base at the matches of MATCH
    PER_FRAME = auto()  # edited frames on their own (consistency: none)
    FIRST_FRAME = auto()  # edited frames see the first of them alone (consistency: first_frame)


@dataclass
class TokenFlowContext:
    """The state of a run that its processors share.

    The sampling loop sets the fields of the first group; the processors fill the others, each
    under its layer's name.

    Attributes:
        mode: what the next forward is for.
        branches: text branches of edit passes, batched (B * m, ...); source passes have one.
        inject_attention: whether PnP's queries and keys come from the source at this step.
        inject_features: whether PnP's convolution features do.
        propagate_source: whether the source pass of a chunk is made of propagated tokens too
            (`propagation: released`).
        neighbours: of the chunk's frames, on the UNet's device.
        flow: correspondences by optical flow, by a layer's number of tokens L; where it is set
            there is no nearest-neighbour search, and `matches` are not used.
        images_at_once: bound on the images whose convolutions, feed-forwards and queries are
            computed at once, whatever the batch; None: no bound. Changes no result.
        windows: of the joint attention over the keyframes of an EXTENDED pass; their queries are
            this process's keyframes.
        keyframe_share: of several processes, this one's part of the keyframes. SOURCE and EXTENDED
            passes are given that part alone; k counts all keyframes, k' its own.
        keep_base: whether EXTENDED passes keep their outputs.
        tokens: source tokens phi of the last SOURCE pass, (m, L, c); of all processes' keyframes.
        features: source features of the last source pass, (m, C, h, w).
        source_base: attention outputs of the last SOURCE pass, (1, k, L, c); `propagate_source`.
        base: attention outputs T_base of the last EXTENDED pass, (B, k, L, c).
        matches: correspondences of the last MATCH pass.
        keep_matched_tokens: whether MATCH passes keep their tokens too.
        matched_tokens: tokens of the last MATCH pass, (m, L, c), if they are kept.
    """

    mode: Pass = Pass.SOURCE
    branches: int = 1
    inject_attention: bool = False
    inject_features: bool = False
    propagate_source: bool = False
    neighbours: Neighbours | None = None
    flow: dict[int, Correspondence] | None = None
    images_at_once: int | None = None
    windows: Sequence[Window] = (Window(slice(None)),)
    keyframe_share: Share = ALONE.share(0)  # noqa: RUF009 (immutable)
    keep_base: bool = True
    keep_matched_tokens: bool = False

    tokens: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    source_base: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    matches: dict[str, Correspondence] = field(default_factory=dict)
    matched_tokens: dict[str, Tensor] = field(default_factory=dict)


class TokenFlowAttention:
    """The attention processor of one self-attention layer.

    Args:
        layer: its key in `unet.attn_processors`.
        context: the run's.
    """

    def __init__(self, layer: str, context: TokenFlowContext) -> None:
        self.layer = layer
        self.context = context
        self.injectable = layer in ATTENTION_LAYERS

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The self-attention's output, (B * m, L, c), for its input tokens of that shape."""
        match self.context.mode:
            case Pass.SOURCE:
                return self._source(attn, hidden_states)
            case Pass.MATCH:
                return self._match(attn, hidden_states)
            case Pass.EXTENDED:
                return self._extended(attn, hidden_states)
            case Pass.PROPAGATE:
                return self._propagate(hidden_states)
            case Pass.PER_FRAME:
                return self._per_frame(attn, hidden_states)
            case Pass.FIRST_FRAME:
                return self._first_frame(attn, hidden_states)

    def _source(self, attn: Attention, tokens: Tensor) -> Tensor:
        share = self.context.keyframe_share
        self.context.tokens[self.layer] = share.gather(tokens)
        output = attend_alone(attn, tokens[None], tokens[None])
        if self.context.propagate_source:
            self.context.source_base[self.layer] = share.gather(output, dim=1)
        return output[0]

    def _match(self, attn: Attention, tokens: Tensor) -> Tensor:
        context, near = self.context, self.context.neighbours
        if context.keep_matched_tokens:
            context.matched_tokens[self.layer] = tokens
        if context.flow is None:
            which = torch.stack([near.previous, near.next], dim=1)  # (m, 2)
            found = nearest_tokens(tokens, context.tokens[self.layer], which)  # (m, 2, L)
            context.matches[self.layer] = Correspondence(found[:, 0], found[:, 1])
        if context.propagate_source:
            match = self._correspondence(tokens)
            return propagate(context.source_base[self.layer], match, near)[0]
        return attend_alone(attn, tokens[None], tokens[None])[0]

    def _extended(self, attn: Attention, tokens: Tensor) -> Tensor:
        context, share = self.context, self.context.keyframe_share
        tokens = tokens.unflatten(0, (context.branches, -1))  # (B, k', L, c)
        tokens = share.gather(tokens, dim=1)  # (B, k, L, c)
        key_tokens = self._query_key_tokens(tokens)
        query_tokens = share.take(key_tokens, dim=1)
        output = attend(attn, query_tokens, key_tokens, tokens, context.windows)  # (B, k', L, c)
        if context.keep_base:
            context.base[self.layer] = share.gather(output, dim=1)
        return output.flatten(0, 1)

    def _propagate(self, tokens: Tensor) -> Tensor:
        context = self.context
        base, match = context.base[self.layer], self._correspondence(tokens)
        return propagate(base, match, context.neighbours).flatten(0, 1)

    def _correspondence(self, tokens: Tensor) -> Correspondence:
        context = self.context
        if context.flow is not None:
            return context.flow[tokens.shape[1]]
        return context.matches[self.layer]

    def _per_frame(self, attn: Attention, tokens: Tensor) -> Tensor:
        tokens = tokens.unflatten(0, (self.context.branches, -1))  # (B, m, L, c)
        return attend_alone(attn, self._query_key_tokens(tokens), tokens).flatten(0, 1)

    def _first_frame(self, attn: Attention, tokens: Tensor) -> Tensor:
        tokens = tokens.unflatten(0, (self.context.branches, -1))  # (B, m, L, c)
        query_key_tokens = self._query_key_tokens(tokens)
        output = attend(attn, query_key_tokens, query_key_tokens[:, :1], tokens[:, :1])
        return output.flatten(0, 1)

    def _query_key_tokens(self, tokens: Tensor) -> Tensor:
        """What queries and keys are made from, (B or 1, m, L, c): under injection, the source's."""
        if self.injectable and self.context.inject_attention:
            return self.context.tokens[self.layer][None]
        return tokens


def attend(
    attn: Attention,
    query_tokens: Tensor,
    key_tokens: Tensor,
    value_tokens: Tensor,
    windows: Sequence[Window] = (Window(slice(None)),),
) -> Tensor:
    """A self-attention layer's output for frames that attend to each other.

    Args:
        attn: the layer.
        query_tokens: (B or 1, f, L, c), what queries are made from; 1 serves every branch.
        key_tokens: (B or 1, f', L, c), what keys are made from.
        value_tokens: (B, f', L, c), what values are made from.
        windows: which frames see which.

    Returns:
        (B, f, L, c).
    """
    key, value = _heads(attn, attn.to_k, key_tokens), _heads(attn, attn.to_v, value_tokens)
    outputs = []
    for window in windows:
        query = _heads(attn, attn.to_q, query_tokens[:, window.queries])
        if window.seen is None:
            output = extended_attention(query, key, value)
        else:
            output = extended_attention(query, key[:, window.seen], value[:, window.seen])
        outputs.append(_project_out(attn, output))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def attend_alone(attn: Attention, query_key_tokens: Tensor, value_tokens: Tensor) -> Tensor:
    """A self-attention layer's output for frames on their own.

    Args:
        query_key_tokens: (B or 1, m, L, c); 1 serves every branch.
        value_tokens: (B, m, L, c).

    Returns:
        (B, m, L, c).
    """
    branches = len(value_tokens)
    query, key, value = (
        # every frame of every branch is a group: (B * m, 1, L, heads, d)
        _heads(attn, layer, tokens).expand(branches, *[-1] * 4).flatten(0, 1)[:, None]
        for layer, tokens in (
            (attn.to_q, query_key_tokens),
            (attn.to_k, query_key_tokens),
            (attn.to_v, value_tokens),
        )
    )
    output = extended_attention(query, key, value)
    return _project_out(attn, output.squeeze(1).unflatten(0, (branches, -1)))


def _heads(attn: Attention, projection: nn.Module, tokens: Tensor) -> Tensor:
    return projection(tokens).unflatten(-1, (attn.heads, -1))  # (..., L, heads, d)


def _project_out(attn: Attention, output: Tensor) -> Tensor:
    output = output.flatten(-2)
    for layer in attn.to_out:  # projection, dropout (idle in evaluation mode)
        output = layer(output)
    return output


def self_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """The names of a UNet's self-attention layers, from the input to the output."""
    return [key for key in unet.attn_processors if key.endswith(".attn1.processor")]


def missing_injection_layers(unet: UNet2DConditionModel) -> list[str]:
    """The layers that PnP injects into and this UNet lacks; it may be on the meta device."""
    missing = sorted(set(ATTENTION_LAYERS) - set(self_attention_layers(unet)))
    if FEATURE_LAYER not in dict(unet.named_modules()):
        missing.append(FEATURE_LAYER)
    return missing


@contextmanager
def tokenflow_patch(
    unet: UNet2DConditionModel, context: TokenFlowContext, backend: str = "native"
) -> Iterator[TokenFlowContext]:
    """Makes a UNet's self-attention TokenFlow's; on leaving, it is as it was before.

    Args:
        unet: with Stable Diffusion's block structure. It is changed in place.
        context: read and filled by the processors.
        backend: diffusers' name of an attention backend: native, xformers, flash, ...

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
        undo.enter_context(_feature_hook(unet, context))
        undo.enter_context(in_pieces(unet, context))
        yield context


@contextmanager
def _feature_hook(unet: UNet2DConditionModel, context: TokenFlowContext) -> Iterator[None]:
    """Keeps the source's features and puts them in the place of the edit's, while PnP asks."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not context.inject_features:
            return None
        if context.mode in (Pass.SOURCE, Pass.MATCH):
            context.features = output
            return None
        return context.features.repeat(context.branches, 1, 1, 1)

    # A UNet without this layer can be patched for techniques that inject nothing.
    layer = dict(unet.named_modules()).get(FEATURE_LAYER)
    handle = layer.register_forward_hook(hook) if layer is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


# What is computed image by image, and whose inner activations are several times the hidden states
# that go in and come out.
_PER_IMAGE = (
    ResnetBlock2D, Downsample2D, Upsample2D, FeedForward, ControlNetConditioningEmbedding,
)  # fmt: skip


@contextmanager
def in_pieces(model: nn.Module, context: TokenFlowContext) -> Iterator[None]:
    """Lets a UNet or ControlNet compute at most `context.images_at_once` images at a time.

    Joint attention needs all keyframes at the same layer at the same time, so their batch goes
    through the UNet as one; like this only hidden states, keys and values grow with it. The one
    residual block whose features PnP injects stays whole, since its hook must see the whole batch:
    its grid is a quarter of the latents' along each side.
    """
    injected = FEATURE_LAYER.rpartition(".")[0]
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _PER_IMAGE) and name != injected
    ]

    def bounded(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: object) -> Tensor:
            n, size = len(hidden), context.images_at_once
            if size is None or n <= size:
                return whole(hidden, *args)
            pieces = []
            for start in range(0, n, size):
                images = slice(start, start + size)
                pieces.append(whole(hidden[images], *(_piece(x, n, images) for x in args)))
            return torch.cat(pieces)

        return forward

    with ExitStack() as undo:
        for module in modules:
            undo.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.forward = bounded(module.forward)
        yield


def _restore_forward(module: nn.Module, own: Callable[..., Tensor] | None) -> None:
    """Gives a module its class's forward again, or the one that it had of its own (accelerate)."""
    if own is not None:
        module.forward = own
    else:
        module.__dict__.pop("forward", None)


def _piece(argument: object, n_images: int, images: slice) -> object:
    """The part of a forward's argument that belongs to some of its images."""
    per_image = isinstance(argument, Tensor) and argument.shape[:1] == (n_images,)
    return argument[images] if per_image else argument
