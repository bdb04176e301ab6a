"""FiVE-Bench's measures, against the libraries that its scorer calls."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from tokenflow.evaluation import five_bench, metrics

JUDGE = Path(__file__).resolve().parents[2] / "models" / "tiny" / "judge"
CPU = torch.device("cpu")


@pytest.fixture
def clip():
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (3, 40, 56, 3), np.uint8)
    edited = (source // 2 + rng.integers(0, 100, source.shape, np.uint8)).astype(np.uint8)
    masks = np.zeros(source.shape[:3], bool)
    masks[0, 5:20, 10:30] = masks[2] = True  # frame 1 has no edited part, frame 2 no other
    return edited, source, masks


def test_what_is_kept_is_measured_frame_by_frame_with_black_for_the_rest(clip) -> None:
    found = five_bench.measures(*clip, "a", "b", None, None)
    psnr, mse, ssim = [], [], []
    for edited, source, mask in zip(*clip, strict=True):
        a, b = (
            torch.from_numpy(x * ~mask[..., None]).permute(2, 0, 1)[None].double() / 255
            for x in (edited, source)
        )
        if not mask.all():
            psnr.append(float(peak_signal_noise_ratio(a, b, data_range=1.0)))
            mse.append(float(F.mse_loss(a, b)))
            ssim.append(float(structural_similarity_index_measure(a, b, data_range=1.0)))
    for name, values in (("psnr", psnr), ("mse", mse), ("ssim", ssim)):
        assert found[f"{name}_unedit_part"] == pytest.approx(np.mean(values), rel=1e-6), name
    same = five_bench.measures(clip[1], *clip[1:], "a", "b", None, None)
    assert same["psnr_unedit_part"] == np.inf and same["mse_unedit_part"] == 0
    none = five_bench.measures(*clip[:2], np.ones_like(clip[2]), "a", "b", None, None)
    assert set(none.values()) == {None}


def test_clip_sees_whole_pictures_and_the_edited_part_on_black(clip) -> None:
    edited, source, masks = clip
    embedder = metrics.ClipEmbedder(JUDGE, CPU)
    texts = ["a red star", "a blue star"]
    found = five_bench.measures(edited, source, masks, *texts, embedder, None)
    shown = edited[[0, 2]] * masks[[0, 2]][..., None]
    pairs = {"source_image": (source, 0), "target_image": (edited, 1)}
    pairs["target_image_edit_part"] = (shown, 1)
    for name, (frames, text) in pairs.items():
        cosines = embedder.embed_frames(frames) @ embedder.embed_text(texts[text])
        expected = 100 * np.maximum(cosines.numpy(), 0).mean()
        assert found[f"clip_similarity_{name}"] == pytest.approx(expected, rel=1e-5), name
    empty = five_bench.measures(edited, source, np.zeros_like(masks), *texts, embedder, None)
    assert empty["clip_similarity_target_image_edit_part"] is None


def test_structure_is_that_of_pixels_which_are_not_scaled(clip, tmp_path) -> None:
    """Of pictures that are not square: a ViT of another size takes them."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=32, initializer_range=0.3,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    dino = five_bench.prepare_dino(metrics.DinoKeys(tmp_path, CPU))
    edited, source, masks = clip
    found = five_bench.measures(edited, source, masks, "", "", None, dino)["structure_distance"]
    maps = []
    for frames in (edited, source):
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, (224, 313), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[None, :, None, None] for v in five_bench.IMAGENET)
        keys = []
        with dino.last_key.register_forward_hook(lambda *call, keys=keys: keys.append(call[2])):
            dino.model(pixel_values=(pixels - mean) / std, interpolate_pos_encoding=True)
        keys = F.normalize(keys[0], dim=-1)
        maps.append(keys @ keys.transpose(1, 2))
    assert found == pytest.approx(float((maps[0] - maps[1]).square().mean()), rel=1e-4)
