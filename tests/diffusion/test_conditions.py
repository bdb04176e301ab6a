"""Edges, depth, optical flow and ControlNet."""

import numpy as np
import pytest
import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from tests.helpers import invert, make_clip, shapes_frames
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion.conditions import (
    canny_edges,
    depth_latents,
    draw_control,
    estimate_depth,
)
from tokenflow.diffusion.model_names import ControlSettings
from tokenflow.diffusion.optical_flow import dis_flow
from util import MissingFileError


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


def test_depth_of_the_checkpoint_s_own_estimator(tiny_depth_model, tiny_model, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4")
    found = []
    for name in ("checkpoint", tiny_depth_model / "depth_estimator"):
        folder = tmp_path / f"latents-{len(found)}"
        cache = open_cache(invert(clip, folder, tiny_depth_model, depth_model=name))
        assert cache.manifest.depth_model == str(name)
        found.append(cache.depth(5))
    assert torch.equal(*found)
    message = f"depth_model: checkpoint: {tiny_model} has no depth estimator of its own"
    with pytest.raises(MissingFileError, match=message):
        invert(clip, tmp_path / "none", tiny_model, depth_model="checkpoint")


def test_any_depth_estimator_of_transformers_serves(tmp_path):
    """Relative ones predict the inverse of depth, as DPT does; metric ones predict depth."""
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=[f"stage{i}" for i in range(1, 5)],
        reshape_hidden_states=False,
    )
    torch.manual_seed(0)
    found, state = [], None
    for kind in ("relative", "metric"):
        config = DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=14,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=4,
            depth_estimation_type=kind,
            max_depth=1,
        )
        model = DepthAnythingForDepthEstimation(config).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):  # by PyTorch's own weights the picture fades
                torch.nn.init.kaiming_normal_(module.weight)
        torch.nn.init.constant_(model.head.conv3.bias, 1.0)  # where a ReLU is not flat
        state = state or model.state_dict()
        model.load_state_dict(state)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
        frames = shapes_frames(2, 32, 48)
        found.append(estimate_depth(frames, str(folder), tmp_path, torch.device("cpu")))
    for depth in found:
        assert depth.shape == (2, 1, 32, 48)
        assert (depth.min(), depth.max()) == (0, 1)
    assert torch.corrcoef(torch.stack([each.flatten() for each in found]))[0, 1] < -0.5
