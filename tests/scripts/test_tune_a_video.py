"""Tune-A-Video: its model as it begins, what is trained, undo, resuming, and its results."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from scripts.table1 import tune_a_video
from scripts.table1.tune_a_video import (
    TuneAVideoConfig,
    TunedLayers,
    transformer_blocks,
    tuned_unet,
    tuning_loss,
)
from scripts.tiny_model import trainer
from tests.helpers import edit_keys, forward, invert, make_clip, randn
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.editing.results import read_result
from tokenflow.storage.video import read_clip
from tokenflow.storage.yaml_files import load_yaml
from tokenflow_utils import self_attention_layers
from util import UserError, load_tensors

N = 4


@pytest.fixture(scope="module")
def models(tiny_model):
    """Of this file alone: its UNet is changed and restored."""
    return load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)


class FirstAndPrevious:
    """Sparse-causal attention frame by frame, by diffusers' own processor for cross-attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        outputs = []
        for branch in hidden_states.split(N):
            for i in range(N):
                seen = torch.cat([branch[0], branch[max(i - 1, 0)]])[None]
                outputs.append(AttnProcessor2_0()(attn, branch[i][None], seen))
        return torch.cat(outputs)


def test_at_the_beginning_it_is_the_base_model_with_sparse_causal_attention(models):
    unet = models.unet
    original = unet.attn_processors
    slow = dict.fromkeys(self_attention_layers(unet), FirstAndPrevious())
    unet.set_attn_processor({**original, **slow})
    expected = forward(unet, frames=2 * N)
    unet.set_attn_processor(original)
    with tuned_unet(unet, TunedLayers(unet, N, seed=0)):
        found = forward(unet, frames=2 * N)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, forward(unet, frames=2 * N), atol=1e-3)


def test_temporal_attention_is_over_the_frames_of_a_place(models):
    block = transformer_blocks(models.unet)[0]
    temporal = tune_a_video.TemporalAttention(block, N)
    torch.nn.init.normal_(temporal.attention.to_out[0].weight)
    width = block.attn1.to_q.in_features
    x = randn(2 * N, 5, width)
    with torch.no_grad():
        found = temporal(x).unflatten(0, (2, N))
        for branch in range(2):
            for place in range(5):
                row = x.unflatten(0, (2, N))[branch, :, place]  # (N, c)
                normed = torch.nn.functional.layer_norm(row, (width,))
                expected = row + AttnProcessor2_0()(temporal.attention, normed[None])[0]
                assert torch.allclose(found[branch, :, place], expected, atol=1e-5)


def state_of(unet):
    """Everything that a patch might leave changed."""
    weights = {name: (id(p), p._version, p.requires_grad) for name, p in unet.named_parameters()}
    modules = {name: (id(m), len(m._forward_hooks), m.training) for name, m in unet.named_modules()}
    checkpointing = [getattr(m, "gradient_checkpointing", None) for m in unet.modules()]
    processors = {name: id(p) for name, p in unet.attn_processors.items()}
    return weights, modules, checkpointing, processors


def test_leaving_restores_the_unet_also_after_an_error(models):
    unet, before, prediction = models.unet, state_of(models.unet), forward(models.unet)
    layers = TunedLayers(unet, N, seed=0)
    with pytest.raises(RuntimeError, match="stop"), tuned_unet(unet, layers):
        assert state_of(unet) != before
        raise RuntimeError("stop")
    assert state_of(unet) == before
    assert torch.equal(forward(unet), prediction)


def loss_and_gradients(models, layers, text, seed=0):
    denoiser = Denoiser(models, text)
    with tuned_unet(models.unet, layers):
        generator = torch.Generator().manual_seed(seed)
        loss = tuning_loss(denoiser, randn(N, 4, 6, 10), layers, generator)
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in layers.named_parameters()}
    layers.zero_grad()
    return loss.detach(), gradients


def test_queries_and_temporal_attention_are_trained_and_nothing_else(models):
    unet = models.unet
    layers, text = TunedLayers(unet, N, seed=0), randn(1, 77, unet.config.cross_attention_dim)
    for temporal in layers.temporal:  # whose zero weight stops gradients
        torch.nn.init.normal_(temporal.attention.to_out[0].weight, std=0.1)
    loss, gradients = loss_and_gradients(models, layers, text)
    assert all(g.any() for name, g in gradients.items() if ".to_out.0.bias" not in name)
    assert all(p.grad is None for p in unet.parameters())
    parts = {name.split(".", 2)[-1] for name in gradients if name.startswith("temporal")}
    linear = {f"attention.to_{x}.weight" for x in "qkv"}
    assert parts == linear | {f"attention.to_out.0.{x}" for x in ("weight", "bias")}
    assert len(layers.queries) == 2 * len(layers.temporal) == 2 * len(transformer_blocks(unet))
    unet.enable_gradient_checkpointing()
    again = loss_and_gradients(models, layers, text)
    unet.disable_gradient_checkpointing()
    assert torch.equal(again[0], loss)
    assert all(torch.equal(again[1][name], g) for name, g in gradients.items())


def test_a_model_that_predicts_v_learns_v(tiny_v_model):
    models = load_stable_diffusion(tiny_v_model, torch.device("cpu"), torch.float32)
    clean, layers = randn(N, 4, 6, 10), TunedLayers(models.unet, N, seed=0)
    denoiser = Denoiser(models, randn(1, 77, models.unet.config.cross_attention_dim))
    generator = torch.Generator().manual_seed(3)
    t = int(torch.randint(1000, (), generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    alpha, sigma = models.schedule.alpha_sigma(t)
    with torch.no_grad(), tuned_unet(models.unet, layers):
        eps = denoiser(alpha * clean + sigma * noise, t, torch.arange(N))[0]
        expected = ((eps - noise) / alpha).square().mean()  # as v = (eps - sigma x) / alpha
        found = tuning_loss(denoiser, clean, layers, torch.Generator().manual_seed(3))
    assert torch.allclose(found, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """With a clip and its cache."""
    folder = tmp_path_factory.mktemp("tune")
    make_clip(folder / "clip.mp4", 3)
    invert(folder / "clip.mp4", folder / "latents", tiny_model, inversion_prompt="a red star")
    return folder


def config_for(folder, model, output="results", **changes):
    keys = edit_keys(folder, model, train_steps=4, learning_rate=0.01, n_frames=3) | changes
    return TuneAVideoConfig(**keys | {"output_path": str(folder / output)})


def test_a_killed_training_resumes_to_the_same_result(folder, tiny_model, monkeypatch):
    whole = tune_a_video.edit(config_for(folder, tiny_model, sample_every=2))
    (training,) = whole.parent.glob("training-*")
    assert load_yaml(training / "recipe.yaml")["prompt"] == "a red star"
    assert len(read_clip(training / "sheet_000002.mp4", 9).frames) == 3
    assert not (training / "sheet_000004.mp4").exists()  # the result is that
    result = read_result(whole)
    assert result.method == "Tune-A-Video"
    assert result.run["seconds"].keys() == {"load", "train", "edit", "decode", "write"}
    assert result.run["image_forwards"] == 3 * 5 * 3  # of frames, in steps there, and back twice

    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1)
    real, calls = tune_a_video.tuning_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tune_a_video, "tuning_loss", interrupted)
    config = config_for(folder, tiny_model, "killed", gradient_checkpointing=True)
    with pytest.raises(KeyboardInterrupt):
        tune_a_video.edit(config)
    parts = tune_a_video.edit(config)
    assert len(calls) == 3 + 2  # after two saved steps of four
    assert parts.name == whole.name  # neither key changes the result
    latents = [load_tensors(f / "edited_latents.safetensors")["latents"] for f in (whole, parts)]
    assert torch.equal(*latents)


def test_prompts_share_a_training_that_changes_the_edit(folder, tiny_model, monkeypatch):
    first = tune_a_video.edit(config_for(folder, tiny_model, "prompts"))
    with monkeypatch.context() as patch:
        patch.setattr(tune_a_video, "tuning_loss", lambda *args: pytest.fail("was trained again"))
        second = tune_a_video.edit(config_for(folder, tiny_model, "prompts", prompt="a wolf"))
    assert len(list(first.parent.glob("training-*"))) == 1
    assert read_result(second).run["seconds"]["train"] >= 0
    longer = tune_a_video.edit(config_for(folder, tiny_model, "prompts", train_steps=6))
    few, more = (load_tensors(f / "edited_latents.safetensors")["latents"] for f in (first, longer))
    assert not torch.allclose(few, more, atol=1e-4)


@pytest.mark.parametrize("key", ["compile", "estimate"])
def test_what_it_does_not_do_is_refused(folder, tiny_model, key):
    with pytest.raises(ValueError, match=f"{key}: true is for the run scripts"):
        config_for(folder, tiny_model, **{key: True})


def test_the_command_line_reads_the_shipped_config(folder, tiny_model, capsys):
    keys = edit_keys(folder, tiny_model, n_frames=3, train_steps=1, output_path=folder / "cli")
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    result = tune_a_video.main(words)
    assert f"result: {result}" in capsys.readouterr().out
    assert read_result(result).config["guidance_scale"] == 12.5
    with pytest.raises(UserError, match="train_steps: expected a whole number"):
        tune_a_video.main([*words, "--set", "train_steps=0.5"])
