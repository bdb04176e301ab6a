"""The predicted noise of chosen frames under text, depth and ControlNet conditions.

Notation: n frames, m frames of a chunk, (h, w) the latent grid, B branches (the text conditions
evaluated together, such as unconditional and conditional).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from tokenflow.diffusion.conditions import Control, depth_latents, draw_control
from tokenflow.diffusion.model_names import ControlSettings
from tokenflow.diffusion.models import BETTER_DTYPE, StableDiffusion
from util import UserError


class Denoiser:
    """The predicted noise of chosen frames under given text and spatial conditions.

    Args:
        models: the checkpoint.
        text: (B, 77 * k, c) text embeddings, one per branch.
        depth: (n, 1, h, w) in [-1, 1], a depth model's fifth latent channel.
        control: a ControlNet and its condition images, if any.

    Attributes:
        image_forwards: UNet evaluations so far, counted per image and branch.
    """

    def __init__(
        self,
        models: StableDiffusion,
        text: Tensor,
        depth: Tensor | None = None,
        control: Control | None = None,
    ) -> None:
        self.models, self.text, self.depth, self.control = models, text, depth, control
        self.image_forwards = 0

    @property
    def branches(self) -> int:
        return len(self.text)

    @property
    def networks(self) -> list[nn.Module]:
        """The UNet, and the ControlNet if there is one."""
        return [self.models.unet, *([self.control.controlnet] if self.control else [])]

    def __call__(self, x: Tensor, t: int, frames: Tensor) -> Tensor:
        """eps(x, t) of every branch.

        Args and returns: as `prediction`'s.

        Raises:
            UserError: if the prediction is not finite; the message names the step.
        """
        models, prediction = self.models, self.prediction(x, t, frames)
        if models.schedule.prediction_type == "v_prediction":
            alpha, sigma = models.schedule.alpha_sigma(t)
            prediction = alpha * prediction + sigma * x.to(models.device, torch.float32)
        if not torch.isfinite(prediction).all():
            raise UserError(
                f"the UNet's prediction at timestep {t} is not finite (NaN or infinity) in "
                f"{models.dtype_name}; try {BETTER_DTYPE}"
            )
        return prediction

    def prediction(self, x: Tensor, t: int, frames: Tensor) -> Tensor:
        """What the UNet predicts for every branch: eps or v.

        Args:
            x: (m, 4, h, w) latents of `frames` at timestep t, on any device.
            frames: (m,) the frames' indices in the clip.

        Returns:
            (B, m, 4, h, w) float32 on the models' device.
        """
        models, m = self.models, len(frames)
        x = x.to(models.device, torch.float32)
        model_input = x if self.depth is None else torch.cat([x, self._of(self.depth, frames)], 1)
        model_input = model_input.to(models.dtype).repeat(self.branches, 1, 1, 1)  # (B*m, c, h, w)
        text = self.text.repeat_interleave(m, dim=0)  # (B*m, 77 * k, c)
        residuals = {}
        if self.control is not None:
            images = self._of(self.control.images, frames).repeat(self.branches, 3, 1, 1)
            down, mid = self.control.controlnet(
                model_input, t, text, images, self.control.scale, return_dict=False
            )
            residuals["down_block_additional_residuals"] = down
            residuals["mid_block_additional_residual"] = mid
        # A tensor: a compiled UNet would be recompiled for every number.
        timestep = torch.tensor(t, device=models.device)
        prediction = models.unet(
            model_input, timestep, encoder_hidden_states=text, return_dict=False, **residuals
        )[0]
        self.image_forwards += self.branches * m
        return prediction.float().unflatten(0, (self.branches, m))

    def _of(self, condition: Tensor, frames: Tensor) -> Tensor:
        return condition[frames].to(self.models.device, self.models.dtype)


def make_denoiser(
    models: StableDiffusion,
    frames: np.ndarray,
    prompts: str | Sequence[str],
    control: ControlSettings | None,
    depth: Tensor | None,
) -> Denoiser:
    """The noise prediction for a clip under prompts, depth maps and a ControlNet.

    Args:
        frames: (n, H, W, 3) uint8 source frames.
        prompts: one, or one of each branch.
        control: a ControlNet that follows the clip, if any.
        depth: (n, 1, H, W) of `estimate_depth`, where the model or the ControlNet wants it.
    """
    text = encode_prompts(models, [prompts] if isinstance(prompts, str) else prompts)
    grid = tuple(size // models.vae_factor for size in frames.shape[1:3])
    return Denoiser(
        models,
        text,
        depth_latents(depth, grid) if models.takes_depth else None,
        control and draw_control(models, control, frames, depth),
    )


@torch.inference_mode()
def encode_prompts(models: StableDiffusion, prompts: Sequence[str]) -> Tensor:
    """Text embeddings (len(prompts), 77 * k, c) in the models' dtype.

    A longer prompt is encoded in k parts of 75 tokens, each between a start and an end token, whose
    embeddings are concatenated; shorter ones are padded to as many parts. (The lengths are CLIP's;
    the small model's are shorter.)
    """
    tokenizer = models.tokenizer
    # An embedding of several vectors has several tokens.
    prompts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    most = tokenizer.model_max_length - 2
    tokens = tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
    k = max(1, *(-(-len(each) // most) for each in tokens))
    parts = [each[i * most : (i + 1) * most] for each in tokens for i in range(k)]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    padding = [[tokenizer.pad_token_id] * (most - len(part)) for part in parts]
    rows = [[start, *part, end, *pad] for part, pad in zip(parts, padding, strict=True)]
    embedding = models.text_encoder(torch.tensor(rows, device=models.device))[0]
    return embedding.unflatten(0, (len(prompts), k)).flatten(1, 2)
