"""Trains the judge of the small model: a CLIP model that tells what pictures show."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from scripts.shapes.pictures import held_out_pictures, save_sheet, scene_of_picture
from scripts.shapes.world import SHAPES
from scripts.tiny_model.model_files import NETWORKS, load_text_model, save_weights
from scripts.tiny_model.settings import VOCABULARY, Training
from scripts.tiny_model.trainer import train

log = logging.getLogger("tokenflow")

VISION = NETWORKS["judge"]
JUDGE_SIZE = VISION["image_size"]  # of the pictures that the judge sees
PATCH = VISION["patch_size"]  # of what it cuts them into

GROUPS = 4  # of look-alikes in a batch of the judge's training


def train_judge(training: Training) -> None:
    """Train a CLIP model on the captions; a caption is right for all pictures that have it."""
    recipe = training.budget.recipes["judge"]
    processor = CLIPImageProcessor(
        size={"shortest_edge": JUDGE_SIZE},
        crop_size={"height": JUDGE_SIZE, "width": JUDGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    pictures = training.pictures()
    parts = np.split(pictures, range(512, len(pictures), 512))
    parts = tqdm(parts, f"pictures at {JUDGE_SIZE}")
    pixels = torch.cat([_judge_pixels(processor, np.array(part)).half() for part in parts])
    captions = training.captions()
    longest = max(len(caption.split()) for caption in captions) + 2  # with the start and the end
    tokens = training.tokens(captions)[:, :longest]
    labels = torch.from_numpy(np.unique(captions, return_inverse=True)[1])
    shapes = torch.tensor([VOCABULARY[f"{shape}</w>"] for shape in SHAPES], device=tokens.device)
    groups = _look_alikes(len(pictures))

    def loss(model: CLIPModel, generator: torch.Generator) -> Tensor:
        numbers = _draw_alike(groups, recipe.batch_size, generator)
        batch = pixels[numbers].float()
        mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        batch = _shifted(batch.flip(-1).where(mirrored, batch), generator)
        batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
        asked, count = tokens[numbers], len(numbers)
        others = _other_shapes(asked, shapes)
        every = model(
            input_ids=torch.cat([asked, others.flatten(0, 1)]),
            pixel_values=batch.to(training.device),
        ).logits_per_image.float()
        similarity = every[:, :count]
        by_shape = every[:, count:].unflatten(1, (count, len(shapes))).diagonal().T
        right = (others == asked[:, None]).all(dim=2).float().argmax(dim=1)
        same = (labels[numbers][:, None] == labels[numbers]).float().to(training.device)
        target = same / same.sum(dim=1, keepdim=True)
        found = F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)
        return 0.5 * found + F.cross_entropy(by_shape, right)

    torch.manual_seed(training.seed)
    config = CLIPConfig(
        text_config=training.text_config().to_dict(),
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        projection_dim=VISION["projection_dim"],
    )
    if start := training.start:
        model = load_text_model(CLIPModel, start / "judge", start / "judge", config, VOCABULARY)
    else:
        model = CLIPModel(config)
    model = model.to(training.device)
    sheet = partial(_sheet, training, processor)
    judge = train(training, "judge", model, loss, sheet, training.hashes())
    save_weights(training.model / "judge", judge, torch.float16)
    processor.save_pretrained(training.model / "judge")
    training.write_tokenizer(training.model / "judge")


@torch.inference_mode()
def _sheet(training: Training, processor: CLIPImageProcessor, model: CLIPModel, path: Path) -> None:
    """Held-out pictures; the text file of the same name has the captions found for them."""
    frames, captions = held_out_pictures(256)
    pixels, choices = _judge_pixels(processor, frames), sorted(set(captions))
    similarity = model(
        input_ids=training.tokens(choices), pixel_values=pixels.to(training.device)
    ).logits_per_image
    found = [choices[best] for best in similarity.argmax(dim=1).tolist()]
    right = 100 * np.mean(np.array(found) == captions)
    text = "judge: %.1f %% of held-out pictures found their caption among %d"
    log.info(text, right, len(choices))
    save_sheet(path, frames[:16])
    path.with_suffix(".txt").write_text("\n".join(found[:16]) + "\n", encoding="utf-8")


def _shifted(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to a patch, wrapping round the edges.

    Else the judge learns by heart how the patches happen to cut each picture.
    """
    by = torch.randint(-PATCH, PATCH + 1, (2, len(pictures)), generator=generator).neg().T
    return torch.stack(
        [one.roll(yx, (1, 2)) for one, yx in zip(pictures, by.tolist(), strict=True)]
    )


def _other_shapes(tokens: Tensor, shapes: Tensor) -> Tensor:
    """Captions with the first object in every shape: (n, MAX_TOKENS) to (n, shapes, MAX_TOKENS).

    For a loss over the shape alone: the colours already separate most captions of a batch, so that
    shapes are learnt late.
    """
    first = torch.isin(tokens, shapes).int().argmax(dim=1)
    others = tokens[:, None].repeat(1, len(shapes), 1)
    others[torch.arange(len(tokens)), :, first] = shapes
    return others


def _look_alikes(count: int) -> list[Tensor]:
    """The numbers of the pictures that share the background and the first object's colour."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for number in range(count):
        scene = scene_of_picture(number)
        alike = scene.background, scene.surface, scene.objects[0].color
        groups.setdefault(alike, []).append(number)
    return [torch.tensor(group) for group in groups.values()]


def _draw_alike(groups: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """A batch's numbers, (count,), from only GROUPS of the groups.

    Within a group only fills and shapes tell pictures apart. In a batch drawn from all pictures,
    colours nearly always do, and shapes are learnt very slowly.
    """
    chosen = torch.randperm(len(groups), generator=generator)[:GROUPS]
    picks = chosen[torch.randint(len(chosen), (count,), generator=generator)]
    places = torch.rand(count, generator=generator).tolist()
    picked = [groups[pick] for pick in picks.tolist()]
    return torch.stack(
        [group[int(x * len(group))] for group, x in zip(picked, places, strict=True)]
    )


def _judge_pixels(processor: CLIPImageProcessor, frames: np.ndarray) -> Tensor:
    """(n, 3, JUDGE_SIZE, JUDGE_SIZE) float32."""
    return processor(images=list(frames), return_tensors="pt").pixel_values
