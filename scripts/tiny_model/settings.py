"""What the training of all parts of the small model shares: sizes, folders and the tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from scripts.shapes.pictures import SIZE, Pictures, world_version
from scripts.shapes.world import BACKGROUNDS, FILLS, SHAPES
from scripts.tiny_model.model_files import bpe_vocabulary, write_tokenizer
from scripts.tiny_model.trainer import Loss, Recipe, Sheet, train
from util import MissingFileError, sha256_file

MAX_TOKENS = 32

WIDTH = 128  # of the text encoder, and of both towers of the judge

WORDS = ("a", "and", "on", "background", *SHAPES, *FILLS, *BACKGROUNDS)


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
class Training:
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
                f"{folder}: missing; run `python -m "
                f"scripts.tiny_model.train {parts.get(part, part)}` first"
            )
        return folder

    def hashes(self, *parts: str) -> dict[str, str]:
        """What a part learns from: the world, and the weights of the parts before it."""
        weights = {part: next(self.trained(part).glob("*.safetensors")) for part in parts}
        return {"world": self.world} | {
            part: sha256_file(path)[:12] for part, path in weights.items()
        }

    def train(
        self, name: str, model: nn.Module, loss: Loss, sheet: Sheet, inputs: dict[str, str]
    ) -> nn.Module:
        """Train one part, see `trainer.train`."""
        recipe, folder = self.budget.recipes[name], self.work / name
        own = {"seed": self.seed, "dtype": self.dtype, "sheet_every": self.sheet_every}
        return train(name, model, loss, recipe, folder, inputs=inputs, sheet=sheet, **own)


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
