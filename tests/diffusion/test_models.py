"""Loading a checkpoint's models: devices, dtypes."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tokenflow.diffusion.models import resolve_device, resolve_dtype
from util import UserError


def test_loading_leaves_the_models_as_diffusers_makes_them(models, tiny_model):
    for model in (models.unet, models.controlnet(str(tiny_model / "controlnet"))):
        assert {type(processor) for processor in model.attn_processors.values()} == {
            AttnProcessor2_0
        }
        assert not any("forward" in vars(module) for module in model.modules())


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device: gpu is unknown"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="device: cuda:99 was asked for"):
        resolve_device("cuda:99")


def test_automatic_dtypes():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
