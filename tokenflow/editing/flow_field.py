"""`correspondence: flow`: correspondences by optical flow in place of nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.cache.source_features import layer_sizes
from tokenflow.cache.source_pass import LiveSource
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.optical_flow import optical_flow
from tokenflow_utils import TokenFlowContext


class FlowSource(LiveSource):
    """A `LiveSource` whose matches are those of the source frames' optical flow.

    The UNet runs only where something is injected.

    Args:
        denoiser, context, latents: as of `LiveSource`; the context has no `nearest`.
        frames: (n, H, W, 3) uint8 source frames.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        context: TokenFlowContext,
        latents: Callable[[int], Tensor],
        frames: np.ndarray,
    ) -> None:
        super().__init__(denoiser, context, latents)
        factor = denoiser.models.vae_factor
        grid = tuple(size // factor for size in frames.shape[1:3])
        sizes = layer_sizes(denoiser.models.unet, grid)
        self.grids = {layer: (h, w) for layer, (h, w, _) in sizes.items()}
        self.frames, self.keyframes = frames, torch.empty(0)
        self.pair = cache(self._pair)

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` and `features` of the keyframes (k,) if they are needed."""
        self.keyframes = frames
        if self.context.inject_attention or self.context.inject_features:
            super().load_keyframes(t, frames)

    def load_chunk(self, t: int, frames: Tensor) -> None:
        """Fills `matches` of frames (m,), and `features` if they are needed."""
        device, found = self.denoiser.models.device, {}
        keyframes = self.keyframes[self.context.neighbours.which.cpu()].tolist()  # (m, 2)
        pairs = [(i, kf) for i, both in zip(frames.tolist(), keyframes, strict=True) for kf in both]
        for grid in set(self.grids.values()):
            tokens = torch.stack([self.pair(*pair)[grid] for pair in pairs])
            found[grid] = tokens.unflatten(0, (-1, 2)).to(device)  # (m, 2, L)
        self.context.matches = {layer: found[grid] for layer, grid in self.grids.items()}
        if self.context.inject_features:
            super().load_chunk(t, frames)

    def _pair(self, frame: int, keyframe: int) -> dict[tuple[int, int], Tensor]:
        """The tokens of a keyframe that a frame's tokens move to, (L,) for each grid."""
        flow = optical_flow(self.frames[frame], self.frames[keyframe])[None]
        return {grid: flow_tokens(flow, grid)[0] for grid in set(self.grids.values())}


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
