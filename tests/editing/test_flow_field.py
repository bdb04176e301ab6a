"""Correspondences, smoothing and noise along optical flow, against written-out loops."""

import itertools

import numpy as np
import pytest
import torch

from tests.helpers import randn
from tokenflow.diffusion.optical_flow import dis_flow
from tokenflow.editing import flow_field
from tokenflow_utils import Neighbours, propagate


class PannedClip(flow_field.ClipFlow):
    """A clip in which everything moves by `step` cells (x, y) a frame, without a border."""

    def __init__(self, n: int, grid: tuple[int, int], step: tuple[float, float]) -> None:
        super().__init__(np.zeros((n, *grid, 3), np.uint8), grid, dis_flow)
        self.step = torch.tensor(step)

    def __call__(self, source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        flow = ((target - source) * self.step)[:, None, None].expand(2, *self.grid)
        return flow, torch.ones(self.grid)


def lookup(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """The bilinear value of (c, h, w) at a place, clamped to its grid."""
    h, w = image.shape[1:]
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    b, r = y - top, x - left
    return (
        (1 - b) * (1 - r) * image[:, top, left]
        + (1 - b) * r * image[:, top, right]
        + b * (1 - r) * image[:, bottom, left]
        + b * r * image[:, bottom, right]
    )


@pytest.mark.parametrize("grid", [(3, 5), (6, 11), (1, 1)])
def test_places_along_a_flow_are_the_bilinear_values_there(grid):
    h, w = grid
    image, flow = randn(1, 4, h, w), 3 * randn(2, h, w, seed=1)
    places = flow_field.bilinear_places(flow)
    found = flow_field.gather(image.flatten(2).mT, places)[0]  # (L, 4)
    for y, x in itertools.product(range(h), range(w)):
        expected = lookup(image[0], y + float(flow[1, y, x]), x + float(flow[0, y, x]))
        assert torch.allclose(found[y * w + x], expected, atol=1e-5)
    assert torch.allclose(places.share.sum(-1), torch.ones(h * w))


def test_propagation_of_whole_tokens_is_that_of_nearest_tokens():
    base, tokens = randn(2, 3, 6, 4), torch.randint(6, (5, 2, 6))
    near = Neighbours(torch.tensor([[0, 1], [1, 2], [2, 2], [0, 0], [1, 2]]), torch.rand(5))
    found = flow_field.propagate_places(base, flow_field.token_places(tokens), near)
    assert torch.equal(found, propagate(base, tokens, near))


def test_propagation_interpolates_within_each_keyframe():
    base, flow = randn(1, 2, 6, 4), 0.7 * randn(1, 2, 2, 2, 3, seed=2)  # one frame, a 2x3 grid
    near = Neighbours(torch.tensor([[0, 1]]), torch.tensor([0.25]))
    found = flow_field.propagate_places(base, flow_field.bilinear_places(flow), near)[0, 0]
    images = base[0].mT.unflatten(2, (2, 3))
    for y, x in itertools.product(range(2), range(3)):
        there = [
            lookup(images[k], y + float(flow[0, k, 1, y, x]), x + float(flow[0, k, 0, y, x]))
            for k in (0, 1)
        ]
        expected = 0.75 * there[0] + 0.25 * there[1]
        assert torch.allclose(found[y * 3 + x], expected, atol=1e-5)


def textured(n: int, step: tuple[int, int], size: int = 96) -> np.ndarray:
    """n frames of a soft texture that moves by `step` pixels (x, y) a frame."""
    noise = torch.nn.functional.interpolate(randn(1, 3, 24, 24), scale_factor=8, mode="bicubic")
    picture = ((noise[0].permute(1, 2, 0) * 40 + 128).clamp(0, 255)).numpy().astype(np.uint8)
    starts = [(50 - i * step[1], 50 - i * step[0]) for i in range(n)]
    return np.stack([picture[y : y + size, x : x + size] for y, x in starts])


def test_flow_on_the_grid_points_where_cells_go_and_trusts_what_stays_in_view():
    flow = flow_field.ClipFlow(textured(2, step=(8, -4)), (12, 12), dis_flow)
    there, agreement = flow(0, 1)
    assert torch.allclose(there[0, 4:8, 4:8], torch.ones(4, 4), atol=0.1)  # a cell is 8 pixels
    assert torch.allclose(there[1, 4:8, 4:8], torch.full((4, 4), -0.5), atol=0.1)
    assert (agreement[4:8, 4:8] == 1).all()
    assert (agreement[:, -1] == 0).all()  # leaves the frame to the right
    assert torch.allclose(flow(1, 0)[0][0, 4:8, 4:8], -torch.ones(4, 4), atol=0.1)
    assert flow(1, 1)[0].abs().max() == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_s_cells_are_as_far_apart_as_its_convolutions_stride(device):
    """9 cells are halved to 5, 3 and 2: a cell of the last is 8 wide, not 9 / 2."""
    flow = torch.full((1, 2, 9, 11), 4.0, device=device)
    for grid, cell in [((9, 11), 1), ((5, 6), 2), ((3, 3), 4), ((2, 2), 8)]:
        assert flow_field.cell_size((9, 11), grid) == cell
        found = flow_field.resize_flow(flow, grid, cell)
        assert found.shape == (1, 2, *grid) and found.device == flow.device
        assert device == "meta" or (found == 4 / cell).all()


class OwnTokens:
    """A source whose nearest tokens are all the first, and that injects nothing."""

    def __init__(self, context, layers):
        self.context, self.layers, self.asked = context, layers, []

    def load_keyframes(self, t, frames):
        self.asked.append("keyframes")

    def load_chunk(self, t, frames):
        self.asked.append("chunk")
        L = {layer: h * w for layer, (h, w) in self.layers.items()}
        zeros = {k: torch.zeros(len(frames), 2, n, dtype=torch.long) for k, n in L.items()}
        self.context.matches = zeros


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_flow_source_takes_nearest_tokens_only_where_flow_is_not_trusted(hybrid):
    context = flow_field.TokenFlowContext()
    flow = flow_field.ClipFlow(textured(3, step=(4, 0)), (12, 12), dis_flow)
    grids = {"fine": (12, 12), "coarse": (6, 6)}
    inner = OwnTokens(context, grids)
    source = flow_field.FlowSource(inner, context, flow, grids, hybrid)
    frames, keyframes = torch.tensor([0, 1]), torch.tensor([1, 2])
    source.load_keyframes(5, keyframes)
    context.neighbours = Neighbours(torch.tensor([[0, 1], [0, 1]]), torch.ones(2))
    source.load_chunk(5, frames)
    assert inner.asked == (["keyframes", "chunk"] if hybrid else [])
    for layer, (h, w) in grids.items():
        places = context.matches[layer]
        assert places.token.shape == (2, 2, h * w, 4)
        column = (places.token % w * places.share).sum(-1).unflatten(-1, (h, w))
        step = 0.5 * w / 12  # of the pan, in the layer's cells
        inside = torch.arange(1, w - 3)
        moved = column[0, 0, h // 2, inside]  # frame 0 in keyframe 1: one frame on
        assert torch.allclose(moved, inside + step, atol=0.1)
        moved = column[0, 1, h // 2, inside]  # frame 0 in keyframe 2: two frames on
        assert torch.allclose(moved, inside + 2 * step, atol=0.15)
        assert torch.allclose(column[1, 0], torch.arange(w).float().expand(h, w))  # itself
        leaving = column[0, 1, h // 2, -1]
        assert leaving == (0 if hybrid else w - 1)


def test_smoothing_averages_along_the_flow_and_leaves_out_what_is_hidden():
    n, grid = 3, (4, 5)
    x = randn(n, 2, *grid)
    flows = {(i, j): randn(2, *grid, seed=10 * i + j) for i in range(n) for j in range(n)}
    agreements = {pair: torch.rand(grid) for pair in flows}

    class Given(PannedClip):
        def __call__(self, source, target):
            return flows[source, target], agreements[source, target]

    found = flow_field.smooth_along_flow(x, Given(n, grid, (0, 0)))
    for i, y, c in itertools.product(range(n), range(grid[0]), range(grid[1])):
        total, weight = x[i, :, y, c].clone(), 1.0
        for j in (i - 1, i + 1):
            if 0 <= j < n:
                dx, dy = flows[i, j][:, y, c].tolist()
                share = float(agreements[i, j][y, c])
                total, weight = total + share * lookup(x[j], y + dy, c + dx), weight + share
        assert torch.allclose(found[i, :, y, c], total / weight, atol=1e-5)
    assert torch.equal(flow_field.smooth_along_flow(x[:1], Given(1, grid, (0, 0))), x[:1])


def test_warped_noise_moves_with_the_clip_even_by_parts_of_a_cell():
    generator = torch.Generator().manual_seed(3)
    noise = flow_field.warped_noise(PannedClip(5, (9, 11), (0.5, -1.0)), 4, generator)
    assert noise.shape == (5, 4, 9, 11)
    for i, dx in ((2, 1), (4, 2)):  # half a cell right and one up, a frame
        assert torch.equal(noise[i, :, : 9 - i, dx:], noise[0, :, i:, : 11 - dx])
    panned = flow_field.warped_noise(PannedClip(9, (20, 20), (1.2, 0.0)), 4, generator)
    kept = [torch.isin(b[0], a[0]).sum() // 20 for a, b in itertools.pairwise(panned)]
    assert kept == [19, 19, 18, 19, 19, 19, 19, 18]  # columns: all but those that enter
    still = flow_field.warped_noise(PannedClip(3, (4, 4), (0.0, 0.0)), 4, generator)
    assert torch.equal(still[2], still[0])


def test_warped_noise_is_white_in_every_frame():
    class Growing(PannedClip):  # and turning: cells collide and come free
        def __call__(self, source, target):
            h, w = self.grid
            y, x = torch.meshgrid(torch.arange(h) - h / 2, torch.arange(w) - w / 2, indexing="ij")
            flow = torch.stack([0.05 * x - 0.1 * y, 0.05 * y + 0.1 * x])
            agreement = torch.ones(h, w)
            agreement[5:9, 5:9] = 0  # hidden
            return flow, agreement

    generator = torch.Generator().manual_seed(1)
    noise = flow_field.warped_noise(Growing(6, (40, 36), (0, 0)), 4, generator)
    for frame in noise:
        assert frame[0].unique().numel() == 40 * 36  # no sample is drawn twice
        assert abs(float(frame.mean())) < 0.05 and abs(float(frame.std()) - 1) < 0.05
        side = (frame[:, :, 1:] * frame[:, :, :-1]).mean()  # neighbours are independent
        assert abs(float(side)) < 0.05
    kept = [torch.isin(b[0], a[0]).float().mean() for a, b in itertools.pairwise(noise)]
    assert all(0.5 < share < 1 for share in kept)
