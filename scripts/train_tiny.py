"""Train the small model of models/tiny, a Stable Diffusion in small, on the shapes world.

    python scripts/train_tiny.py all --budget gpu      # about ten minutes on one modern GPU
    python scripts/train_tiny.py all --budget cpu      # a few hours on two CPU cores
    python scripts/train_tiny.py unet                  # one part; those before it must be there

The parts, in order: `pictures` renders the training pictures; `vae` trains the AutoencoderKL, and
`unet` the UNet with its text encoder on the latents of the pictures, first of small ones, then of
full-size ones; `controlnet` trains a ControlNet (Canny edges) for it and `judge` a CLIP model of
its own, which tells what pictures show. Each part can be interrupted and goes on where it was; its
state, losses and sample sheets are in the work folder, and what it has learnt (the moving average
of its weights, in float16) goes to the model's folder.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

# Scripts in this folder are run from the repository root, which Python does not search by itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from make_tiny_model import (
    Architecture,
    bpe_vocabulary,
    carry_through,
    ddim_scheduler,
    model_index,
    save_weights,
    unet_blocks,
    write_json,
    write_tokenizer,
)
from shapes_world import BACKGROUNDS, FILLS, SHAPES, random_scene, render
from training import Recipe, train

from conditions import canny_edges
from diffusion import resolve_device
from util import (
    ArgumentParser,
    MissingFileError,
    atomic_file,
    check_writable,
    command_line,
    load_tensors,
    save_tensors,
    setup_logging,
    sha256_file,
)

log = logging.getLogger("tokenflow")

PARTS = ("pictures", "vae", "unet", "controlnet", "judge")
SIZE = 256  # of the pictures; their latents are 32x32
MAX_TOKENS = 32
CHUNK = 512  # pictures per file
NO_TEXT = 0.1  # share of captions that are dropped, for classifier-free guidance
MIN_SNR = 5.0  # Hang et al. 2023: caps the weight of nearly clean latents
# SD's noisiest latents still hold a trace of their picture's mean, and sampling starts from noise
# that holds none: a model that reads the background off that trace draws any background. So the
# means are shifted at random, by a share of the noise's std, and the caption has to tell.
MEAN_SHIFT = 0.05
LATENT_NOISE = 0.05  # std that the VAE's decoder learns to live with
WORDS = ("a", "and", "on", "background", *SHAPES, *FILLS, *BACKGROUNDS)
CANNY_LOW, CANNY_HIGH = 100, 200  # as edits have them by default
JUDGE_SIZE = 64  # of the pictures that the judge sees
HELD_OUT = 1_000_000  # the first seed of scenes that no part is trained on


@dataclass(frozen=True)
class Budget:
    """The amount of everything; the architecture is the same."""

    pictures: int
    recipes: dict[str, Recipe]
    sheet_steps: int = 20  # sampling steps of the pictures on a sample sheet


BUDGETS = {
    "cpu": Budget(
        pictures=16384,
        recipes={
            "vae": Recipe(steps=4500, batch_size=4, learning_rate=2e-3),
            "unet_small": Recipe(steps=2600, batch_size=32, learning_rate=1e-3),
            "unet": Recipe(steps=2000, batch_size=16, learning_rate=1e-3),
            "controlnet": Recipe(steps=250, batch_size=16, learning_rate=1e-3),
            "judge": Recipe(steps=1000, batch_size=128, learning_rate=1e-3),
        },
    ),
    "gpu": Budget(
        pictures=65536,
        recipes={
            "vae": Recipe(steps=4500, batch_size=64, learning_rate=2e-3),
            "unet_small": Recipe(steps=2500, batch_size=256, learning_rate=1.5e-3),
            "unet": Recipe(steps=4500, batch_size=256, learning_rate=1.5e-3),
            "controlnet": Recipe(steps=1000, batch_size=256, learning_rate=5e-4),
            "judge": Recipe(steps=1500, batch_size=512, learning_rate=1e-3),
        },
    ),
    "smoke": Budget(  # a minute in all: shows that every part runs, learns nothing
        pictures=32,
        recipes={
            part: Recipe(steps=4, batch_size=4, learning_rate=1e-4, warmup=2)
            for part in ("vae", "unet_small", "unet", "controlnet", "judge")
        },
        sheet_steps=1,
    ),
}


@dataclass(frozen=True)
class Workshop:
    """Where a training reads and writes, and what it computes with."""

    model: Path  # the model's folder, in diffusers' format
    work: Path
    budget: Budget
    seed: int
    device: torch.device
    dtype: torch.dtype
    sheet_every: int

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        self.write_tokenizer(self.model / "tokenizer")
        return CLIPTokenizer.from_pretrained(self.model / "tokenizer")

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer(folder, *bpe_vocabulary(WORDS), MAX_TOKENS)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(len(captions), MAX_TOKENS) int64."""
        return self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def train(self, name: str, model: nn.Module, loss, sheet) -> nn.Module:
        return train(
            name,
            model,
            loss,
            self.budget.recipes[name],
            self.work / name,
            seed=self.seed,
            dtype=self.dtype,
            sheet=sheet,
            sheet_every=self.sheet_every,
        )


# ----------------------------------------------------------------------------------- pictures


def picture(seed: int, size: int) -> tuple[np.ndarray, str]:
    """The training picture of a seed: a scene at a random time; (size, size, 3) uint8, caption."""
    scene = random_scene(seed)
    time = np.random.default_rng([seed, 1]).random()  # so that all of a clip's poses are seen
    return render(scene, time, (size, size))[0], scene.caption


def make_pictures(shop: Workshop) -> None:
    """Render the training pictures, of both sizes, in files of CHUNK."""
    tasks = [
        (path, first, min(CHUNK, shop.budget.pictures - first), size)
        for size in (SIZE // 2, SIZE)
        for first, path in _picture_files(shop, size)
        if not path.exists()
    ]
    if not tasks:
        log.info("pictures: all %d are there already", shop.budget.pictures)
        return
    processes = min(len(tasks), os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(_render_file, tasks), "pictures", total=len(tasks)):
            pass


def _render_file(task: tuple[Path, int, int, int]) -> None:
    path, first, count, size = task
    with atomic_file(path) as temporary:
        np.save(temporary, np.stack([picture(first + i, size)[0] for i in range(count)]))


def _picture_files(shop: Workshop, size: int) -> Iterator[tuple[int, Path]]:
    for first in range(0, shop.budget.pictures, CHUNK):
        count = min(CHUNK, shop.budget.pictures - first)
        yield first, shop.work / "pictures" / f"{size}_{first:06d}_{count}.npy"


class Pictures:
    """The rendered pictures of one size, read as they are needed; uint8 (size, size, 3) each."""

    def __init__(self, shop: Workshop, size: int = SIZE) -> None:
        self.size = size
        files = [path for _, path in _picture_files(shop, size)]
        for path in files:
            if not path.exists():
                raise MissingFileError(f"{path}: missing; run `train_tiny.py pictures` first")
        self.chunks = [np.load(path, mmap_mode="r") for path in files]
        self.captions = [random_scene(seed).caption for seed in range(shop.budget.pictures)]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.chunks[number // CHUNK][number % CHUNK]

    def batch(self, numbers: Tensor) -> Tensor:
        """(b, 3, size, size) float32 in [-1, 1]."""
        return _to_pixels(np.stack([self[number] for number in numbers.tolist()]))


def _to_pixels(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def _to_frames(pixels: Tensor) -> np.ndarray:
    pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def held_out_pictures(count: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of scenes that are not trained on: (count, SIZE, SIZE, 3) uint8, and captions."""
    frames, captions = zip(*(picture(HELD_OUT + i, SIZE) for i in range(count)), strict=True)
    return np.stack(frames), list(captions)


def save_sheet(path: Path, frames: np.ndarray, columns: int) -> None:
    """Write (n, H, W, 3) uint8 frames as a PNG of rows of `columns`."""
    rows = [np.concatenate(list(row), axis=1) for row in np.split(frames, len(frames) // columns)]
    with atomic_file(path) as temporary:
        cv2.imwrite(str(temporary), np.concatenate(rows)[:, :, ::-1])


# ---------------------------------------------------------------------------------------- VAE


def make_vae() -> AutoencoderKL:
    """Stable Diffusion's VAE in small: factor 8, 4 channels, no attention.

    The posterior is the mean with a fixed, small noise: its log variance is a constant.
    """
    vae = AutoencoderKL(
        sample_size=SIZE,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=2,  # a group's mean is lost, and the colour of a flat picture with it
        latent_channels=4,
        mid_block_add_attention=False,
    )
    carry_through(vae)  # from PyTorch's own weights, colours take it thousands of steps to find
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * np.log(LATENT_NOISE)
    return vae


def train_vae(shop: Workshop) -> None:
    pictures = Pictures(shop)
    recipe = shop.budget.recipes["vae"]
    crop = 128
    examples, _ = held_out_pictures(16)
    sources = _to_pixels(examples).to(shop.device)

    def loss(vae: nn.Module, generator: torch.Generator) -> Tensor:
        numbers = torch.randint(len(pictures), (recipe.batch_size,), generator=generator)
        corners = torch.randint(SIZE - crop + 1, (recipe.batch_size, 2), generator=generator)
        cut = [
            pictures[number][top : top + crop, left : left + crop]
            for number, (top, left) in zip(numbers.tolist(), corners.tolist(), strict=True)
        ]
        pixels = _to_pixels(np.stack(cut)).to(shop.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        mean = vae.encode(pixels).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(shop.device)
        decoded = vae.decode(mean + LATENT_NOISE * noise).sample.float()
        error = decoded - pixels
        return error.abs().mean() + error.square().mean() + 1e-4 * mean.float().square().mean()

    @torch.inference_mode()
    def sheet(vae: AutoencoderKL, path: Path) -> None:
        decoded = vae.decode(vae.encode(sources).latent_dist.mean).sample
        error = (decoded.clamp(-1, 1) - sources).square().mean()
        log.info("vae: %.2f dB on held-out pictures", 10 * torch.log10(4 / error))
        save_sheet(path, np.concatenate([examples[:8], _to_frames(decoded)[:8]]), columns=8)

    torch.manual_seed(shop.seed)
    model = make_vae().to(shop.device, memory_format=torch.channels_last)
    vae = shop.train("vae", model, loss, sheet)
    latents = _encode(vae, pictures, min(1024, len(pictures)), shop)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    save_weights(shop.model / "vae", vae, torch.float16)
    log.info("vae: latents have std %.3f before scaling", latents.std())


@torch.inference_mode()
def _encode(vae: AutoencoderKL, pictures: Pictures, count: int, shop: Workshop) -> Tensor:
    """Unscaled latents of the first pictures, (count, 4, h, w) float32 on the CPU."""
    latents = []
    for chunk in tqdm(torch.arange(count).split(16), f"latents at {pictures.size}"):
        pixels = pictures.batch(chunk).to(shop.device, memory_format=torch.channels_last)
        with torch.autocast(shop.device.type, shop.dtype, enabled=shop.dtype != torch.float32):
            mean = vae.encode(pixels).latent_dist.mean
        latents.append(mean.float().cpu())
    return torch.cat(latents)


def load_vae(shop: Workshop) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(shop.model / "vae").float().eval()
    return vae.to(shop.device, memory_format=torch.channels_last)


def _latents(shop: Workshop, size: int) -> Tensor:
    """Scaled latents of all pictures, (n, 4, h, w) float16; kept under the VAE's hash."""
    pictures = Pictures(shop, size)
    weights = shop.model / "vae" / "diffusion_pytorch_model.safetensors"
    path = shop.work / f"latents_{size}_{len(pictures)}_{sha256_file(weights)[:12]}.safetensors"
    if not path.exists():
        vae = load_vae(shop)
        latents = _encode(vae, pictures, len(pictures), shop) * vae.config.scaling_factor
        save_tensors(path, {"latents": latents.half()})
    return load_tensors(path)["latents"]


# ----------------------------------------------------------------------- UNet and text encoder

WIDTH = 128  # of the text encoder
UNET = Architecture(
    unet={
        "sample_size": SIZE // 8,
        "block_out_channels": (32, 64, 128, 128),
        "attention_head_dim": (1, 2, 4, 4),  # diffusers' name for the number of heads
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    },
    vae={},
    text={},
    hint_channels=(8, 16, 32, 64),
)


class TextToNoise(nn.Module):
    """The UNet and the text encoder, which are trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config(tokenizer, layers=2))
        self.unet = unet_blocks(UNET, in_channels=4)

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(tokens)[0]).sample


def text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_unet(shop: Workshop) -> None:
    """Train the UNet and its text encoder, at half the size first, where a step is cheap."""
    torch.manual_seed(shop.seed)
    model = TextToNoise(shop.tokenizer).to(shop.device)
    model.unet.to(memory_format=torch.channels_last)
    for name, size in (("unet_small", SIZE // 2), ("unet", SIZE)):
        batches = NoisyLatents(shop, size, shop.budget.recipes[name].batch_size)
        averaged = shop.train(
            name,
            model,
            partial(_noise_loss, batches),
            lambda averaged, path, size=size: _text_sheet(shop, averaged, size, path),
        )
        model.load_state_dict(averaged.state_dict())
    save_weights(shop.model / "unet", averaged.unet, torch.float16)
    save_weights(shop.model / "text_encoder", averaged.text_encoder, torch.float16)
    ddim_scheduler("base").save_pretrained(shop.model / "scheduler")
    write_json(shop.model / "model_index.json", model_index("base"))


def _noise_loss(batches: NoisyLatents, model: TextToNoise, generator: torch.Generator) -> Tensor:
    batch = batches.draw(generator)
    return batch.loss(model(batch.noisy, batch.timesteps, batch.tokens))


class NoisyLatents:
    """Draws what a noise prediction is trained on: noisy latents, their captions and the noise."""

    def __init__(self, shop: Workshop, size: int, batch_size: int) -> None:
        self.latents = _latents(shop, size).to(shop.device)
        captions = [random_scene(seed).caption for seed in range(len(self.latents))]
        self.tokens = shop.tokens([*captions, ""]).to(shop.device)
        self.alphas_squared = ddim_scheduler("base").alphas_cumprod.to(shop.device)
        self.batch_size = batch_size
        self.device = shop.device

    def draw(self, generator: torch.Generator) -> Batch:
        count = (self.batch_size,)
        numbers = torch.randint(len(self.latents), count, generator=generator)
        timesteps = torch.randint(len(self.alphas_squared), count, generator=generator)
        has_text = torch.rand(count, generator=generator) >= NO_TEXT
        noise = torch.randn(*count, *self.latents.shape[1:], generator=generator).to(self.device)
        shift = MEAN_SHIFT * torch.randn(*count, 4, 1, 1, generator=generator).to(self.device)
        timesteps = timesteps.to(self.device)
        alpha_squared = self.alphas_squared[timesteps].view(-1, 1, 1, 1)
        clean = self.latents[numbers.to(self.device)].float()
        noisy = alpha_squared.sqrt() * clean + (1 - alpha_squared).sqrt() * (noise + shift)
        captions = numbers.where(has_text, len(self.latents))
        return Batch(
            numbers=numbers,
            noisy=noisy.contiguous(memory_format=torch.channels_last),
            timesteps=timesteps,
            tokens=self.tokens[captions.to(self.device)],
            noise=noise,
            snr=alpha_squared / (1 - alpha_squared),
        )


@dataclass(frozen=True)
class Batch:
    """One batch of `NoisyLatents`.

    numbers: (b,) of the pictures.
    noisy, noise: (b, 4, h, w).
    timesteps: (b,).
    tokens: (b, MAX_TOKENS), of no text where the caption was dropped.
    snr: (b, 1, 1, 1), alpha_t^2 / sigma_t^2.
    """

    numbers: Tensor
    noisy: Tensor
    timesteps: Tensor
    tokens: Tensor
    noise: Tensor
    snr: Tensor

    def loss(self, predicted: Tensor) -> Tensor:
        """The mean squared error of predicted noise, with Min-SNR weights."""
        weight = self.snr.clamp(max=MIN_SNR) / self.snr
        return (weight * (predicted.float() - self.noise).square()).mean()


def _text_sheet(shop: Workshop, model: TextToNoise, size: int, path: Path) -> None:
    """Pictures of held-out captions, which are printed in the log file of the same name."""
    captions = [random_scene(HELD_OUT + i).caption for i in range(16)]
    pipe = StableDiffusionPipeline(
        vae=load_vae(shop),
        text_encoder=model.text_encoder,
        tokenizer=shop.tokenizer,
        unet=model.unet,
        scheduler=ddim_scheduler("base"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator(shop.device).manual_seed(0)
    frames = pipe(captions, size, size, generator=generator, **_sheet_options(shop)).images
    save_sheet(path, (frames * 255).round().astype(np.uint8), columns=8)
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def _sheet_options(shop: Workshop) -> dict:
    steps = shop.budget.sheet_steps
    return {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "np"}


# --------------------------------------------------------------------------------- ControlNet


class EdgesToNoise(nn.Module):
    """A ControlNet in training beside the finished UNet, which stays as it is."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.controlnet = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=UNET.hint_channels
        )
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


def train_controlnet(shop: Workshop) -> None:
    unet = UNet2DConditionModel.from_pretrained(shop.model / "unet").float()
    unet = unet.to(shop.device, memory_format=torch.channels_last).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(shop.model / "text_encoder")
    text_encoder = text_encoder.float().to(shop.device)
    pictures = Pictures(shop)
    batches = NoisyLatents(shop, SIZE, shop.budget.recipes["controlnet"].batch_size)

    def loss(model: EdgesToNoise, generator: torch.Generator) -> Tensor:
        batch = batches.draw(generator)
        edges = edges_of(np.stack([pictures[number] for number in batch.numbers.tolist()]))
        with torch.no_grad():
            text = text_encoder(batch.tokens)[0]
        return batch.loss(model(batch, text, edges.to(shop.device)))

    def sheet(model: EdgesToNoise, path: Path) -> None:
        frames, captions = held_out_pictures(8)
        edges = edges_of(frames)
        pipe = StableDiffusionControlNetPipeline.from_pretrained(
            shop.model,
            controlnet=model.controlnet,
            safety_checker=None,
            torch_dtype=torch.float32,
        ).to(shop.device)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator(shop.device).manual_seed(0)
        drawn = pipe(captions, image=edges, generator=generator, **_sheet_options(shop)).images
        drawn = (drawn * 255).round().astype(np.uint8)
        save_sheet(path, np.concatenate([_to_frames(2 * edges - 1), drawn]), columns=8)

    torch.manual_seed(shop.seed)
    model = EdgesToNoise(unet).to(shop.device)
    model.controlnet.to(memory_format=torch.channels_last)
    averaged = shop.train("controlnet", model, loss, sheet)
    save_weights(shop.model / "controlnet", averaged.controlnet, torch.float16)


def edges_of(frames: np.ndarray) -> Tensor:
    """Canny edges at the thresholds that edits use by default; (n, 3, H, W) float32, 0 or 1."""
    return canny_edges(frames, CANNY_LOW, CANNY_HIGH)


# -------------------------------------------------------------------------------------- judge


def train_judge(shop: Workshop) -> None:
    """Train a CLIP model on the captions; pictures of one caption are all right for each other."""
    pictures = Pictures(shop)
    recipe = shop.budget.recipes["judge"]
    processor = CLIPImageProcessor(
        size={"shortest_edge": JUDGE_SIZE},
        crop_size={"height": JUDGE_SIZE, "width": JUDGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    pixels = torch.cat(
        [
            _judge_pixels(processor, chunk).half()
            for chunk in tqdm(pictures.chunks, f"pictures at {JUDGE_SIZE}")
        ]
    )
    tokens = shop.tokens(pictures.captions)
    caption_numbers = {caption: i for i, caption in enumerate(dict.fromkeys(pictures.captions))}
    labels = torch.tensor([caption_numbers[caption] for caption in pictures.captions])
    frames, captions = held_out_pictures(256)
    examples = _judge_pixels(processor, frames).to(shop.device)

    def loss(model: CLIPModel, generator: torch.Generator) -> Tensor:
        numbers = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        batch = pixels[numbers].float()
        mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        batch = batch.flip(-1).where(mirrored, batch)
        batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
        similarity = model(
            input_ids=tokens[numbers].to(shop.device), pixel_values=batch.to(shop.device)
        ).logits_per_image.float()
        same = (labels[numbers][:, None] == labels[numbers]).float().to(shop.device)
        target = same / same.sum(dim=1, keepdim=True)
        return 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target))

    @torch.inference_mode()
    def sheet(model: CLIPModel, path: Path) -> None:
        choices = sorted(set(captions))
        similarity = model(
            input_ids=shop.tokens(choices).to(shop.device), pixel_values=examples
        ).logits_per_image
        right = sum(
            choices[best] == caption
            for best, caption in zip(similarity.argmax(1).tolist(), captions, strict=True)
        )
        log.info(
            "judge: %.1f %% of held-out pictures found their caption among %d",
            100 * right / len(captions),
            len(choices),
        )

    torch.manual_seed(shop.seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=JUDGE_SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    text = text_config(shop.tokenizer, layers=2)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH
    )
    model = CLIPModel(config).to(shop.device)
    judge = shop.train("judge", model, loss, sheet)
    save_weights(shop.model / "judge", judge, torch.float16)
    processor.save_pretrained(shop.model / "judge")
    shop.write_tokenizer(shop.model / "judge")


def _judge_pixels(processor: CLIPImageProcessor, frames: np.ndarray) -> Tensor:
    """(n, 3, JUDGE_SIZE, JUDGE_SIZE) float32."""
    return processor(images=list(frames), return_tensors="pt").pixel_values


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("all", *PARTS))
    parser.add_argument("--model", type=Path, default=Path("models/tiny"), help="folder to fill")
    parser.add_argument(
        "--work", type=Path, default=Path("latents/tiny-training"), help="folder of all else"
    )
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="bfloat16 is mixed precision; auto: that on CUDA, float32 elsewhere",
    )
    parser.add_argument("--sheet_every", type=int, default=500, help="steps (default: 500)")
    args = parser.parse_args(argv)
    setup_logging()
    check_writable(args.model, "--model")
    check_writable(args.work, "--work")
    device = resolve_device(args.device)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    shop = Workshop(
        model=args.model,
        work=args.work,
        budget=BUDGETS[args.budget],
        seed=args.seed,
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
        sheet_every=args.sheet_every,
    )
    for part, run in TRAINERS.items():
        if args.part in ("all", part):
            run(shop)


TRAINERS = {
    "pictures": make_pictures,
    "vae": train_vae,
    "unet": train_unet,
    "controlnet": train_controlnet,
    "judge": train_judge,
}

if __name__ == "__main__":
    command_line(main)
