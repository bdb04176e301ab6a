"""The small trained model of models/tiny: a quick part of scripts/tiny_model/check.py."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

from scripts.shapes.metrics import warp_error
from scripts.shapes.world import SAMPLE_FRAMES, SAMPLES, random_scene, render_clip
from scripts.tiny_model import check as check_tiny
from scripts.tiny_model.model_files import bpe_vocabulary, load_text_model, text_config
from scripts.tiny_model.settings import MAX_TOKENS, WORDS
from tokenflow.diffusion.checkpoints import check_controlnet_fits
from tokenflow.diffusion.ddim import CLEAN, ddim_inversion_step
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.model_names import CONTROLNETS, MODELS, TINY_TEMPORAL_DECODER
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.diffusion.samplers import SAMPLERS
from tokenflow.diffusion.temporal_decoder import (
    check_decoder_fits,
    decode_temporally,
    load_temporal_decoder,
)
from tokenflow.diffusion.vae import decode_latents, encode_frames, psnr
from tokenflow.storage.video import read_clip

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(MODELS["tiny"])
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SEED = 3_000_000  # neither trained on nor shipped as a sample


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """These tensors are large enough to share between threads, unlike the other tests'."""
    before = torch.get_num_threads()
    if "PYTEST_XDIST_WORKER" not in os.environ:  # whose other workers keep the cores busy
        torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What the script writes about a clip and five pictures."""
    folder = tmp_path_factory.mktemp("check_tiny")
    options = {"clips": 1, "pictures": 5, "seed": SEED, "work": folder, "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    check_tiny.main(["--quick", *words, "--json", str(folder / "check.json")])
    return json.loads((folder / "check.json").read_text())


def test_all_of_the_model_is_there_and_small():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt", ".pkl")]
    weights = [path for path in files if path.suffix == ".safetensors"]
    parts = {path.parent.name for path in weights}
    assert parts == {"unet", "vae", "vae_temporal_decoder", "text_encoder", "controlnet", "judge"}
    assert sum(path.stat().st_size for path in weights) <= 40e6


def test_a_vocabulary_of_more_words_keeps_the_meaning_of_the_others():
    vocabulary, _ = bpe_vocabulary(("marble", *WORDS))
    old = json.loads((MODEL / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    parts = CLIPTextModel, MODEL / "text_encoder", MODEL / "tokenizer"
    before = CLIPTextModel.from_pretrained(parts[1]).float()
    after = load_text_model(*parts, text_config("trained", vocabulary, MAX_TOKENS), vocabulary)
    words = ["<|startoftext|>", "a</w>", "striped</w>", "red</w>", "star</w>", "<|endoftext|>"]
    with torch.inference_mode():
        first, then = (model(torch.tensor([[names[word] for word in words]]))
                       for model, names in ((before, old), (after, vocabulary)))  # fmt: skip
    assert torch.equal(first.last_hidden_state, then.last_hidden_state)
    assert torch.equal(first.pooler_output, then.pooler_output)
    new = after.get_input_embeddings().weight[vocabulary["marble</w>"]].detach()
    assert new.std() == pytest.approx(before.get_input_embeddings().weight.std().item(), rel=0.3)


def test_the_controlnet_fits_the_unet():
    check_controlnet_fits(MODEL, CONTROLNETS["tiny", "canny"])


def test_text_to_image_follows_the_caption(figures):
    assert figures["color_accuracy"] >= 0.9
    assert figures["background_accuracy"] >= 0.9
    assert figures["shape_accuracy"] >= 0.7


def test_measurement_and_judge_are_right_about_ground_truth(figures):
    assert min(figures["measurement"].values()) == 1
    for name in ("color_accuracy", "background_accuracy", "fill_accuracy"):
        assert figures["judge"][name] >= 0.9, name


def test_clips_survive_the_vae_and_the_inversion(figures):
    for clip in figures["clips"]:
        assert clip["vae_psnr"] > 30
        assert clip["inversion_iters_5_psnr"] > clip["inversion_vae_psnr"] - 0.5
        assert clip["inversion_psnr"] > 20  # plain, in 10 steps
        assert clip["inversion_iters_5_psnr"] > clip["inversion_psnr"]


def test_the_colour_asked_for_is_there_and_the_background_stays(figures):
    assert figures["edit_color_success"] >= 0.9
    for clip in figures["clips"]:
        assert clip["background_psnr"] > 20


def test_tokenflow_flickers_less_than_the_same_edit_frame_by_frame(figures):
    error = figures["warp_error"]
    assert error["source"] < error["vae"] < error["tokenflow"] < error["per_frame"]
    assert error["tokenflow"] < error["extended_attention"] < error["per_frame"]


def test_the_edits_differ(figures):
    assert len(set(np.round(list(figures["warp_error"].values()), 6))) == 6


def test_the_temporal_decoder_flickers_less_than_the_image_decoder():
    """The more so where each frame's latents have a noise of their own."""
    check_decoder_fits(MODEL, TINY_TEMPORAL_DECODER)
    models = load_stable_diffusion(MODEL, torch.device("cpu"), torch.float32)
    decoder = load_temporal_decoder(models, TINY_TEMPORAL_DECODER)
    clip = render_clip(random_scene(SEED), SAMPLE_FRAMES, 128)
    clean = encode_frames(models, clip.frames[:8])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for std, at_most in ((0.0, 0.95), (0.1, 0.6)):
        latents = clean + std * noise
        temporal = decode_temporally(models, decoder, latents)
        image = decode_latents(models, latents)
        assert warp_error(temporal, clip) < at_most * warp_error(image, clip)
        assert psnr(temporal, clip.frames[:8]) > psnr(image, clip.frames[:8]) - 3


@torch.inference_mode()
def test_each_sampler_leads_back_from_an_inversion():
    """Plain DDIM inversion in 20 steps, half as many sampling steps, the source's own caption."""
    models = load_stable_diffusion(MODEL, torch.device("cpu"), torch.float32)
    scene, frame = random_scene(SEED + 9), torch.tensor([0])
    frames = render_clip(scene, 1, 128).frames
    clean, schedule = encode_frames(models, frames), models.schedule
    denoiser = make_denoiser(models, frames, scene.caption, None, None)
    levels, x = [CLEAN, *schedule.timesteps(20)[::-1]], clean
    latents = {}
    for t_from, t_to in itertools.pairwise(levels):
        eps = lambda x, t, rows: denoiser(x, t, rows)[0]  # noqa: E731
        x = latents[t_to] = ddim_inversion_step(eps, x, schedule, t_from, t_to)
    timesteps, decibels = schedule.timesteps(10), {}
    for name, sampler in SAMPLERS.items():
        x, steps = latents[timesteps[0]], sampler(schedule, timesteps)
        for i, t in enumerate(timesteps):
            x = steps.step(x, denoiser(x, t, frame)[0], i)
        decibels[name] = psnr(decode_latents(models, x), decode_latents(models, clean))
    assert min(decibels.values()) > 32
    assert decibels["dpmpp_2m"] > decibels["ddim"] - 0.5, decibels


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_clips_are_what_the_world_renders(name):
    clip = read_clip(ROOT / "data" / f"{name}.mp4", 100, size=(256, 256))
    rendered = render_clip(random_scene(*SAMPLES[name]), SAMPLE_FRAMES, 256)
    assert clip.frames.shape == rendered.frames.shape
    assert psnr(clip.frames, rendered.frames) > 30
