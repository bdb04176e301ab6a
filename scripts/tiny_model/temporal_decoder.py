"""Trains the temporal decoder of the small model: its image decoder with layers over time."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from scripts.shapes.metrics import warp_error
from scripts.shapes.pictures import HELD_OUT, SIZE, save_sheet, scene_of_picture, to_pixels
from scripts.shapes.world import SAMPLE_FRAMES, optical_flow, render, render_clip
from scripts.tiny_model.autoencoder import load_vae
from scripts.tiny_model.model_files import NETWORKS, save_weights
from scripts.tiny_model.settings import Training
from scripts.tiny_model.trainer import train
from tokenflow.diffusion.temporal_decoder import set_norm_groups
from tokenflow.diffusion.vae import psnr, to_frames

log = logging.getLogger("tokenflow")

N_FRAMES, CROP = 8, 96  # of the pieces of clips that it is trained on; CROP in pixels
CHANGE_WEIGHT = 4.0  # of the flicker in the loss
BREAK_SYMMETRY = 0.05  # relative noise on the weights, or repeated channels would stay equal
MOST_NOISE = 0.5  # largest std of the noise on a clip's latents
PART = "vae_temporal_decoder"


def make_temporal_vae(vae: AutoencoderKL, widths: Sequence[int]) -> AutoencoderKLTemporalDecoder:
    """A temporal VAE that begins as an image VAE, to which its layers over time add nothing.

    Each channel of the image VAE is repeated as often as the widths ask for, and what reads it
    takes the mean. The image decoder's post_quant_conv becomes a part of conv_in. The decoder has
    one residual block in the middle; the image decoder's second is left out.

    Args:
        widths: of the blocks: multiples of 32, as diffusers asks for, and of the image VAE's, equal
            where those are, for a residual block that keeps its width has no shortcut.
    """
    names = ("down_block_types", "latent_channels", "layers_per_block", "sample_size")
    sizes = {name: vae.config[name] for name in (*names, "scaling_factor")}
    model = AutoencoderKLTemporalDecoder(block_out_channels=tuple(widths), **sizes)
    set_norm_groups(model, vae.config.norm_num_groups)
    image = dict(vae.state_dict())
    weight, bias = image["post_quant_conv.weight"][..., 0, 0], image["post_quant_conv.bias"]
    conv_in = image["decoder.conv_in.weight"]
    image["decoder.conv_in.weight"] = torch.einsum("oikl,ij->ojkl", conv_in, weight)
    image["decoder.conv_in.bias"] = image["decoder.conv_in.bias"] + conv_in.sum((2, 3)) @ bias
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = image.get(name.replace("spatial_res_block.", ""))
            if source is not None:
                parameter.copy_(_widened(source, parameter.shape))
                if name.startswith("decoder.") and parameter.ndim > 1:
                    parameter *= 1 + BREAK_SYMMETRY * torch.randn_like(parameter)
            elif name.endswith(
                ("temporal_res_block.conv2.weight", "conv2.bias", "to_out.0.weight")
            ):
                parameter.zero_()
            elif name == "decoder.time_conv_out.weight":
                nn.init.dirac_(parameter)
            elif name.endswith(("time_conv_out.bias", "to_out.0.bias")):
                parameter.zero_()
    return model


def _widened(weight: Tensor, shape: torch.Size) -> Tensor:
    """Weights of a wider layer with the same function of repeated channels."""
    weight = weight.repeat_interleave(shape[0] // weight.shape[0], dim=0)
    if weight.ndim > 1:
        times = shape[1] // weight.shape[1]
        weight = weight.repeat_interleave(times, dim=1) / times
    return weight


def look_up(images: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Images (m, c, H, W) where a flow (m, 2, H, W) leads, and whether that is within them."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True), inside


def random_piece(
    vae: AutoencoderKL, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...]:
    """A piece of a random clip, its latents with noise, and how it moves.

    Returns:
        pixels (N_FRAMES, 3, CROP, CROP), latents, the flow (N_FRAMES - 1, 2, CROP, CROP) from
        each frame but the first to the one before, and which of its pixels are seen there.
    """
    number, first, top, left, strength = torch.rand(5, generator=generator).tolist()
    scene, size = scene_of_picture(int(number * HELD_OUT)), (SIZE, SIZE)
    times = int(first * (SAMPLE_FRAMES - N_FRAMES + 1)) + np.arange(N_FRAMES)
    times = (times / (SAMPLE_FRAMES - 1)).tolist()
    top, left = (int(place * (SIZE - CROP + 1)) for place in (top, left))
    piece = np.s_[top : top + CROP, left : left + CROP]
    pixels = to_pixels(np.stack([render(scene, t, size)[0][piece] for t in times]))
    pixels = pixels.to(device)
    pairs = [optical_flow(scene, b, a, size) for a, b in itertools.pairwise(times)]
    flow, seen = (np.stack([x[piece] for x in parts]) for parts in zip(*pairs, strict=True))
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
    noise = torch.randn(latents.shape, generator=generator).to(device)
    flow = torch.from_numpy(flow).permute(0, 3, 1, 2)
    moves = (x.to(device) for x in (flow, torch.from_numpy(seen)))
    return pixels, latents + MOST_NOISE * strength * noise, *moves


def train_temporal_decoder(training: Training) -> None:
    """Train the decoder, the encoder being the small model's and fixed, on moving clips.

    The latents get a noise of their own in each frame, as an edit's differ from a clip's, so that
    the decoder learns to average over time. The loss is that of the frames (as the VAE's) and,
    along the true motion, that of the error's change from frame to frame: flicker.
    """
    vae = load_vae(training)
    count = training.budget.recipes[PART].batch_size
    held_out = [render_clip(scene_of_picture(HELD_OUT + i), SAMPLE_FRAMES, SIZE) for i in range(2)]

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        clips = (random_piece(vae, generator, training.device) for _ in range(count))
        pixels, latents, flow, seen = map(torch.cat, zip(*clips, strict=True))
        error = model.decode(latents, num_frames=N_FRAMES).sample.float() - pixels
        each = error.unflatten(0, (count, N_FRAMES))
        before, inside = look_up(each[:, :-1].flatten(0, 1), flow)
        change = (each[:, 1:].flatten(0, 1) - before) * (seen & inside)[:, None]
        parts = (1, error), (CHANGE_WEIGHT, change)
        return sum(w * (part.abs().mean() + part.square().mean()) for w, part in parts)

    @torch.inference_mode()
    def sheet(model: AutoencoderKLTemporalDecoder, path: Path) -> None:
        rows, figures = [], []
        for each in held_out:
            true = each.frames[:N_FRAMES]
            latents = vae.encode(to_pixels(true).to(training.device)).latent_dist.mean
            temporal = to_frames(model.decode(latents, num_frames=N_FRAMES).sample)
            rows += [true, temporal, to_frames(vae.decode(latents).sample)]
            figures += [(psnr(r, true), warp_error(r, each)) for r in rows[-2:]]
        log.info("%s: %.2f dB, warp error %.3f; the image decoder: %.2f dB, %.3f",
                 PART, *np.reshape(figures, (-1, 4)).mean(0))  # fmt: skip
        save_sheet(path, np.concatenate(rows))

    torch.manual_seed(training.seed)
    model = make_temporal_vae(vae, NETWORKS["trained"]["temporal_widths"]).to(training.device)
    if training.start:
        weights = AutoencoderKLTemporalDecoder.from_pretrained(training.start / PART).decoder
        model.decoder.load_state_dict(weights.state_dict())
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    save_weights(
        training.model / PART,
        train(training, PART, model, loss, sheet, training.hashes("vae")),
        torch.float16,
    )
