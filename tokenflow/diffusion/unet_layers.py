"""The token grids of a UNet's layers."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from tokenflow_utils import self_attention_layers


def layer_sizes(
    unet: UNet2DConditionModel, grid: tuple[int, int]
) -> dict[str, tuple[int, int, int]]:
    """(h, w, c) of the tokens of each self-attention layer; L = h * w.

    Args:
        unet: its configuration counts; it may be on the meta device.
        grid: (h, w) of the latents.
    """
    return {
        layer: (
            *grid_of_block(unet, layer, grid),
            unet.get_submodule(layer.removesuffix(".processor")).to_q.in_features,
        )
        for layer in self_attention_layers(unet)
    }


def grid_of_block(unet: UNet2DConditionModel, name: str, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid at a module of the UNet; each level halves the one above, rounding up."""
    block, index = name.split(".")[:2]
    level = len(unet.config.block_out_channels) - 1  # mid_block
    if block == "down_blocks":
        level = int(index)
    elif block == "up_blocks":
        level -= int(index)
    h, w = (-(-side // 2**level) for side in grid)
    return h, w
