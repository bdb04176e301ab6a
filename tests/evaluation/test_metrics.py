"""Each measure against cases worked out by hand, and against the libraries' own answers."""

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from scripts.shapes.metrics import true_motion
from scripts.shapes.metrics import warp_error as shapes_warp_error
from scripts.shapes.world import random_scene, render_clip
from tests.evaluation.test_motion import panned, texture, uniform
from tokenflow.diffusion.vae import psnr
from tokenflow.evaluation import metrics
from tokenflow.evaluation.motion import Motion
from util import MissingFileError, UserError

CPU = torch.device("cpu")
JUDGE = str(Path(__file__).resolve().parents[2] / "models" / "tiny" / "judge")


def moving(n_pairs: int, dx: float, dy: float, height: int, width: int) -> Motion:
    """Uniform motion by (dx, dy) a frame; what comes from outside is not visible."""
    x, y = torch.arange(width) - dx, torch.arange(height)[:, None] - dy
    visible = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    flow = uniform(n_pairs, -dx, -dy, height, width)
    return Motion(flow, visible[None].repeat(n_pairs, 1, 1))


STILL = moving(3, 0, 0, 32, 48)


# ---------------------------------------------------------------- warp error


def test_a_still_video_under_no_motion_has_no_error() -> None:
    frames = np.repeat(texture(32, 48)[None], 4, axis=0)
    assert metrics.warp_error(frames, STILL) == 0


@pytest.mark.parametrize("step", [(3, -2), (-5, 4)])
def test_a_whole_pixel_translation_has_no_error_but_by_the_wrong_sign(step) -> None:
    """Flow that points to where things go, or whose axes are swapped, is a large error."""
    frames, right = panned(4, step), moving(3, *step, 64, 80)
    assert metrics.warp_error(frames, right) == 0
    assert metrics.warp_error(frames, Motion(-right.flow, right.visible)) > 5
    assert metrics.warp_error(frames, Motion(right.flow.flip(1), right.visible)) > 5


def test_a_translation_by_part_of_a_pixel_has_that_of_interpolation() -> None:
    whole = texture(64, 400).astype(np.float64)
    frames = [(1 - a) * whole[:, 40 - s : 120 - s] + a * whole[:, 39 - s : 119 - s]
              for s, a in ((0, 0), (2, 0.5), (5, 0))]  # moves right by 2.5 pixels  # fmt: skip
    frames = np.stack(frames).round().astype(np.uint8)
    error = metrics.warp_error(frames, moving(2, 2.5, 0, 64, 80))
    assert 0 < error < 0.15
    assert metrics.warp_error(frames, moving(2, 0, 0, 64, 80)) > 20 * error


def test_flicker_is_its_square() -> None:
    """By 51 of 255 at every second frame: 0.2^2 in each pair. By channel: a third of that."""
    frames = np.repeat(texture(32, 48)[None] // 2, 4, axis=0)
    flicker = frames.copy()
    flicker[1::2] += 51
    assert metrics.warp_error(flicker, STILL) == pytest.approx(1e3 * 0.2**2, rel=1e-12)
    flash = frames.copy()
    flash[1] += 51  # in two pairs of three
    assert metrics.warp_error(flash, STILL) == pytest.approx(1e3 * 0.2**2 * 2 / 3, rel=1e-12)
    red = frames.copy()
    red[1::2, ..., 0] += 51
    assert metrics.warp_error(red, STILL) == pytest.approx(1e3 * 0.2**2 / 3, rel=1e-12)


def test_flicker_of_a_moving_clip_is_its_square_too() -> None:
    frames = panned(4, (3, -2)) // 2
    frames[1::2] += 51
    assert metrics.warp_error(frames, moving(3, 3, -2, 64, 80)) == pytest.approx(40, rel=1e-12)


def test_hidden_pixels_do_not_count() -> None:
    frames = np.repeat(texture(32, 48)[None] // 2, 4, axis=0)
    frames[1, :, 24:] += 100
    frames[1, :, :24] += 51
    visible = STILL.visible.clone()
    visible[:2, :, 24:] = False
    hidden = Motion(STILL.flow, visible)
    assert metrics.warp_error(frames, hidden) == pytest.approx(1e3 * 0.2**2 * 2 / 3, rel=1e-12)
    assert metrics.warp_error(frames, STILL) > 60


def test_pairs_weigh_the_same_however_much_is_visible() -> None:
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[1:] = 51
    visible = torch.ones(2, 32, 48, dtype=torch.bool)
    visible[0, 1:] = False  # the pair with the change: one row
    motion = Motion(torch.zeros(2, 2, 32, 48), visible)
    assert metrics.warp_error(frames, motion) == pytest.approx(1e3 * 0.2**2 / 2, rel=1e-12)
    visible[0] = False  # nothing left of it: the other pair alone
    assert metrics.warp_error(frames, Motion(motion.flow, visible)) == 0


def test_where_nothing_is_visible_there_is_no_error() -> None:
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    assert metrics.warp_error(frames, Motion(STILL.flow, torch.zeros_like(STILL.visible))) is None
    assert metrics.warp_error(frames[:1], STILL) is None


def test_the_shapes_worlds_warp_error_is_this_one() -> None:
    clip = render_clip(random_scene(5, n_objects=2), 4, 64)
    noisy = np.clip(clip.frames + np.random.default_rng(0).normal(0, 9, clip.frames.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    error = shapes_warp_error(noisy, clip)
    assert error == metrics.warp_error(noisy, true_motion(clip)) > 1
    assert shapes_warp_error(noisy[:3], clip) != error


def test_the_error_of_a_part_is_that_of_the_later_frames_pixels_there() -> None:
    """The object, a column that moves right by 2, flickers by 51 of 255; the rest stands still."""
    frames = np.full((4, 32, 48, 3), 100, np.uint8)
    masks, flow = np.zeros((4, 32, 48), bool), torch.zeros(3, 2, 32, 48)
    for i in range(4):
        masks[i, :, 10 + 2 * i : 20 + 2 * i] = True
        frames[i][masks[i]] = 151 if i % 2 else 202
    visible = torch.from_numpy(masks[1:] | ~masks[:-1])  # not where it uncovers the rest
    flow[:, 0][torch.from_numpy(masks[1:])] = -2
    motion = Motion(flow, visible)
    assert metrics.warp_error(frames, motion, masks) == pytest.approx(1e3 * 0.2**2, rel=1e-12)
    assert metrics.warp_error(frames, motion, ~masks) == 0
    everywhere = np.ones_like(masks)
    assert metrics.warp_error(frames, motion, everywhere) == metrics.warp_error(frames, motion)
    assert metrics.warp_error(frames, motion, ~everywhere) is None


# ---------------------------------------------------------------- sharpness


def test_sharpness_of_cases_worked_out_by_hand() -> None:
    frames = np.zeros((2, 5, 7, 3), np.uint8)
    assert metrics.sharpness(frames) == 0
    frames[0, :, 3:, 0] = 51  # an edge of 0.2 in one channel and one frame, 5 pixels high
    frames[1, 2:, :, :] = 102  # and one of 0.4 in all channels of the other, 7 pixels wide
    squares = 5 * 0.2**2 / 3, 7 * 0.4**2
    assert metrics.sharpness(frames) == pytest.approx((sum(squares) / 70) ** 0.5, rel=1e-12)
    left = np.zeros((2, 5, 7), bool)
    left[:, :, :3] = True
    squares = squares[0] + 3 * 0.4**2
    assert metrics.sharpness(frames, left) == pytest.approx((squares / 30) ** 0.5, rel=1e-12)
    assert metrics.sharpness(frames, ~left) == pytest.approx((4 * 0.4**2 / 40) ** 0.5, rel=1e-12)
    assert metrics.sharpness(frames, np.zeros_like(left)) is None


def test_blur_lowers_sharpness() -> None:
    clip = render_clip(random_scene(3, n_objects=1), 2, 96)
    found = [metrics.sharpness(clip.frames)]
    for sigma in (0.7, 1.5):
        blurred = np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in clip.frames])
        found.append(metrics.sharpness(blurred))
    assert found[0] > 1.1 * found[1] > 1.2 * found[2]


# ---------------------------------------------------------------- PSNR and SSIM


@pytest.fixture
def pair():
    """A clip, the same with noise, and a mask."""
    source = panned(3, (2, 1), 40, 48)
    noise = np.random.default_rng(0).normal(0, 12, source.shape)
    mask = np.zeros(source.shape[:3], bool)
    mask[:, 10:30, 8:20] = True
    return np.clip(source + noise, 0, 255).astype(np.uint8), source, mask


def test_psnr_of_a_known_error_inside_and_outside_a_mask(pair) -> None:
    _, source, mask = pair
    source = source // 2
    frames = source.copy()
    frames[mask] += 51
    frames[~mask] += 5
    assert psnr(frames, source, mask) == pytest.approx(-20 * np.log10(0.2))
    assert psnr(frames, source, ~mask) == pytest.approx(20 * np.log10(51))
    assert psnr(frames, source, np.zeros_like(mask)) is None


def test_ssim_is_torchmetrics(pair) -> None:
    frames, source, mask = pair
    frames[-1] = 255 - frames[-1]
    whole, inside, outside = metrics.ssim(frames, source, mask)
    tensors = [torch.from_numpy(c).permute(0, 3, 1, 2).double() / 255 for c in (frames, source)]
    theirs, map_ = structural_similarity_index_measure(
        *tensors, data_range=1.0, return_full_image=True
    )
    assert whole == pytest.approx(float(theirs), rel=1e-6)
    map_ = map_.mean(dim=1).numpy()
    assert inside == pytest.approx(map_[mask].mean(), rel=1e-6)
    assert outside == pytest.approx(map_[~mask].mean(), rel=1e-6)
    np.testing.assert_allclose(metrics.ssim_map(frames[0], source[0]), map_[0], atol=1e-6)
    assert metrics.ssim(frames, source) == (pytest.approx(whole), None, None)
    assert metrics.ssim(frames, source, np.zeros_like(mask))[1:] == (None, pytest.approx(whole))
    assert metrics.ssim(frames, source, np.ones_like(mask))[1:] == (pytest.approx(whole), None)


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip():
    return metrics.ClipEmbedder(metrics.model_folder(JUDGE, "clip_model"), CPU)


@pytest.fixture(scope="module")
def pictures():
    """Ten frames, more than a chunk."""
    clips = [render_clip(random_scene(seed), 5, (48, 80)).frames for seed in (0, 1)]
    return np.concatenate(clips)


def test_the_cosine_is_transformers_own(clip, pictures) -> None:
    prompts = ["a red star on a blue background", "a ring"]
    model = CLIPModel.from_pretrained(JUDGE).float().eval()
    tokens = CLIPTokenizer.from_pretrained(JUDGE)(prompts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(JUDGE)(list(pictures), return_tensors="pt")
    with torch.inference_mode():
        logits = model(**tokens, **pixels).logits_per_image
        theirs = logits / model.logit_scale.exp()
    frames = clip.embed_frames(pictures)
    for i, prompt in enumerate(prompts):
        ours = frames @ clip.embed_text(prompt)
        torch.testing.assert_close(ours, theirs[:, i], rtol=1e-5, atol=1e-5)
        score = metrics.clip_score(frames, clip.embed_text(prompt))
        assert score == pytest.approx(float(theirs[:, i].mean()), abs=1e-5)
    assert theirs.std() > 0.05


def test_a_prompt_too_long_is_cut_with_a_warning(clip, caplog) -> None:
    long = "a red star on a blue background and " * 9
    with caplog.at_level(logging.WARNING):
        cut = clip.embed_text(long)
    assert "CLIP reads 32 of its" in caplog.text
    caplog.clear()
    clip.embed_text("a red star")
    assert "CLIP reads" not in caplog.text
    ids = clip.tokenizer(long, truncation=True, max_length=32).input_ids
    assert len(ids) == 32
    assert cut.isfinite().all()


def test_frame_consistency_is_of_consecutive_frames() -> None:
    x, y = torch.eye(2)
    diagonal = (x + y) / 2**0.5
    assert metrics.clip_frame_consistency(torch.stack([x, x, x])) == 1
    assert metrics.clip_frame_consistency(torch.stack([x, diagonal, y])) == pytest.approx(0.5**0.5)
    assert metrics.clip_frame_consistency(torch.stack([x, y, y, y])) == pytest.approx(2 / 3)
    assert metrics.clip_frame_consistency(x[None]) is None


def test_direction_is_from_source_to_edit() -> None:
    x, y, z = torch.eye(3)
    edited, source = torch.stack([y, z]), torch.stack([x, x])
    assert metrics.clip_directional(edited, source, y, x) == pytest.approx((1 + 0.5) / 2)
    assert metrics.clip_directional(source, edited, y, x) == pytest.approx((-1 - 0.5) / 2)
    assert metrics.clip_directional(source, source, y, x) == 0
    assert metrics.clip_directional(edited, source, y, y) is None


def test_a_clip_that_cannot_be_had_says_how_to_do_without(tmp_path, monkeypatch) -> None:
    advice = r"--clip_model FOLDER names a copy, --clip_model none leaves the measure out"
    with pytest.raises(MissingFileError, match=advice):
        metrics.model_folder("no such/folder", "clip_model")
    with pytest.raises(MissingFileError, match=advice):
        metrics.model_folder(str(tmp_path), "clip_model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match=advice) as caught:
        metrics.model_folder("no/clip", "clip_model")
    assert "config" not in str(caught.value)  # it is no config's key


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="its model_type is clip, expected vit"):
        metrics.DinoKeys(metrics.model_folder(JUDGE, "dino_model"), CPU)


# ---------------------------------------------------------------- DINO


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A small random ViT."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8, initializer_range=0.3,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_keys_are_those_of_the_last_layer(vit_folder, pictures) -> None:
    keys = metrics.DinoKeys(vit_folder, CPU)(pictures)
    assert keys.shape == (10, 1 + 16, 24)
    model = ViTModel.from_pretrained(vit_folder, add_pooling_layer=False).eval()
    pixels = ViTImageProcessor.from_pretrained(vit_folder)(list(pictures), return_tensors="pt")
    with torch.inference_mode():
        before_last = model(**pixels, output_hidden_states=True).hidden_states[-2]
    weights = model.state_dict()
    (weight,) = (v for k, v in weights.items() if ".2." in k and _is_key(k, "weight"))
    (bias,) = (v for k, v in weights.items() if ".2." in k and _is_key(k, "bias"))
    (norm,) = (m for n, m in model.named_modules() if ".2." in f".{n}" and "norm_before" in n)
    with torch.inference_mode():
        expected = F.linear(norm(before_last), weight, bias)
    torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-4)


def _is_key(name: str, parameter: str) -> bool:
    return name.endswith((f".key.{parameter}", f".k_proj.{parameter}"))


def test_structure_is_the_self_similarity_of_keys() -> None:
    """Neither a common turn of all keys nor their lengths matter; what does is worked out."""
    x, y = torch.eye(2)
    one = torch.stack([x, x])[None]
    other = torch.stack([x, y])[None]  # similarities 1 0 0 1 instead of 1 1 1 1
    assert metrics.structure_distance(one, one) == 0
    assert metrics.structure_distance(one, 3 * one.flip(-1)) == pytest.approx(0, abs=1e-12)
    assert metrics.structure_distance(other, one) == pytest.approx(0.5)
    both, ones = torch.cat([one, other]), torch.cat([one, one])
    assert metrics.structure_distance(both, ones) == pytest.approx(0.25)
