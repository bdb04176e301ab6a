"""Forwards that compute few images at a time."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import forward
from tokenflow.cache.source_pass import INJECTED_BLOCK
from tokenflow.diffusion.chunked import chunked_forward
from tokenflow_utils import FEATURE_LAYER, Pass, TokenFlowContext, tokenflow_patch


@pytest.fixture
def unet(tiny_model):
    return UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()


@pytest.mark.parametrize("inject", [False, True])
def test_chunks_of_images_give_the_same(unet, inject):
    def edited(images_at_once):
        context = TokenFlowContext(inject_features=inject)
        bounded = chunked_forward(unet, images_at_once, skip=(INJECTED_BLOCK,))
        with tokenflow_patch(unet, context), bounded:
            forward(unet, frames=5)
            context.mode = Pass.EXTENDED
            return forward(unet, frames=5, seed=9)

    whole = edited(100)
    for images_at_once in (1, 2, 7):
        assert torch.allclose(edited(images_at_once), whole, atol=1e-5)


def test_no_convolution_or_feed_forward_sees_more_images_than_allowed(unet):
    seen = set()

    def note(module, args, output):
        seen.add(len(args[0]))

    names = {"Conv2d": [".conv1", ".conv2", "samplers.0.conv"], "GEGLU": [".net.0"]}
    handles = [
        module.register_forward_hook(note)
        for name, module in unet.named_modules()
        if name.endswith(tuple(names.get(type(module).__name__, ["never"])))
        and not name.startswith(FEATURE_LAYER.rpartition(".")[0])
    ]
    assert len(handles) > 40
    with chunked_forward(unet, 2, skip=(INJECTED_BLOCK,)):
        forward(unet, frames=5)
    assert seen == {1, 2}
    for handle in handles:
        handle.remove()


def test_a_forward_that_a_module_had_of_its_own_comes_back(unet):
    block = unet.mid_block.resnets[0]
    block.forward = own = block.forward
    with chunked_forward(unet, 1):
        assert block.forward is not own
    assert block.forward is own
