"""Decoding latents by a temporal decoder, which sees a frame's neighbours and so flickers less.

The decoder is that of Stable Video Diffusion (Blattmann et al. 2023, diffusers'
AutoencoderKLTemporalDecoder), trained on the latents of Stable Diffusion's image encoder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from tokenflow.diffusion.checkpoints import single_model_folder
from tokenflow.diffusion.models import StableDiffusion
from tokenflow.diffusion.vae import check_decoded, to_frames
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from util import UserError

MOST_FRAMES = 20  # decoded together; Stable Video Diffusion's decoder was trained on 14 to 25
OVERLAP = 6  # frames at least that two chunks share and are cross-faded in


def load_temporal_decoder(models: StableDiffusion, key: str) -> AutoencoderKLTemporalDecoder:
    """The temporal decoder of a hub id or folder, on the models' device and in their dtype.

    Its config.json may set `_norm_num_groups`, see `set_norm_groups`; errors: see `load_model`.
    """
    model = models.single_model(AutoencoderKLTemporalDecoder, key, "decoder_key")
    if "_norm_num_groups" in model.config:
        set_norm_groups(model, model.config["_norm_num_groups"])
    return model


def set_norm_groups(model: AutoencoderKLTemporalDecoder, groups: int) -> None:
    """Gives all group norms this many groups, which the configuration then says.

    diffusers has 32 in every layer. In a decoder of 32 channels that would be one channel each,
    and the norm would take away every channel's mean: the colour of a flat picture.
    """
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups
    model.register_to_config(_norm_num_groups=groups)


def check_decoder_fits(checkpoint: Path, key: str, allow_pickle: bool = False) -> None:
    """Refuses a temporal decoder that is missing or was trained for another VAE's latents.

    Args:
        checkpoint: the Stable Diffusion checkpoint's folder.
        key, allow_pickle: of the decoder; see `checkpoint_folder`, for errors too.
    """
    vae = AutoencoderKL.load_config(checkpoint, subfolder="vae")
    decoder = AutoencoderKLTemporalDecoder.load_config(
        single_model_folder(key, "decoder_key", allow_pickle)
    )
    kind = decoder.get("_class_name")
    if kind != AutoencoderKLTemporalDecoder.__name__:
        raise UserError(
            f"decoder_key: {key}: holds a model of the kind {kind}, expected "
            f"{AutoencoderKLTemporalDecoder.__name__}"
        )
    for name, of in (
        ("latent_channels", lambda config: config["latent_channels"]),
        ("scaling_factor", lambda config: config["scaling_factor"]),
        ("number of block_out_channels", lambda config: len(config["block_out_channels"])),
    ):
        if of(decoder) != of(vae):
            raise UserError(
                f"decoder_key: {key}: this temporal decoder does not fit {checkpoint}: its {name} "
                f"is {of(decoder)}, the VAE's {of(vae)}; name one made for this model"
            )


@torch.inference_mode()
def decode_temporally(
    models: StableDiffusion,
    decoder: AutoencoderKLTemporalDecoder,
    latents: Tensor,
    group: ProcessGroup = SINGLE_PROCESS,
) -> np.ndarray:
    """Latents (n, 4, h, w) to frames (n, H, W, 3) uint8 RGB, in overlapping chunks.

    Args:
        decoder: on the models' device.
        group: each of its processes calls this with all latents and decodes its share of chunks.

    Raises:
        UserError: if the decoded pixels are not finite.
    """
    starts, length = overlapping_chunks(len(latents))
    shard = group.shard(len(starts))
    scaled = latents / models.vae.config.scaling_factor
    own = starts[shard.local]
    size = [side * models.vae_factor for side in latents.shape[2:]]
    chunks = torch.empty(len(own), length, 3, *size)
    for i, start in enumerate(own):
        chunk = scaled[start : start + length].to(models.device, models.dtype)
        pixels = decoder.decode(chunk, num_frames=length, return_dict=False)[0].float()
        check_decoded(pixels, "temporal decoder", models)
        chunks[i] = pixels.cpu()
    faded = cross_fade(shard.gather(chunks), starts)
    return np.concatenate([to_frames(part) for part in faded.split(MOST_FRAMES)])


def overlapping_chunks(
    n: int, most: int = MOST_FRAMES, overlap: int = OVERLAP
) -> tuple[list[int], int]:
    """The fewest chunks of one length that cover n frames, and of which neighbours overlap.

    Args:
        most: frames of a chunk; at least 3 * overlap, so that only neighbours overlap.
        overlap: frames that two neighbours share at least.

    Returns:
        the chunks' first frames, in order, and their length.
    """
    count = max(1, -(-(n - overlap) // (most - overlap)))
    length = -(-(n + (count - 1) * overlap) // count)
    return [i * (n - length) // max(count - 1, 1) for i in range(count)], length


def cross_fade(chunks: Tensor, starts: list[int]) -> Tensor:
    """Joins chunks; where two overlap, the weight moves linearly from the one to the other.

    Args:
        chunks: (count, length, ...), the chunk of `starts[i]` at i.
        starts: of `overlapping_chunks`.

    Returns:
        (n, ...), n the end of the last chunk.
    """
    length = chunks.shape[1]
    n = starts[-1] + length
    total, weights = chunks.new_zeros(n, *chunks.shape[2:]), chunks.new_zeros(n)
    rising = torch.arange(1, length + 1, dtype=chunks.dtype)
    for i, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
        weight = torch.full_like(rising, length)
        if i > 0:
            weight = rising
        if i < len(starts) - 1:
            weight = torch.minimum(weight, rising.flip(0))
        part = slice(start, start + length)
        total[part] += weight.view(-1, *[1] * (chunk.ndim - 1)) * chunk
        weights[part] += weight
    return total.div_(weights.view(-1, *[1] * (total.ndim - 1)))
