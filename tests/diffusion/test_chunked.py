"""Forwards that compute few images at a time."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import forward
from tokenflow.cache.source_pass import INJECTED_BLOCK
from tokenflow.diffusion.chunked import chunked_forward
from tokenflow_utils import Pass, TokenFlowContext, tokenflow_patch


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


def test_a_forward_that_a_module_had_of_its_own_comes_back(unet):
    block = unet.mid_block.resnets[0]
    block.forward = own = block.forward
    with chunked_forward(unet, 1):
        assert block.forward is not own
    assert block.forward is own
