"""What the training of all parts of the small model shares: sizes, folders and the tokenizer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from scripts.shapes.pictures import SIZE, open_pictures, scene_of_picture, world_version
from scripts.shapes.textures import TEXTURES
from scripts.shapes.world import BACKGROUNDS, FILLS, SHAPES
from scripts.tiny_model.model_files import bpe_vocabulary, text_config, write_tokenizer
from tokenflow.diffusion.checkpoints import checkpoint_revision
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.yaml_files import load_yaml
from util import MissingFileError, sha256_file

MAX_TOKENS = 32
WORDS = ("a", "and", "on", "background", *SHAPES, *FILLS, *BACKGROUNDS, *TEXTURES)
VOCABULARY, MERGES = bpe_vocabulary(WORDS)


class Recipe(Model):
    """How one part is trained.

    The learning rate rises linearly over `warmup` steps and falls to zero along a cosine. A run may
    be resumed with more `steps` (the learning rate then jumps back to the longer cosine), and with
    no other change.
    """

    BETAS: ClassVar = (0.9, 0.99)  # of AdamW

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float
    warmup: int = Field(200, ge=1)
    weight_decay: float = 0.01

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, ... `steps` - 1."""
        rise = min((step + 1) / self.warmup, 1.0)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def share_of_newest(self, n: int) -> float:
        """The weight of the weights after step n in their moving average.

        The average's window grows with the run: it is about the last tenth of its steps.
        """
        return 10 / (10 + n)


class Budget(Model):
    """The amount of everything; the architecture is the same."""

    pictures: int
    sheet_steps: int
    recipes: dict[str, Recipe]


_BUDGETS_FILE = Path(__file__).with_name("budgets.yaml")
BUDGETS = {
    name: parse(Budget, budget, f"{_BUDGETS_FILE}: {name}")
    for name, budget in load_yaml(_BUDGETS_FILE).items()
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
    start: Path | None = None  # the folder of a model whose weights the training begins with

    @property
    def autocast(self) -> torch.autocast:
        """The context that models compute in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @cached_property
    def world(self) -> str:
        return world_version()

    @property
    def pictures_folder(self) -> Path:
        return self.work / f"pictures_{self.world}"

    def pictures(self, size: int = SIZE) -> np.ndarray:
        """(n, size, size, 3) uint8, read as they are needed."""
        return open_pictures(self.pictures_folder, self.budget.pictures, size)

    def captions(self) -> list[str]:
        """The caption of every picture."""
        return [scene_of_picture(n).caption for n in range(self.budget.pictures)]

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        with tempfile.TemporaryDirectory() as folder:
            self.write_tokenizer(Path(folder))
            return CLIPTokenizer.from_pretrained(folder)

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer(folder, VOCABULARY, MERGES, MAX_TOKENS)

    def text_config(self) -> CLIPTextConfig:
        return text_config("trained", VOCABULARY, MAX_TOKENS)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(len(captions), MAX_TOKENS) int64, on the device."""
        given = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(captions), **given).input_ids.to(self.device)

    def trained(self, part: str) -> Path:
        """The weights of a part that is trained already."""
        if weights := list((self.model / part).glob("*.safetensors")):
            return weights[0]
        first = {"text_encoder": "unet"}.get(part, part)
        raise MissingFileError(
            f"{self.model / part}: missing; run `python -m scripts.tiny_model.train {first}` first"
        )

    @cached_property
    def _start_revision(self) -> str | None:
        return checkpoint_revision(self.start) if self.start else None

    def hashes(self, *parts: str) -> dict[str, str | None]:
        """What a part learns from: the world, the model that it begins with, and the weights of the
        parts before it.
        """
        weights = {part: sha256_file(self.trained(part))[:12] for part in parts}
        return {"world": self.world, "start": self._start_revision} | weights
