"""One text for many frames: the same as a copy of the text for each."""

import copy

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tokenflow.diffusion.checkpoints import frozen
from tokenflow.diffusion.prompt_attention import PromptAttention, share_prompts
from util import UserError


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain_unet(tiny_model):
    return frozen(UNet2DConditionModel.from_pretrained(tiny_model / "unet"), torch.device("cpu"))


@pytest.fixture(scope="module")
def plain_controlnet(tiny_model):
    return frozen(ControlNetModel.from_pretrained(tiny_model / "controlnet"), torch.device("cpu"))


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp_min(1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"residual_connection": True, "rescale_output_factor": 2.0},
        {"upcast_attention": True, "upcast_softmax": True},  # as SD 2.1's; diffusers ignores them
    ],
)
@pytest.mark.parametrize(("branches", "frames"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_a_layer_gives_what_diffusers_gives_for_copies(options, branches, frames):
    torch.manual_seed(0)
    layer = Attention(query_dim=24, cross_attention_dim=20, heads=3, dim_head=8, **options).eval()
    states, text = randn(branches * frames, 35, 24), randn(branches, 77, 20, seed=1)
    copies = text.repeat_interleave(frames, dim=0)
    expected = AttnProcessor2_0()(layer, states, copies)
    assert_close(PromptAttention()(layer, states, text), expected)
    assert_close(PromptAttention()(layer, states, copies), expected)


@pytest.mark.parametrize(("branches", "frames"), [(1, 1), (1, 3), (2, 3)])
def test_a_unet_gives_what_it_gives_for_copies(plain_unet, branches, frames):
    unet = share_prompts(copy.deepcopy(plain_unet))
    x = randn(branches * frames, 4, 6, 10)
    text = randn(branches, 77, unet.config.cross_attention_dim, seed=1)
    copies = text.repeat_interleave(frames, dim=0)
    expected = plain_unet(x, 300, encoder_hidden_states=copies).sample
    assert_close(unet(x, 300, encoder_hidden_states=text).sample, expected)
    assert_close(unet(x, 300, encoder_hidden_states=copies).sample, expected)


@pytest.mark.parametrize(("branches", "frames"), [(1, 1), (1, 3), (2, 3)])
def test_a_controlnet_gives_what_it_gives_for_copies(plain_controlnet, branches, frames):
    controlnet = share_prompts(copy.deepcopy(plain_controlnet))
    x, images = randn(branches * frames, 4, 6, 10), randn(branches * frames, 3, 48, 80).abs()
    text = randn(branches, 77, controlnet.config.cross_attention_dim, seed=1)

    def residuals(model, text):
        down, mid = model(
            x, 300, encoder_hidden_states=text, controlnet_cond=images, return_dict=False
        )
        return [*down, mid]

    expected = residuals(plain_controlnet, text.repeat_interleave(frames, dim=0))
    for found, wanted in zip(residuals(controlnet, text), expected, strict=True):
        assert_close(found, wanted)


def test_a_prompt_is_projected_once(plain_unet):
    unet = share_prompts(copy.deepcopy(plain_unet))
    rows = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    unet(
        randn(6, 4, 6, 10), 300, encoder_hidden_states=randn(2, 77, unet.config.cross_attention_dim)
    )
    assert set(rows) == {2}


def test_self_attention_stays(plain_unet):
    unet = share_prompts(copy.deepcopy(plain_unet))
    for name, processor in unet.attn_processors.items():
        wanted = PromptAttention if name.endswith(".attn2.processor") else AttnProcessor2_0
        assert type(processor) is wanted


def test_what_does_not_fit_is_refused():
    layer = Attention(query_dim=24, cross_attention_dim=20, heads=3, dim_head=8)
    states, text = randn(5, 35, 24), randn(2, 77, 20)
    for wrong in ({}, {"encoder_hidden_states": text}):
        with pytest.raises(ValueError, match=r"hidden states \(5, 35, 24\) with text"):
            PromptAttention()(layer, states, **wrong)
    with pytest.raises(ValueError, match="no mask"):
        PromptAttention()(layer, states, text[:1], attention_mask=torch.zeros(1, 1, 77))


def test_other_cross_attention_is_refused(plain_unet):
    unet = copy.deepcopy(plain_unet)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.norm_cross = torch.nn.LayerNorm(layer.cross_attention_dim)
    with pytest.raises(UserError, match=r"mid_block\..*attn2\.processor: not Stable Diffusion's"):
        share_prompts(unet)
