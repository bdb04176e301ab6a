"""The predicted noise under its conditions, and text."""

import pytest
import torch
from diffusers import DDIMScheduler

from tests.helpers import randn
from tokenflow.diffusion.conditions import Control
from tokenflow.diffusion.denoiser import Denoiser, encode_prompts
from tokenflow.diffusion.models import load_stable_diffusion
from util import UserError


def test_branches_are_independent(models):
    text = encode_prompts(models, ["a red ball", "a green ball"])
    x = randn(3, 4, 6, 10)
    both = Denoiser(models, text)(x, 300, torch.arange(3))
    assert both.shape == (2, 3, 4, 6, 10)
    for branch in range(2):
        alone = Denoiser(models, text[branch : branch + 1])(x, 300, torch.arange(3))[0]
        assert torch.allclose(both[branch], alone, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-4


def test_a_controlnet_sees_each_branch_s_own_text(models, tiny_model):
    control = Control(models.controlnet(str(tiny_model / "controlnet")), torch.rand(3, 1, 48, 80))
    text, x = encode_prompts(models, ["a red ball", "a green ball"]), randn(3, 4, 6, 10)
    both = Denoiser(models, text, control=control)(x, 300, torch.arange(3))
    for branch in range(2):
        for frame in range(3):
            alone = Denoiser(models, text[branch : branch + 1], control=control)
            expected = alone(x[frame : frame + 1], 300, torch.tensor([frame]))[0, 0]
            assert torch.allclose(both[branch, frame], expected, atol=1e-5)
    assert (both - Denoiser(models, text)(x, 300, torch.arange(3))).abs().max() > 1e-4


def test_every_image_of_every_branch_is_counted(models):
    denoiser = Denoiser(models, encode_prompts(models, ["a red ball", "a green ball"]))
    assert denoiser.image_forwards == 0
    denoiser(randn(3, 4, 6, 10), 300, torch.arange(3))
    denoiser(randn(1, 4, 6, 10), 300, torch.arange(1))
    assert denoiser.image_forwards == 2 * 3 + 2 * 1


def test_a_long_prompt_is_encoded_in_parts(models):
    tokenizer, words = models.tokenizer, "wolf bird car " * 26  # 78 words of a token each
    tokens = tokenizer(["a red ball", ""], padding="max_length", return_tensors="pt").input_ids
    short = models.text_encoder(tokens)[0]
    assert torch.equal(encode_prompts(models, ["a red ball", ""]), short)
    found = encode_prompts(models, [words, "a red ball"])
    assert found.shape[:2] == (2, 154)
    parts = [" ".join(words.split()[:75]), " ".join(words.split()[75:])]
    assert torch.allclose(found[0], encode_prompts(models, parts).flatten(0, 1), atol=1e-5)
    assert torch.allclose(found[1], short.flatten(0, 1), atol=1e-5)
    unequal = encode_prompts(models, [" ".join(words.split()[:76])])
    assert unequal.shape[1] == 154  # 76 tokens: one in a part of its own


def test_v_prediction_gives_the_noise_that_it_stands_for(tiny_v_model):
    models = load_stable_diffusion(tiny_v_model, torch.device("cpu"), torch.float32)
    assert models.schedule.prediction_type == "v_prediction"
    text, x, t = encode_prompts(models, [""]), randn(1, 4, 8, 8), 501
    eps = Denoiser(models, text)(x, t, torch.arange(1))[0]
    v = models.unet(x, t, encoder_hidden_states=text).sample
    scheduler = DDIMScheduler.from_config(models.schedule.config)
    scheduler.set_timesteps(50)
    clean = scheduler.step(v, t, x).pred_original_sample
    alpha, sigma = models.schedule.alpha_sigma(t)
    assert torch.allclose(alpha * clean + sigma * eps, x, atol=1e-5)


def test_a_nan_stops_the_run_and_names_the_step(tiny_model):
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    models.unet.conv_out.bias.data.fill_(float("nan"))
    denoiser = Denoiser(models, encode_prompts(models, [""]))
    with pytest.raises(UserError, match=r"timestep 501 .*float32.*dtype"):
        denoiser(randn(1, 4, 8, 8), 501, torch.arange(1))
