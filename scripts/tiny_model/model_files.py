"""The small models' networks, and their folders in diffusers' format."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PretrainedConfig, PreTrainedModel

from tokenflow.storage.yaml_files import load_yaml
from util import atomic_file

log = logging.getLogger("tokenflow")

NETWORKS = load_yaml(Path(__file__).with_name("networks.yaml"))
START, END = "<|startoftext|>", "<|endoftext|>"


def make_unet(architecture: str, in_channels: int = 4) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's blocks, as PyTorch initialises it."""
    sizes = NETWORKS["all"]["unet"] | NETWORKS[architecture]["unet"]
    return UNet2DConditionModel(in_channels=in_channels, **sizes).eval()


def make_vae(architecture: str) -> AutoencoderKL:
    """A VAE with factor 8 that carries what comes in through all layers but the last.

    The convolutions that change the grid or the channels are nearly the identity and the residual
    branches weak: from PyTorch's own weights, colours take training thousands of steps to find.
    """
    vae = AutoencoderKL(**NETWORKS["all"]["vae"] | NETWORKS[architecture]["vae"]).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight")):
                parameter *= 0.1
            elif name.endswith(("conv_in.weight", "conv.weight", "shortcut.weight")):
                parameter *= 0.3
                parameter += torch.nn.init.dirac_(torch.empty_like(parameter))
    return vae


def make_controlnet(
    architecture: str, unet: UNet2DConditionModel, pictures: Tensor
) -> ControlNetModel:
    """A ControlNet that begins as a copy of the UNet, whose embedding keeps a picture's strength.

    By PyTorch's and diffusers' own weights, what is in a picture fades from layer to layer to
    exactly zero, which learns slowly.

    Args:
        pictures: (n, 3, H, W), examples; their embedding has std 1.
    """
    channels = NETWORKS[architecture]["hint_channels"]
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    embedding = model.controlnet_cond_embedding
    for conv in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
        torch.nn.init.kaiming_normal_(conv.weight)
    with torch.no_grad():
        embedding.conv_out.weight /= embedding(pictures).std()
    return model


def text_config(architecture: str, vocabulary: dict[str, int], max_tokens: int) -> CLIPTextConfig:
    """The text encoder's configuration for `bpe_vocabulary`'s tokens."""
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=max_tokens,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        **NETWORKS["all"]["text"] | NETWORKS[architecture]["text"],
    )


def load_text_model(
    kind: type[PreTrainedModel],
    folder: Path,
    tokenizer: Path,
    config: PretrainedConfig,
    vocabulary: dict[str, int],
) -> PreTrainedModel:
    """A trained CLIP model, or its text encoder, for another vocabulary.

    Tokens keep their embeddings by their spelling; new ones get random rows like the others. Of a
    network of other sizes the weights that fit are taken; a line in the log tells the others.

    Args:
        tokenizer: folder of the vocabulary that the model was trained with.
        config: of the new model.
    """
    state = kind.from_pretrained(folder).float().state_dict()
    old = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    rows = state[name]
    new = rows.mean(0) + rows.std(0) * torch.randn(len(vocabulary), rows.shape[1])
    known = [token for token in vocabulary if token in old]
    new[[vocabulary[token] for token in known]] = rows[[old[token] for token in known]]
    model = kind(config)
    state, fresh = state | {name: new}, model.state_dict()
    unfit = [key for key, value in fresh.items() if state[key].shape != value.shape]
    if unfit:
        log.info("%s: random weights for %s", folder, ", ".join(unfit))
    model.load_state_dict(state | {key: fresh[key] for key in unfit})
    return model


def ddim_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction_type, **NETWORKS["scheduler"])


def bpe_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's kind of byte-level BPE with merges for a few words.

    Every byte is a token, alone and at a word's end (</w>), so that any text has tokens.

    Args:
        words: ASCII words; each becomes one token.

    Returns:
        The token numbers, and the merges in order of precedence.
    """
    others = map(chr, itertools.count(0x100))  # stand for the bytes that are not printable
    letters = [c if c.isprintable() and c != " " else next(others) for c in map(chr, range(256))]
    spelled = [" ".join(word) + "</w>" for word in words]  # tokens between spaces
    merges = []
    while pairs := Counter(pair for text in spelled for pair in itertools.pairwise(text.split())):
        merges.append(pairs.most_common(1)[0][0])
        pair = re.compile(rf"(?<!\S){re.escape(' '.join(merges[-1]))}(?!\S)")
        spelled = [pair.sub("".join(merges[-1]), text) for text in spelled]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, START, END])}, merges


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
        if not tensor.is_meta
    }
    with atomic_file(folder / file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], max_tokens: int
) -> None:
    """Write CLIP's kind of tokenizer, of `bpe_vocabulary`'s tokens, as transformers reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, **special}
    _write_json(folder / "tokenizer_config.json", config)


def write_model_index(folder: Path, takes_depth: bool = False) -> None:
    index = NETWORKS["depth_model_index" if takes_depth else "model_index"]
    index = {"_diffusers_version": diffusers.__version__, **index}
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
