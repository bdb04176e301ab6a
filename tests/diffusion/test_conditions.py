"""Edges, depth, optical flow and ControlNet."""

import numpy as np
import pytest
import torch

from tokenflow.diffusion.conditions import (
    canny_edges,
    depth_latents,
    draw_control,
)
from tokenflow.diffusion.model_names import ControlSettings
from tokenflow.diffusion.optical_flow import dis_flow


def test_canny_finds_the_edge_and_nothing_else():
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[1, :, 16:] = 255
    edges = canny_edges(frames, 100, 200)
    assert edges.shape == (2, 1, 32, 32)
    assert edges[0].max() == 0
    assert set(edges[1].unique().tolist()) == {0, 1}
    assert edges[1][:, :, [0, 8, 24, 31]].max() == 0


def test_depth_latents_span_their_range():
    depth = torch.linspace(0, 1, 64)[None, None, None].expand(1, 1, 64, 64)
    latents = depth_latents(depth, (8, 8))
    assert latents.shape == (1, 1, 8, 8)
    assert -1 <= latents.min() < -0.8
    assert 0.8 < latents.max() <= 1


def test_dis_flow_points_where_pixels_go():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    frame = small.repeat(8, axis=0).repeat(8, axis=1)
    flow = dis_flow(frame, np.roll(frame, (2, 5), axis=(0, 1)))  # 2 down, 5 right
    assert flow[0, 24:72, 24:72].median() == pytest.approx(5, abs=0.5)
    assert flow[1, 24:72, 24:72].median() == pytest.approx(2, abs=0.5)


def test_a_controlnet_s_pictures_are_its_canny_edges_or_the_depth(models, tiny_model):
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    settings = ControlSettings(
        kind="canny", key=str(tiny_model / "controlnet"), scale=1.0, low=100, high=200
    )
    control = draw_control(models, settings, frames, depth := torch.rand(3, 1, 48, 64))
    assert torch.equal(control.images, canny_edges(frames, 100, 200))
    settings = settings.model_copy(update={"kind": "depth"})
    assert draw_control(models, settings, frames, depth).images is depth
