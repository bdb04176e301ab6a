"""Train the small model of models/tiny, a Stable Diffusion in small, on the shapes world.

    python -m scripts.tiny_model.train all               # a few hours on two CPU cores
    python -m scripts.tiny_model.train all --budget gpu  # larger batches; not timed yet
    python -m scripts.tiny_model.train unet              # one part; needs those before it

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
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

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

from scripts.shapes.pictures import (
    HELD_OUT,
    SIZE,
    Pictures,
    held_out_pictures,
    picture,
    render_pictures,
    save_sheet,
    to_frames,
    to_pixels,
    world_version,
)
from scripts.shapes.world import BACKGROUNDS, FILLS, SHAPES, random_scene
from scripts.tiny_model.make_random import (
    bpe_vocabulary,
    carry_through,
    ddim_scheduler,
    model_index,
    save_weights,
    unet_blocks,
    write_json,
    write_tokenizer,
)
from scripts.tiny_model.trainer import Recipe, train
from tokenflow.diffusion.conditions import canny_edges
from tokenflow.diffusion.models import resolve_device
from util import (
    ArgumentParser,
    MissingFileError,
    UserError,
    check_writable,
    command_line,
    load_tensors,
    save_tensors,
    setup_logging,
    sha256_file,
)

log = logging.getLogger("tokenflow")

MAX_TOKENS = 32
NO_TEXT = 0.1  # share of captions that are dropped, for classifier-free guidance
MIN_SNR = 5.0  # Hang et al. 2023: caps the weight of nearly clean latents
# SD's noisiest latents still hold a trace of their picture's mean, and sampling starts from noise
# that holds none: a model that reads the background off that trace draws any background. So the
# noise's mean is shifted at random (std, as a share of the noise's), which drowns the trace and
# leaves it to the caption. The shift is noise like the rest, to be predicted with it.
MEAN_SHIFT = 0.1
LATENT_NOISE = 0.05  # std that the VAE's decoder learns to live with
WORDS = ("a", "and", "on", "background", *SHAPES, *FILLS, *BACKGROUNDS)
CANNY_LOW, CANNY_HIGH = 100, 200  # as edits have them by default
JUDGE_SIZE, PATCH = 64, 8  # of the pictures that the judge sees, and of what it cuts them into
GROUPS = 4  # of look-alikes in a batch of the judge's training


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
            "unet": Recipe(steps=5000, batch_size=16, learning_rate=1e-3),
            "controlnet": Recipe(steps=300, batch_size=16, learning_rate=1e-3, warmup=50),
            "judge": Recipe(steps=1500, batch_size=128, learning_rate=1e-3),
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
    def world(self) -> str:
        return world_version()

    @property
    def pictures_folder(self) -> Path:
        return self.work / f"pictures_{self.world}"

    def pictures(self, size: int = SIZE) -> Pictures:
        return Pictures(self.pictures_folder, self.budget.pictures, size)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        with tempfile.TemporaryDirectory() as folder:
            self.write_tokenizer(Path(folder))
            return CLIPTokenizer.from_pretrained(folder)

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

    def trained(self, part: str) -> Path:
        """The folder of a part that is trained already."""
        folder = self.model / part
        if not list(folder.glob("*.safetensors")):
            parts = {"text_encoder": "unet"}
            raise MissingFileError(
                f"{folder}: missing; run `train_tiny.py {parts.get(part, part)}` first"
            )
        return folder

    def hashes(self, *parts: str) -> dict[str, str]:
        """What a part learns from: the world, and the weights of the parts before it."""
        weights = {part: next(self.trained(part).glob("*.safetensors")) for part in parts}
        return {"world": self.world} | {
            part: sha256_file(path)[:12] for part, path in weights.items()
        }

    def train(
        self,
        name: str,
        model: nn.Module,
        loss: Callable[[nn.Module, torch.Generator], Tensor],
        sheet: Callable[[nn.Module, Path], None],
        inputs: dict[str, str],
    ) -> nn.Module:
        return train(
            name,
            model,
            loss,
            self.budget.recipes[name],
            self.work / name,
            seed=self.seed,
            inputs=inputs,
            dtype=self.dtype,
            sheet=sheet,
            sheet_every=self.sheet_every,
        )


# ----------------------------------------------------------------------------------- pictures


def make_pictures(shop: Workshop) -> None:
    made = render_pictures(shop.pictures_folder, shop.budget.pictures, (SIZE // 2, SIZE))
    if not made:
        log.info("pictures: all %d are there already", shop.budget.pictures)


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
    pictures = shop.pictures()
    recipe = shop.budget.recipes["vae"]
    crop = 128
    examples, _ = held_out_pictures(16)
    sources = to_pixels(examples).to(shop.device)

    def loss(vae: nn.Module, generator: torch.Generator) -> Tensor:
        numbers = torch.randint(len(pictures), (recipe.batch_size,), generator=generator)
        corners = torch.randint(SIZE - crop + 1, (recipe.batch_size, 2), generator=generator)
        cut = [
            pictures[number][top : top + crop, left : left + crop]
            for number, (top, left) in zip(numbers.tolist(), corners.tolist(), strict=True)
        ]
        pixels = to_pixels(np.stack(cut)).to(shop.device)
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
        save_sheet(path, np.concatenate([examples[:8], to_frames(decoded)[:8]]), columns=8)

    torch.manual_seed(shop.seed)
    model = make_vae().to(shop.device, memory_format=torch.channels_last)
    vae = shop.train("vae", model, loss, sheet, shop.hashes())
    latents = _encode(vae, pictures, min(1024, len(pictures)), shop)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    save_weights(shop.model / "vae", vae, torch.float16)
    log.info("vae: latents have std %.3f before scaling", latents.std())


@torch.inference_mode()
def _encode(vae: AutoencoderKL, pictures: Pictures, count: int, shop: Workshop) -> Tensor:
    """Unscaled latents of the first pictures, (count, 4, h, w) float32 on the CPU."""
    latents = []
    for chunk in tqdm(torch.arange(count).split(16), f"latents at {pictures.size}"):
        pixels = to_pixels(np.stack([pictures[number] for number in chunk.tolist()]))
        pixels = pixels.to(shop.device, memory_format=torch.channels_last)
        with torch.autocast(shop.device.type, shop.dtype, enabled=shop.dtype != torch.float32):
            mean = vae.encode(pixels).latent_dist.mean
        latents.append(mean.float().cpu())
    return torch.cat(latents)


def load_vae(shop: Workshop) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(shop.trained("vae")).float().eval()
    return vae.to(shop.device, memory_format=torch.channels_last)


def _latents(shop: Workshop, size: int) -> Tensor:
    """Scaled latents of all pictures, (n, 4, h, w) float16; kept under what they come from."""
    versions = "_".join(shop.hashes("vae").values())
    path = shop.work / f"latents_{size}_{shop.budget.pictures}_{versions}.safetensors"
    if not path.exists():
        pictures = shop.pictures(size)
        vae = load_vae(shop)
        latents = _encode(vae, pictures, len(pictures), shop) * vae.config.scaling_factor
        save_tensors(path, {"latents": latents.half()})
    return load_tensors(path)["latents"]


# ----------------------------------------------------------------------- UNet and text encoder

WIDTH = 128  # of the text encoder, and of both towers of the judge
UNET = {
    "sample_size": SIZE // 8,
    "block_out_channels": (32, 64, 128, 128),
    "attention_head_dim": (1, 2, 4, 4),  # diffusers' name for the number of heads
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
HINT_CHANNELS = (8, 16, 32, 64)  # of the ControlNet's embedding of its picture


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
    inputs = shop.hashes("vae")
    for name, size in (("unet_small", SIZE // 2), ("unet", SIZE)):
        batches = NoisyLatents(shop, size, shop.budget.recipes[name].batch_size)
        averaged = shop.train(
            name,
            model,
            partial(_noise_loss, batches),
            lambda averaged, path, size=size: _text_sheet(shop, averaged, size, path),
            inputs,
        )
        inputs |= {name: sha256_file(shop.work / name / "state.safetensors")[:12]}
        model.load_state_dict(averaged.state_dict())
    save_weights(shop.model / "unet", averaged.unet, torch.float16)
    save_weights(shop.model / "text_encoder", averaged.text_encoder, torch.float16)
    shop.write_tokenizer(shop.model / "tokenizer")
    ddim_scheduler("base").save_pretrained(shop.model / "scheduler")
    write_json(shop.model / "model_index.json", model_index("base"))


def _noise_loss(batches: NoisyLatents, model: TextToNoise, generator: torch.Generator) -> Tensor:
    batch = batches.draw(generator)
    return batch.loss(model(batch.noisy, batch.timesteps, batch.tokens))


class NoisyLatents:
    """Draws what a noise prediction is trained on: noisy latents, their captions and the noise.

    Timesteps are drawn evenly, or more of the noisier ones (as the larger of two draws is).
    """

    def __init__(self, shop: Workshop, size: int, batch_size: int, noisier: bool = False) -> None:
        self.latents = _latents(shop, size).to(shop.device)
        captions = [random_scene(seed).caption for seed in range(len(self.latents))]
        self.tokens = shop.tokens([*captions, ""]).to(shop.device)
        self.alphas_squared = ddim_scheduler("base").alphas_cumprod.to(shop.device)
        self.batch_size = batch_size
        self.noisier = noisier
        self.device = shop.device

    def draw(self, generator: torch.Generator) -> Batch:
        count = (self.batch_size,)
        numbers = torch.randint(len(self.latents), count, generator=generator)
        timesteps = torch.randint(len(self.alphas_squared), count, generator=generator)
        if self.noisier:
            other = torch.randint(len(self.alphas_squared), count, generator=generator)
            timesteps = timesteps.maximum(other)
        has_text = torch.rand(count, generator=generator) >= NO_TEXT
        noise = torch.randn(*count, *self.latents.shape[1:], generator=generator)
        noise += MEAN_SHIFT * torch.randn(*count, 4, 1, 1, generator=generator)
        noise = noise.to(self.device)
        timesteps = timesteps.to(self.device)
        alpha_squared = self.alphas_squared[timesteps].view(-1, 1, 1, 1)
        clean = self.latents[numbers.to(self.device)].float()
        noisy = alpha_squared.sqrt() * clean + (1 - alpha_squared).sqrt() * noise
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
    """Pictures of held-out captions, which are in the text file of the same name."""
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
    """A ControlNet in training beside the finished UNet, which stays as it is.

    Its embedding of edges begins with weights under which they keep their strength: by PyTorch's
    and diffusers' own, edges fade from layer to layer to exactly zero, which learns slowly.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.controlnet = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=HINT_CHANNELS
        )
        embedding = self.controlnet.controlnet_cond_embedding
        for conv in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
            nn.init.kaiming_normal_(conv.weight)
        with torch.no_grad():
            example = edges_of(np.stack([picture(number, SIZE)[0] for number in range(8)]))
            embedding.conv_out.weight /= embedding(example).std()
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
    unet = UNet2DConditionModel.from_pretrained(shop.trained("unet")).float()
    unet = unet.to(shop.device, memory_format=torch.channels_last).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(shop.trained("text_encoder"))
    text_encoder = text_encoder.float().to(shop.device)
    pictures = shop.pictures()
    # Edges tell most where the noise hides what they outline.
    batch_size = shop.budget.recipes["controlnet"].batch_size
    batches = NoisyLatents(shop, SIZE, batch_size, noisier=True)

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
        save_sheet(path, np.concatenate([to_frames(2 * edges - 1), drawn]), columns=8)

    torch.manual_seed(shop.seed)
    model = EdgesToNoise(unet).to(shop.device)
    model.controlnet.to(memory_format=torch.channels_last)
    averaged = shop.train(
        "controlnet", model, loss, sheet, shop.hashes("vae", "unet", "text_encoder")
    )
    save_weights(shop.model / "controlnet", averaged.controlnet, torch.float16)


def edges_of(frames: np.ndarray) -> Tensor:
    """Canny edges at the thresholds that edits use by default; (n, 3, H, W) float32, 0 or 1."""
    return canny_edges(frames, CANNY_LOW, CANNY_HIGH)


# -------------------------------------------------------------------------------------- judge


def train_judge(shop: Workshop) -> None:
    """Train a CLIP model on the captions; a caption is right for all pictures that have it."""
    recipe = shop.budget.recipes["judge"]
    processor = CLIPImageProcessor(
        size={"shortest_edge": JUDGE_SIZE},
        crop_size={"height": JUDGE_SIZE, "width": JUDGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    pictures = shop.pictures()
    pixels = torch.cat(
        [
            _judge_pixels(processor, chunk).half()
            for chunk in tqdm(pictures.chunks, f"pictures at {JUDGE_SIZE}")
        ]
    )
    captions = pictures.captions()
    tokens = shop.tokens(captions)
    caption_numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([caption_numbers[caption] for caption in captions])
    groups = _look_alikes(len(pictures))

    def loss(model: CLIPModel, generator: torch.Generator) -> Tensor:
        numbers = _draw_alike(groups, recipe.batch_size, generator)
        batch = pixels[numbers].float()
        mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        batch = _shifted(batch.flip(-1).where(mirrored, batch), generator)
        batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
        similarity = model(
            input_ids=tokens[numbers].to(shop.device), pixel_values=batch.to(shop.device)
        ).logits_per_image.float()
        same = (labels[numbers][:, None] == labels[numbers]).float().to(shop.device)
        target = same / same.sum(dim=1, keepdim=True)
        return 0.5 * (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target))

    torch.manual_seed(shop.seed)
    judge = shop.train(
        "judge",
        CLIPModel(_judge_config(shop.tokenizer)).to(shop.device),
        loss,
        _JudgeSheet(shop, processor),
        shop.hashes(),
    )
    save_weights(shop.model / "judge", judge, torch.float16)
    processor.save_pretrained(shop.model / "judge")
    shop.write_tokenizer(shop.model / "judge")


def _judge_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=JUDGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = text_config(tokenizer, layers=2)
    return CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH
    )


class _JudgeSheet:
    """Draws held-out pictures; the text file of the same name has the captions found for them."""

    def __init__(self, shop: Workshop, processor: CLIPImageProcessor) -> None:
        self.shop = shop
        self.frames, self.captions = held_out_pictures(256)
        self.pixels = _judge_pixels(processor, self.frames).to(shop.device)

    @torch.inference_mode()
    def __call__(self, model: CLIPModel, path: Path) -> None:
        choices = sorted(set(self.captions))
        similarity = model(
            input_ids=self.shop.tokens(choices).to(self.shop.device), pixel_values=self.pixels
        ).logits_per_image
        found = [choices[best] for best in similarity.argmax(dim=1).tolist()]
        right = sum(map(str.__eq__, found, self.captions))
        log.info(
            "judge: %.1f %% of held-out pictures found their caption among %d",
            100 * right / len(found),
            len(choices),
        )
        save_sheet(path, self.frames[:16], columns=8)
        path.with_suffix(".txt").write_text("\n".join(found[:16]) + "\n", encoding="utf-8")


def _shifted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to a patch, wrapping round the edges.

    Else the judge learns by heart how the patches happen to cut each picture.
    """
    side, picture = torch.arange(JUDGE_SIZE), torch.arange(len(pictures))
    by = torch.randint(-PATCH, PATCH + 1, (2, len(pictures), 1), generator=generator)
    rows, columns = (by + side) % JUDGE_SIZE
    cells = pictures[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cells.permute(0, 3, 1, 2)


def _look_alikes(count: int) -> list[Tensor]:
    """The numbers of the pictures that share the background and the first object's colour."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number in range(count):
        scene = random_scene(number)
        groups.setdefault((scene.background, scene.objects[0].color), []).append(number)
    return [torch.tensor(group) for group in groups.values()]


def _draw_alike(groups: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """A batch's numbers, (count,), from only GROUPS of the groups.

    Within a group only fills and shapes tell pictures apart. In a batch drawn from all pictures,
    colours nearly always do, and shapes are learnt very slowly.
    """
    chosen = torch.randperm(len(groups), generator=generator)[:GROUPS]
    picks = chosen[torch.randint(len(chosen), (count,), generator=generator)]
    places = torch.rand(count, generator=generator)
    return torch.stack(
        [
            groups[pick][int(place * len(groups[pick]))]
            for pick, place in zip(picks.tolist(), places.tolist(), strict=True)
        ]
    )


def _judge_pixels(processor: CLIPImageProcessor, frames: np.ndarray) -> Tensor:
    """(n, 3, JUDGE_SIZE, JUDGE_SIZE) float32."""
    return processor(images=list(frames), return_tensors="pt").pixel_values


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("all", *TRAINERS))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("latents/tiny-training"),
        help="folder of pictures, states and sheets (default: latents/tiny-training)",
    )
    parser.add_argument("--model", type=Path, help="folder to fill (default: WORK/model)")
    parser.add_argument(
        "--budget", choices=tuple(BUDGETS), default="cpu", help="how much of all (default: cpu)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="bfloat16 is mixed precision; auto: that on CUDA, float32 elsewhere",
    )
    parser.add_argument("--sheet_every", type=int, default=500, help="steps (default: 500)")
    args = parser.parse_args(argv)
    for name, low in (("seed", 0), ("sheet_every", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: expected at least {low}, got {getattr(args, name)}")
    setup_logging()
    model = args.model or args.work / "model"
    check_writable(model, "--model")
    check_writable(args.work, "--work")
    device = resolve_device(args.device)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    shop = Workshop(
        model=model,
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
