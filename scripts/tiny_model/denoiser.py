"""Trains the UNet of the small model with its text encoder, then a ControlNet for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel

from scripts.shapes import pictures as shapes
from scripts.tiny_model import model_files
from scripts.tiny_model.autoencoder import load_vae, picture_latents
from scripts.tiny_model.settings import VOCABULARY, Training
from scripts.tiny_model.trainer import train
from tokenflow.diffusion.conditions import canny_edges
from tokenflow.diffusion.vae import to_frames
from util import sha256_file

NO_TEXT = 0.1  # share of captions that are dropped, for classifier-free guidance

TWO_OBJECTS = 0.5  # share of a batch: which attribute is whose is learnt last

MIN_SNR = 5.0  # Hang et al. 2023: caps the weight of nearly clean latents

# SD's noisiest latents still hold a trace of their picture's mean, and sampling starts from noise
# that holds none: a model that reads the background off that trace draws any background. So the
# noise's mean is shifted at random (std, as a share of the noise's), which drowns the trace and
# leaves it to the caption. The shift is noise like the rest, to be predicted with it.
MEAN_SHIFT = 0.1


class TextToNoise(nn.Module):
    """The UNet and the text encoder, which are trained together."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        config = training.text_config()
        if start := training.start:
            self.text_encoder = model_files.load_text_model(
                CLIPTextModel, start / "text_encoder", start / "tokenizer", config, VOCABULARY
            )
            self.unet = UNet2DConditionModel.from_pretrained(start / "unet").float()
        else:
            self.text_encoder = CLIPTextModel(config)
            self.unet = model_files.make_unet("trained")

    def forward(self, batch: Batch) -> Tensor:
        return self.unet(batch.noisy, batch.timesteps, self.text_encoder(batch.tokens)[0]).sample


def train_unet(training: Training) -> None:
    """Train the UNet and its text encoder, at half the size first, where a step is cheap."""
    torch.manual_seed(training.seed)
    model = TextToNoise(training).to(training.device)
    model.unet.to(memory_format=torch.channels_last)
    inputs = training.hashes("vae")
    for name, size in (("unet_small", shapes.SIZE // 2), ("unet", shapes.SIZE)):
        batches = NoisyLatents(training, name, size)
        averaged = train(
            training,
            name,
            model,
            partial(_noise_loss, batches),
            lambda averaged, path, size=size: _text_sheet(training, averaged, size, path),
            inputs,
        )
        inputs |= {name: sha256_file(training.work / name / "state.safetensors")[:12]}
        model.load_state_dict(averaged.state_dict())
    model_files.save_weights(training.model / "unet", averaged.unet, torch.float16)
    model_files.save_weights(training.model / "text_encoder", averaged.text_encoder, torch.float16)
    training.write_tokenizer(training.model / "tokenizer")
    model_files.ddim_scheduler().save_pretrained(training.model / "scheduler")
    model_files.write_model_index(training.model)


def _noise_loss(batches: NoisyLatents, model: TextToNoise, generator: torch.Generator) -> Tensor:
    batch = batches.draw(generator)
    return batch.loss(model(batch))


class NoisyLatents:
    """Draws what a noise prediction is trained on: noisy latents, their captions and the noise.

    TWO_OBJECTS of the pictures show two. Timesteps are drawn evenly, or more of the noisier ones
    (as the larger of two draws is).
    """

    def __init__(self, training: Training, part: str, size: int, noisier: bool = False) -> None:
        self.latents = picture_latents(training, size).to(training.device)
        self.tokens = training.tokens([*training.captions(), ""])
        self.alphas_squared = model_files.ddim_scheduler().alphas_cumprod.to(training.device)
        self.batch_size = training.budget.recipes[part].batch_size
        self.noisier = noisier
        counts = [len(shapes.scene_of_picture(n).objects) for n in range(training.budget.pictures)]
        self.with_objects = [torch.tensor(counts).eq(k).nonzero()[:, 0] for k in (1, 2)]

    def draw(self, generator: torch.Generator) -> Batch:
        count, device = (self.batch_size,), self.latents.device
        of_two = torch.rand(count, generator=generator) < TWO_OBJECTS
        place = torch.rand(count, generator=generator)
        one, two = (numbers[(place * len(numbers)).long()] for numbers in self.with_objects)
        numbers = two.where(of_two, one)
        timesteps = torch.randint(len(self.alphas_squared), count, generator=generator)
        if self.noisier:
            other = torch.randint(len(self.alphas_squared), count, generator=generator)
            timesteps = timesteps.maximum(other)
        has_text = torch.rand(count, generator=generator) >= NO_TEXT
        captions = numbers.where(has_text, len(self.latents))
        noise = torch.randn(*count, *self.latents.shape[1:], generator=generator)
        noise += MEAN_SHIFT * torch.randn(*count, 4, 1, 1, generator=generator)
        noise, timesteps = noise.to(device), timesteps.to(device)
        alpha_squared = self.alphas_squared[timesteps].view(-1, 1, 1, 1)
        clean = self.latents[numbers.to(device)].float()
        noisy = alpha_squared.sqrt() * clean + (1 - alpha_squared).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        snr = alpha_squared / (1 - alpha_squared)
        return Batch(numbers, noisy, timesteps, self.tokens[captions.to(device)], noise, snr)


@dataclass(frozen=True)
class Batch:
    """One batch of `NoisyLatents`."""

    numbers: Tensor  # (b,) of the pictures
    noisy: Tensor  # (b, 4, h, w)
    timesteps: Tensor  # (b,)
    tokens: Tensor  # (b, MAX_TOKENS), of no text where the caption was dropped
    noise: Tensor  # (b, 4, h, w)
    snr: Tensor  # (b, 1, 1, 1), alpha_t^2 / sigma_t^2

    def loss(self, predicted: Tensor) -> Tensor:
        """The mean squared error of predicted noise, with Min-SNR weights."""
        weight = self.snr.clamp(max=MIN_SNR) / self.snr
        return (weight * (predicted.float() - self.noise).square()).mean()


def draw_pictures(
    pipe: DiffusionPipeline, captions: Sequence[str], generator: torch.Generator, **options: Any
) -> np.ndarray:
    """What a pipeline draws of captions, (n, H, W, 3) uint8."""
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(list(captions), generator=generator, output_type="np", **options).images
    return (frames * 255).round().astype(np.uint8)


def _sheet_options(training: Training) -> dict[str, Any]:
    generator = torch.Generator(training.device).manual_seed(0)
    steps = training.budget.sheet_steps
    return {"generator": generator, "num_inference_steps": steps, "guidance_scale": 5.0}


def _text_sheet(training: Training, model: TextToNoise, size: int, path: Path) -> None:
    """Pictures of held-out captions, which are in the text file of the same name."""
    captions = [shapes.scene_of_picture(shapes.HELD_OUT + i).caption for i in range(16)]
    pipe = StableDiffusionPipeline(
        vae=load_vae(training),
        text_encoder=model.text_encoder,
        tokenizer=training.tokenizer,
        unet=model.unet,
        scheduler=model_files.ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    options = {"height": size, "width": size, **_sheet_options(training)}
    shapes.save_sheet(path, draw_pictures(pipe, captions, **options))
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


class EdgesToNoise(nn.Module):
    """A ControlNet in training next to the finished UNet, whose weights do not change."""

    def __init__(self, unet: UNet2DConditionModel, start: Path | None) -> None:
        super().__init__()
        edges = edges_of(np.stack([shapes.picture(n, shapes.SIZE)[0] for n in range(8)]))
        self.controlnet = model_files.make_controlnet("trained", unet, edges)
        if start:
            weights = ControlNetModel.from_pretrained(start / "controlnet").float().state_dict()
            self.controlnet.load_state_dict(weights)
        self.frozen = [unet]  # in a list: no part of this module, its state or its average

    def forward(self, batch: Batch, text: Tensor, edges: Tensor) -> Tensor:
        down, middle = self.controlnet(
            batch.noisy, batch.timesteps, text, controlnet_cond=edges, return_dict=False
        )
        return self.frozen[0](
            batch.noisy,
            batch.timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample


def train_controlnet(training: Training) -> None:
    unet = UNet2DConditionModel.from_pretrained(training.trained("unet").parent).float()
    unet = unet.to(training.device, memory_format=torch.channels_last).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(training.trained("text_encoder").parent)
    text_encoder = text_encoder.float().to(training.device)
    pictures = training.pictures()
    # Edges tell most where the noise hides what they outline.
    batches = NoisyLatents(training, "controlnet", shapes.SIZE, noisier=True)

    def loss(model: EdgesToNoise, generator: torch.Generator) -> Tensor:
        batch = batches.draw(generator)
        edges = edges_of(np.asarray(pictures[batch.numbers.numpy()]))
        with torch.no_grad():
            text = text_encoder(batch.tokens)[0]
        return batch.loss(model(batch, text, edges.to(training.device)))

    def sheet(model: EdgesToNoise, path: Path) -> None:
        frames, captions = shapes.held_out_pictures(8)
        edges = edges_of(frames)
        pipe = StableDiffusionControlNetPipeline.from_pretrained(
            training.model,
            controlnet=model.controlnet,
            safety_checker=None,
            torch_dtype=torch.float32,
        ).to(training.device)
        drawn = draw_pictures(pipe, captions, image=edges, **_sheet_options(training))
        shapes.save_sheet(path, np.concatenate([to_frames(2 * edges - 1), drawn]))

    torch.manual_seed(training.seed)
    model = EdgesToNoise(unet, training.start).to(training.device)
    model.controlnet.to(memory_format=torch.channels_last)
    averaged = train(
        training, "controlnet", model, loss, sheet, training.hashes("vae", "unet", "text_encoder")
    )
    model_files.save_weights(training.model / "controlnet", averaged.controlnet, torch.float16)


def edges_of(frames: np.ndarray) -> Tensor:
    """Canny edges at the thresholds that edits use by default; (n, 3, H, W) float32, 0 or 1."""
    return canny_edges(frames, 100, 200).float().repeat(1, 3, 1, 1)
