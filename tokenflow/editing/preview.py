"""A picture of how an edit comes along: `preview_every`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from tokenflow.diffusion.checkpoints import single_model_folder
from tokenflow.diffusion.models import StableDiffusion
from tokenflow.diffusion.vae import decode_latents, to_frames
from util import UserError, atomic_file


def check_preview_vae(key: str, allow_pickle: bool) -> None:
    """Refuses what is no AutoencoderTiny, by a UserError; see `single_model_folder` for others."""
    config = AutoencoderTiny.load_config(single_model_folder(key, "preview_vae", allow_pickle))
    if config.get("_class_name") != AutoencoderTiny.__name__:
        kind = config.get("_class_name")
        raise UserError(f"preview_vae: {key}: holds a model of the kind {kind}, no AutoencoderTiny")


@dataclass(frozen=True)
class Preview:
    """Draws the first, middle and last frame as they are expected to become.

    Attributes:
        path: of the picture, which each one replaces.
        every: so many steps there is one.
        tiny_vae: hub id or folder of an AutoencoderTiny that decodes them; None: the model's VAE.
    """

    path: Path
    every: int
    models: StableDiffusion
    tiny_vae: str | None = None

    @torch.inference_mode()
    def __call__(self, step: int, clean: Tensor) -> None:
        """Draws the predicted clean latents (n, 4, h, w) after a step, counted from 0."""
        if (step + 1) % self.every:
            return
        models, n = self.models, len(clean)
        latents = clean[sorted({0, n // 2, n - 1})]
        if self.tiny_vae is None:
            frames = decode_latents(models, latents, batch_size=1)
        else:
            vae = models.single_model(AutoencoderTiny, self.tiny_vae, "preview_vae")
            pixels = vae.decode(latents.to(models.device, models.dtype), return_dict=False)[0]
            frames = to_frames(pixels.float())
        with atomic_file(self.path) as temporary:
            Image.fromarray(np.concatenate(list(frames), axis=1)).save(temporary)
