"""Writes a checkpoint's folder in diffusers' format: weights, scheduler, tokenizer and index."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from transformers import CLIPTextModel, PreTrainedModel

from util import atomic_file

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def ddim_scheduler(kind: str) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction" if kind == "v_prediction" else "epsilon",
    )


def bpe_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's kind of byte-level BPE with merges for a few words.

    Every byte is a token, alone and at a word's end (</w>), so that any text has tokens.

    Args:
        words: ASCII words; each becomes one token.

    Returns:
        The token numbers, and the merges in order of precedence.
    """
    letters = list(_byte_symbols().values())
    segmented = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in segmented for pair in itertools.pairwise(parts)):
        merges.append(pairs.most_common(1)[0][0])
        segmented = [_merge(parts, merges[-1]) for parts in segmented]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, START, END])}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE vocabulary.

    Printable Latin-1 characters stand for themselves, the other bytes for those from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def save_weights(folder: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Write a model as diffusers and transformers do, with every library version's tensor names."""
    if isinstance(model, PreTrainedModel):
        file = "model.safetensors"
        model.config.save_pretrained(folder)
    else:
        file = "diffusion_pytorch_model.safetensors"
        model.save_config(folder)
    # transformers 5 drops this prefix of the published checkpoints, and reads them with it;
    # transformers 4 reads nothing else.
    prefix = "text_model." if isinstance(model, CLIPTextModel) else ""
    tensors = {
        prefix + name.removeprefix(prefix): tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_file(folder / file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def write_tokenizer(
    folder: Path,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    max_tokens: int = MAX_TOKENS,
) -> None:
    """Write CLIP's kind of tokenizer, of `bpe_vocabulary`'s tokens, as transformers reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, **special}
    write_json(folder / "tokenizer_config.json", config)


def model_index(kind: str) -> dict:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind == "depth":
        del index["safety_checker"], index["requires_safety_checker"]
        index |= {
            "_class_name": "StableDiffusionDepth2ImgPipeline",
            "depth_estimator": ["transformers", "DPTForDepthEstimation"],
            "feature_extractor": ["transformers", "DPTImageProcessor"],
        }
    return index


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
