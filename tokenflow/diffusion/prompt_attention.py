"""Cross-attention of many frames to one prompt, whose keys and values are made once.

All frames of a branch see the same text, but diffusers wants a copy of it with each frame, and
projects every copy. With `share_prompts` a UNet or ControlNet takes the text as it is.
"""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from util import UserError


class PromptAttention:
    """The processor of a cross-attention layer that is given one text for several frames.

    The layer's hidden states are (B * m, L, c), all frames of branch 0 first, and its text (B, 77,
    c'), m >= 1. With m = 1 it is diffusers' `AttnProcessor2_0` for the cross-attention layers of
    Stable Diffusion, which have no norms of their own and are given no mask.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The layer's output, (B * m, L, c).

        Raises:
            ValueError: if there is no text, if the hidden states are not a multiple of it, or if
                there is a mask.
        """
        text = encoder_hidden_states
        if text is None or len(hidden_states) % len(text) or attention_mask is not None:
            raise ValueError(
                f"hidden states {tuple(hidden_states.shape)} with text "
                f"{None if text is None else tuple(text.shape)}: expected (B * m, L, c) with "
                "(B, 77, c') and no mask"
            )
        # A branch's frames are one long row of queries: attention treats each query by itself.
        branch_states = hidden_states.unflatten(0, (len(text), -1)).flatten(1, 2)  # (B, m * L, c)
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, ..., d)
            for projected in (attn.to_q(branch_states), attn.to_k(text), attn.to_v(text))
        )
        output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        for layer in attn.to_out:  # projection, dropout (idle in evaluation mode)
            output = layer(output)
        output = output.unflatten(1, (-1, hidden_states.shape[1])).flatten(0, 1)
        if attn.residual_connection:
            output = output + hidden_states
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def share_prompts(model: nn.Module) -> nn.Module:
    """Lets a UNet or ControlNet take the text (B, 77, c) of B branches for B * m inputs.

    Changes the model in place, and returns it.

    Raises:
        UserError: if a cross-attention layer is none of Stable Diffusion's kind.
    """
    processors = dict(model.attn_processors)
    for name in processors:
        if name.endswith(".attn2.processor"):
            layer = model.get_submodule(name.removesuffix(".processor"))
            if not _is_plain(layer):
                raise UserError(
                    f"{name}: not Stable Diffusion's cross-attention; such a model cannot be used"
                )
            processors[name] = PromptAttention()
    model.set_attn_processor(processors)
    return model


def _is_plain(layer: Attention) -> bool:
    norms = (layer.group_norm, layer.spatial_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
    return isinstance(layer.processor, AttnProcessor2_0) and all(norm is None for norm in norms)
