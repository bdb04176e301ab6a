"""Optical flow of the source in an edit: correspondences, smoothing, and noise that moves along.

`correspondence: flow` takes the output tokens of a frame from where its points lie in the two
keyframes, interpolated between tokens; `hybrid` does so where forward and backward flow agree, and
takes the nearest tokens (Eq. 5) elsewhere. `smooth_steps` averages the predicted clean latents of
neighbouring frames along the flow. `noise: warped` carries one noise along it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow.diffusion.optical_flow import FlowModel, consistent
from tokenflow_utils import Neighbours, Source, TokenFlowContext, blend

LEAST_AGREEMENT = 0.5  # share of a cell's pixels at which its flow is trusted


class ClipFlow:
    """The optical flow between any two frames of a clip on a grid of cells, computed once.

    Args:
        frames: (n, H, W, 3) uint8.
        grid: (h, w) cells, those of the latents.
        model: estimates the flow of two frames.
    """

    def __init__(self, frames: np.ndarray, grid: tuple[int, int], model: FlowModel) -> None:
        self.frames, self.grid, self.model = frames, grid, model
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, source: int, target: int) -> tuple[Tensor, Tensor]:
        """Where the cells of one frame lie in another.

        Returns:
            flow: (2, h, w) float32, in cells to the right and down.
            agreement: (h, w) float32 in [0, 1], the share of a cell's pixels whose flow forward
                and backward agrees (`consistent`); 0 is hidden or outside of the other frame.
        """
        if source == target:
            return torch.zeros(2, *self.grid), torch.ones(self.grid)
        if (source, target) not in self._known:
            there = self.model(self.frames[source], self.frames[target])
            back = self.model(self.frames[target], self.frames[source])
            for pair, (flow, returning) in (
                ((source, target), (there, back)), ((target, source), (back, there))
            ):  # fmt: skip
                agreement = F.interpolate(
                    consistent(flow, returning)[None, None].float(), self.grid, mode="area"
                )
                cell = self.frames.shape[1] / self.grid[0]
                self._known[pair] = resize_flow(flow[None], self.grid, cell)[0], agreement[0, 0]
        return self._known[source, target]


def resize_flow(flow: Tensor, grid: tuple[int, int], cell: float) -> Tensor:
    """A flow (m, 2, H, W) averaged over the cells of a grid, (m, 2, h, w) in those cells.

    Args:
        cell: the distance of two cells' centres, in the flow's own unit.
    """
    return F.interpolate(flow, grid, mode="area") / cell


def cell_size(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
    """The side of a layer's cells: the power of 2 that halving the fine grid, rounded up, took."""
    return next(
        2**k
        for k in itertools.count()
        if all(-(-a // 2**k) == b for a, b in zip(fine, coarse, strict=True))
    )


class Places(NamedTuple):
    """Places between the tokens of a grid: each is a mean of four tokens.

    token: (..., L, 4) int64 in 0..L-1.
    share: (..., L, 4) float32 in [0, 1], of sum 1.
    """

    token: Tensor
    share: Tensor


def bilinear_places(flow: Tensor) -> Places:
    """Where the cells of a grid lie along a flow, as bilinear means; clamped to the grid.

    Args:
        flow: (..., 2, h, w) in cells to the right and down; L = h * w.
    """
    h, w = flow.shape[-2:]
    x = (torch.arange(w, device=flow.device) + flow[..., 0, :, :]).clamp(0, w - 1)
    y = (torch.arange(h, device=flow.device)[:, None] + flow[..., 1, :, :]).clamp(0, h - 1)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    token = [row * w + column for row in (top, bottom) for column in (left, right)]
    share = [
        row * column
        for row in (1 - bottom_share, bottom_share)
        for column in (1 - right_share, right_share)
    ]
    return Places(*(torch.stack(parts, dim=-1).flatten(-3, -2) for parts in (token, share)))


def token_places(token: Tensor) -> Places:
    """The places of whole tokens, (..., L) int64."""
    share = torch.zeros(*token.shape, 4, device=token.device)
    share[..., 0] = 1.0
    return Places(token[..., None].expand_as(share), share)


def gather(rows: Tensor, places: Places) -> Tensor:
    """Rows at places: (B, r, c) and places (..., 4) of r rows to (B, ..., c)."""
    total = None
    for token, share in zip(places.token.unbind(-1), places.share.unbind(-1), strict=True):
        part = rows.index_select(1, token.flatten()).unflatten(1, token.shape)
        part = part * share[..., None].to(rows)
        total = part if total is None else total + part
    return total


def propagate_places(base: Tensor, places: Places, near: Neighbours) -> Tensor:
    """`tokenflow_utils.propagate` for places (m, 2, L) between tokens: (B, m, L, c)."""
    rows, L = base.flatten(1, 2), base.shape[2]  # (B, k * L, c)
    token = places.token + L * near.which[..., None, None]  # (m, 2, L, 4)
    previous, next_ = (
        gather(rows, Places(token[:, side], places.share[:, side])) for side in (0, 1)
    )
    return blend(previous, next_, near.weight)


class FlowSource:
    """A `Source` whose matches are places along the source frames' optical flow.

    Args:
        source: supplies what PnP injects and, for `hybrid`, the nearest tokens.
        context: of the patch; gets `propagate_places` as its `propagate`.
        flow: of the clip.
        grids: (h, w) of each self-attention layer.
        hybrid: take the nearest tokens where the flow is not trusted.
    """

    def __init__(
        self,
        source: Source,
        context: TokenFlowContext,
        flow: ClipFlow,
        grids: Mapping[str, tuple[int, int]],
        hybrid: bool,
    ) -> None:
        self.source, self.context, self.flow, self.grids = source, context, flow, grids
        self.hybrid, self.keyframes = hybrid, torch.empty(0)
        context.propagate = propagate_places

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` and `features` of the keyframes (k,) if they are needed."""
        self.keyframes, context = frames, self.context
        if self.hybrid or context.inject_attention or context.inject_features:
            self.source.load_keyframes(t, frames)

    def load_chunk(self, t: int, frames: Tensor) -> None:
        """Fills `matches` of frames (m,), and `features` if they are needed."""
        context = self.context
        if self.hybrid or context.inject_features:
            self.source.load_chunk(t, frames)
        keyframes = self.keyframes[context.neighbours.which.cpu()].tolist()  # (m, 2)
        pairs = [(i, kf) for i, both in zip(frames.tolist(), keyframes, strict=True) for kf in both]
        device = context.neighbours.which.device
        both = zip(*(self.flow(*pair) for pair in pairs), strict=True)
        flow, agreement = (torch.stack(x).to(device) for x in both)
        found = {}
        for grid in set(self.grids.values()):
            cell = cell_size(self.flow.grid, grid)
            places = bilinear_places(resize_flow(flow, grid, cell))  # (m * 2, L, 4)
            trusted = F.interpolate(agreement[:, None], grid, mode="area") > LEAST_AGREEMENT
            found[grid] = places, trusted.flatten(1)[..., None]  # (m * 2, L, 1)
        nearest, matches = context.matches, {}
        for layer, grid in self.grids.items():
            places, trusted = found[grid]
            if self.hybrid:
                whole = token_places(nearest[layer].flatten(0, 1))
                parts = zip(places, whole, strict=True)
                places = Places(*(torch.where(trusted, *part) for part in parts))
            matches[layer] = Places(*(x.unflatten(0, (-1, 2)) for x in places))
        context.matches = matches


# ---------------------------------------------------------------------------------------------
# Smoothing and noise


def smooth_along_flow(x: Tensor, flow: ClipFlow) -> Tensor:
    """Averages each frame's latents with those of the frames next to it, along the flow.

    y_i = (x_i + sum_j a_ij * x_j(p + f_ij)) / (1 + sum_j a_ij) over j = i - 1, i + 1, with f_ij the
    flow from frame i to j, and a_ij its agreement: what is hidden in frame j does not count.

    Args:
        x: (n, c, h, w) on the grid of the flow, n its frames.
    """
    tokens = x.flatten(2).mT  # (n, h * w, c)
    smoothed = []
    for i in range(len(x)):
        total, weight = tokens[i], torch.ones(tokens.shape[1], 1)
        for j in range(max(i - 1, 0), min(i + 2, len(x))):
            if j == i:
                continue
            displacement, agreement = flow(i, j)
            there = gather(tokens[j : j + 1], bilinear_places(displacement))[0]
            visible = agreement.flatten()[:, None]
            total, weight = total + visible * there, weight + visible
        smoothed.append(total / weight)
    return torch.stack(smoothed).mT.unflatten(2, x.shape[2:])


def warped_noise(flow: ClipFlow, channels: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise that moves along with the clip and is white in every frame.

    Each sample is a particle that is carried by the flow and drawn in the cell that it lies in. It
    ends where its point is hidden or leaves the frame, or where another one lies closer to the
    cell's centre. A cell without a particle gets a fresh one, as far from its centre as the
    particles where the flow comes from: those of a pan stay a lattice, in which none collide. No
    sample is ever interpolated or drawn twice in a frame, so each frame's are independent.

    Args:
        channels: c of the latents.
        generator: on the CPU; its state advances.

    Returns:
        (n, c, h, w) float32, n frames and (h, w) the grid of the flow.
    """
    h, w = flow.grid
    cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
    centres = cells.flatten(0, 1).float()  # (h * w, 2), of the particles of cells: y, x
    position, value = centres, torch.randn(channels, h * w, generator=generator).mT
    noise = [value]
    for i in range(len(flow.frames) - 1):
        displacement, agreement = flow(i, i + 1)
        # (h * w, 3) of each cell: y, x, agreement
        field = torch.cat([displacement.flip(0), agreement[None]]).flatten(1).mT
        here = position - centres
        moved = bilinear_places(here.flip(1).mT.unflatten(1, (h, w)))
        moved = gather(field[None], moved)[0]
        position = position + moved[:, :2]
        cell = (position + 0.5).floor().long()
        alive = (moved[:, 2] > LEAST_AGREEMENT) & ((cell >= 0) & (cell < torch.tensor([h, w]))).all(
            1
        )
        distance = (position - cell).square().sum(1).where(alive, torch.inf)
        order = distance.argsort(descending=True, stable=True)  # the closest is written last
        order = order[alive[order]]
        target = cell[order] @ torch.tensor([w, 1])
        fresh = torch.randn(channels, h * w, generator=generator).mT
        owner = torch.full((h * w,), -1)
        for particle, place in zip(order.tolist(), target.tolist(), strict=True):
            owner[place] = particle
        carried = owner >= 0
        value = torch.where(carried[:, None], value[owner], fresh)
        origin = (centres - field[:, :2]).round().long()
        origin = origin.clamp(torch.zeros(2, dtype=torch.long), torch.tensor([h - 1, w - 1]))
        beside = (position - cell)[origin @ torch.tensor([w, 1])]
        position = torch.where(carried[:, None], position[owner], centres + beside)
        noise.append(value)
    return torch.stack(noise).mT.unflatten(2, (h, w))
