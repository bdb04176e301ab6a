"""LoRAs and textual-inversion embeddings: found, checked, and added to a checkpoint's weights.

A LoRA of rank r changes a layer's weight W to W + scale * alpha / r * up @ down (Hu et al., 2021).
It is added when the models are loaded, so that no layer is replaced. kohya's files are read, and
those of diffusers of all ages. diffusers' own loader is not used: with transformers 5 it drops a
kohya LoRA's part for the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tokenflow.diffusion.checkpoints import load_unet_skeleton, weights_file
from util import UserError, sha256_file

LORA_FILE, EMBEDDING_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
# The end of a tensor's name: kohya's lora_down, PEFT's lora_A, diffusers' older lora.down,
# to_q_lora.down and lora_linear_layer.down.
_MATRIX = re.compile(r"[._](?:lora_linear_layer|lora)[._](down|up|A|B)(?:\.default)?\.weight$")
_PART = re.compile(r"^(?:base_model[._]model[._])?(lora_unet|unet|lora_te|text_encoder)[._]")
_UNNAMED = ("emb_params", "clip_l")  # a file's tensor, where the token is the file's name


@dataclass(frozen=True)
class Lora:
    """A LoRA's file and how much of it is added."""

    path: Path
    scale: float
    sha256: str


@dataclass(frozen=True)
class Embedding:
    """A textual-inversion file and the word of a prompt that stands for it."""

    path: Path
    token: str
    sha256: str


@dataclass(frozen=True)
class Adapters:
    """All that is added to a checkpoint."""

    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of their contents, whatever their paths; empty if there are none."""
        contents = [astuple(each)[1:] for each in (*self.loras, *self.embeddings)]
        if not contents:
            return ""
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]

    def record(self) -> dict[str, list[dict[str, object]]]:
        """What a result says of them, as plain values."""
        return {
            kind: [{**asdict(each), "path": str(each.path)} for each in getattr(self, kind)]
            for kind in ("loras", "embeddings")
        }


NO_ADAPTERS = Adapters()


class _Update(NamedTuple):
    """What a LoRA does to one layer."""

    weight: Tensor
    down: Tensor  # (r, ...)
    up: Tensor  # (out, r, ...)
    share: float  # alpha / r

    def apply(self, scale: float) -> None:
        weight = self.weight.float()
        up, down = (each.to(weight.device).float().flatten(1) for each in (self.up, self.down))
        delta = (up @ down).view_as(weight)
        self.weight.copy_(weight + scale * self.share * delta)


def find_adapters(options: Any) -> Adapters:
    """The LoRAs and embeddings that preprocess.py's options or an edit's config name.

    Args:
        options: with `lora`, `lora_scale` and `embeddings`, lists or None.

    Raises:
        UserError: a file is missing or damaged.
    """
    keys, scales = options.lora or [], options.lora_scale or [1.0]
    if options.lora_scale and not keys:
        raise UserError("lora_scale: goes with lora: name the LoRAs too")
    if len(scales) == 1:
        scales = scales * len(keys)
    if len(scales) != len(keys):
        raise UserError(f"lora_scale: {len(scales)} numbers for {len(keys)} LoRAs; give as many")
    paths = [weights_file(key, "lora", LORA_FILE) for key in keys]
    others = [weights_file(key, "embeddings", EMBEDDING_FILE) for key in options.embeddings or []]
    embeddings = [Embedding(path, _vectors(path)[0], sha256_file(path)) for path in others]
    tokens = [embedding.token for embedding in embeddings]
    for embedding in embeddings:
        if tokens.count(embedding.token) > 1:
            raise UserError(
                f"embeddings: {embedding.path}: {embedding.token} is another file's token too; "
                "rename one of the files, or leave it out"
            )
    loras = (Lora(p, float(s), sha256_file(p)) for p, s in zip(paths, scales, strict=True))
    return Adapters(tuple(loras), tuple(embeddings))


def recorded_adapters(record: Any, digest: str, folder: Path, advice: str) -> Adapters:
    """Those that a cache's manifest names, unless their contents have changed since.

    Args:
        record: as `find_adapters`'s options.
        digest: of their contents then.
        folder, advice: the cache and how to make it again, for errors.
    """
    adapters = find_adapters(record)
    if adapters.digest != digest:
        named = ", ".join(str(each.path) for each in (*adapters.loras, *adapters.embeddings))
        raise UserError(
            f"{folder}: made with other contents of {named} than there are now; {advice}"
        )
    return adapters


def check_adapters_fit(adapters: Adapters, checkpoint: Path) -> None:
    """Refuses LoRAs and embeddings that were made for another kind of model, by a UserError."""
    config = CLIPTextConfig.from_pretrained(checkpoint, subfolder="text_encoder")
    if adapters.loras:
        with torch.device("meta"):
            unet, text_encoder = load_unet_skeleton(checkpoint), CLIPTextModel(config)
        for lora in adapters.loras:
            _updates(lora.path, unet, text_encoder, str(checkpoint))
    for embedding in adapters.embeddings:
        where, width = f"embeddings: {embedding.path}", _vectors(embedding.path)[1].shape[1]
        if width != config.hidden_size:
            raise UserError(
                f"{where}: vectors of {width}, but the text encoder of {checkpoint} has "
                f"{config.hidden_size}; use one made for this model"
            )
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
        if embedding.token in tokenizer.get_vocab():
            raise UserError(f"{where}: {embedding.token} is a token already; rename the file")


@torch.no_grad()
def add_adapters(
    adapters: Adapters,
    unet: nn.Module,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Adds LoRAs to the weights, and embeddings to the text encoder and tokenizer, in place.

    An embedding of several vectors becomes the tokens <token>, <token>_1, ...
    """
    for lora in adapters.loras:
        for update in _updates(lora.path, unet, text_encoder, "the checkpoint"):
            update.apply(lora.scale)
    for embedding in adapters.embeddings:
        vectors = _vectors(embedding.path)[1]
        names = [embedding.token, *(f"{embedding.token}_{i}" for i in range(1, len(vectors)))]
        single = embedding.token[0].isalnum()  # a plain word is not found within others
        added = [AddedToken(name, normalized=False, single_word=single) for name in names]
        tokenizer.add_tokens(added)
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight
        table[tokenizer.convert_tokens_to_ids(names)] = vectors.to(table)
        text_encoder.requires_grad_(False)


def _updates(
    path: Path, unet: nn.Module, text_encoder: nn.Module, checkpoint: str
) -> list[_Update]:
    """What a LoRA does to each layer; refuses tensors that are no LoRA's or fit no layer."""
    tensors, known = load_file(path), {}
    for part, network in (("unet", unet), ("text_encoder", text_encoder)):
        for name, module in network.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                known[part, _plain(name, part)] = module.weight
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        matrix = _MATRIX.search(name)
        key, kind = (name[: matrix.start()], matrix[1]) if matrix else name.rpartition(".")[::2]
        if kind not in ("down", "up", "A", "B", "alpha"):
            raise UserError(
                f"lora: {path}: {name}: not of a LoRA (a checkpoint is given by model_key; DoRA, "
                "LoHa, LoKr are not read)"
            )
        layers.setdefault(key, {})[{"A": "down", "B": "up"}.get(kind, kind)] = tensor
    alphas, updates = _peft_alphas(path), []
    for key, found in layers.items():
        prefix = _PART.match(key)
        part = "text_encoder" if prefix and prefix[1] in ("lora_te", "text_encoder") else "unet"
        name = _plain(key[prefix.end() :] if prefix else key, part)
        weight = known.get((part, name), known.get((part, f"{name}_0")))
        if weight is None or "down" not in found or "up" not in found:
            lacks = f"{checkpoint} has no such layer" if weight is None else "half of it is missing"
            raise UserError(f"lora: {path}: {key}: {lacks}; use one made for this model")
        down, up, rank = found["down"], found["up"], len(found["down"])
        fits = (len(weight), rank), (rank, weight[0].numel())
        if (up.flatten(1).shape, down.flatten(1).shape) != fits:
            raise UserError(
                f"lora: {path}: {key}: {tuple(up.shape)} and {tuple(down.shape)} do not fit "
                f"{tuple(weight.shape)} of {checkpoint}; use one made for this model"
            )
        alpha = float(found["alpha"]) if "alpha" in found else alphas.get(part, rank)
        updates.append(_Update(weight, down, up, alpha / rank))
    if not updates:
        raise UserError(f"lora: {path}: holds no LoRA")
    return updates


def _plain(name: str, part: str) -> str:
    """One spelling of a layer's name for all formats: kohya has "_" for ".", and more."""
    name = name.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
    if part == "text_encoder":  # older diffusers call its layers as the UNet's
        name = re.sub(r"self_attn_to_([qkv])$", r"self_attn_\1_proj", name)
        name = re.sub(r"self_attn_to_out$", "self_attn_out_proj", name)
    return name


def _peft_alphas(path: Path) -> dict[str, float]:
    """alpha of the UNet's and text encoder's layers, where diffusers wrote PEFT's settings."""
    with safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for part in ("unet", "text_encoder"):
        for key in ("use_dora", "use_rslora", "alpha_pattern"):
            if settings.get(f"{part}.{key}"):
                raise UserError(f"lora: {path}: has {key}, which is not read")
    parts = (part for part in ("unet", "text_encoder") if f"{part}.lora_alpha" in settings)
    return {part: float(settings[f"{part}.lora_alpha"]) for part in parts}


def _vectors(path: Path) -> tuple[str, Tensor]:
    """The word of a textual-inversion file, and its vectors (n, c)."""
    tensors = load_file(path)
    name = next((each for each in _UNNAMED if each in tensors), next(iter(tensors), ""))
    if name not in _UNNAMED and len(tensors) != 1:
        raise UserError(f"embeddings: {path}: {len(tensors)} tensors, expected one")
    vectors = tensors[name] if tensors[name].ndim > 1 else tensors[name][None]
    return path.stem if name in _UNNAMED else name, vectors
