"""`correspondence: flow`: correspondences by optical flow in place of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.cache.source_pass import LiveSource
from tokenflow.diffusion.conditions import optical_flow
from tokenflow.diffusion.unet_layers import layer_sizes
from tokenflow_utils import Correspondence, Neighbours


class FlowSource:
    """A `tokenflow_utils.Source` whose matches are those of the source frames' optical flow.

    Args:
        live: computes what PnP injects, if anything is injected; its context has no `nearest`.
        frames: (n, H, W, 3) uint8 source frames.
        grid: (h, w) of the latents.
    """

    def __init__(self, live: LiveSource, frames: np.ndarray, grid: Sequence[int]) -> None:
        models = live.denoiser.models
        self.live, self.context, self.device = live, live.context, models.device
        self.sizes = layer_sizes(models.unet, tuple(grid))
        self.field = FlowField(frames, {(h, w) for h, w, _ in self.sizes.values()})
        self._keyframes: Tensor | None = None

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` and `features` of the keyframes (k,) if they are needed."""
        self._keyframes = frames
        if self.context.inject_attention or self.context.inject_features:
            self.live.load_keyframes(t, frames)

    def load_chunk(self, t: int, frames: Tensor) -> None:
        """Fills `matches` of frames (m,), and `features` if they are needed."""
        matches = self.field.matches(frames, self._keyframes, self.context.neighbours, self.device)
        self.context.matches = {layer: matches[h, w] for layer, (h, w, _) in self.sizes.items()}
        if self.context.inject_features:
            self.live.load_chunk(t, frames)


class FlowField:
    """The tokens that tokens of a frame move to in a keyframe, by optical flow of the frames.

    Args:
        frames: (n, H, W, 3) uint8 source frames.
        grids: (h, w) of the layers' tokens.
    """

    def __init__(self, frames: np.ndarray, grids: set[tuple[int, int]]) -> None:
        self.frames, self.grids = frames, grids
        self._tokens: dict[tuple[int, int], dict[tuple[int, int], Tensor]] = {}

    def matches(
        self, chunk: Tensor, keyframes: Tensor, near: Neighbours, device: torch.device
    ) -> dict[tuple[int, int], Correspondence]:
        """The correspondences of a chunk's frames, by the grid (h, w)."""
        previous, following = (
            [self._pair(*pair) for pair in zip(chunk, keyframes[which.cpu()], strict=True)]
            for which in (near.previous, near.next)
        )
        return {
            grid: Correspondence(
                torch.stack([tokens[grid] for tokens in previous]).to(device),
                torch.stack([tokens[grid] for tokens in following]).to(device),
            )
            for grid in self.grids
        }

    def _pair(self, frame: Tensor, keyframe: Tensor) -> dict[tuple[int, int], Tensor]:
        pair = int(frame), int(keyframe)
        if pair not in self._tokens:
            flow = optical_flow(self.frames[pair[0]], self.frames[pair[1]])[None]
            self._tokens[pair] = {grid: flow_tokens(flow, grid)[0] for grid in self.grids}
        return self._tokens[pair]


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
