"""The models of a Stable Diffusion checkpoint: device, dtype, loading and compiling."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tokenflow.diffusion.adapters import NO_ADAPTERS, Adapters, add_adapters
from tokenflow.diffusion.checkpoints import (
    Model,
    for_inference,
    load_model,
    single_model_folder,
)
from tokenflow.diffusion.ddim import NoiseSchedule
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from util import UserError

MOST_KINDS_OF_PASS = 64  # that a UNet is compiled for

BETTER_DTYPE = "--dtype bfloat16 or float32 (dtype in a config), and rebuild the cache with it"


@dataclass(frozen=True)
class StableDiffusion:
    """The models of one checkpoint, for inference, on one device in one dtype."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    allow_pickle: bool = False  # for models loaded later (`single_model`)
    _others: dict[str, nn.Module] = field(default_factory=dict, compare=False)

    def single_model(self, cls: type[Model], key: str, option: str) -> Model:
        """A model of its own (ControlNet, temporal decoder), loaded once.

        Args:
            key: hub id or folder.
            option: the option that names it, for errors, of which see `load_model`.
        """
        if key not in self._others:
            folder = single_model_folder(key, option, self.allow_pickle)
            model = load_model(cls, folder, self.allow_pickle, torch_dtype=self.dtype)
            self._others[key] = for_inference(model, self.device)
        return self._others[key]

    def controlnet(self, key: str) -> ControlNetModel:
        """The ControlNet of a hub id or folder; see `single_model`."""
        return self.single_model(ControlNetModel, key, "controlnet_key")

    @property
    def dtype_name(self) -> str:
        """The dtype as the options spell it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side (8 for Stable Diffusion)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def takes_depth(self) -> bool:
        """Whether the UNet expects a depth map as a fifth latent channel."""
        return self.unet.config.in_channels == self.vae.config.latent_channels + 1


def resolve_device(
    name: str, group: ProcessGroup = SINGLE_PROCESS, must_exist: bool = True
) -> torch.device:
    """The torch device of a `device` option: auto, cpu, cuda, cuda:1, mps.

    Args:
        group: each of several processes takes the GPU of its local rank.
        must_exist: False for an estimate of what would be needed.

    Raises:
        UserError: if torch knows no such device or this machine has none.
    """
    if group.size > 1:
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"device: {name} cannot be shared by {group.size} processes; expected cuda (a GPU "
                "for each), cpu or auto"
            )
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            name = f"cuda:{group.local_rank}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        found = {
            "cpu": 1,
            "cuda": torch.cuda.device_count(),
            "mps": int(torch.backends.mps.is_available()),
        }[device.type]
    except (RuntimeError, KeyError) as error:
        raise UserError(f"device: {name} is unknown, expected auto, cpu, cuda or cuda:N") from error
    if (device.index or 0) >= found and must_exist:
        raise UserError(
            f"device: {name} was asked for, but torch sees {found} {device.type.upper()} devices "
            "on this machine; use --device cpu, or install a build of torch for it"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a `dtype` option; auto is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def load_stable_diffusion(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    adapters: Adapters = NO_ADAPTERS,
) -> StableDiffusion:
    """Loads a checkpoint's models from a local folder for inference.

    Args:
        folder: returned by `checkpoint_folder`.
        allow_pickle: see `checkpoint_folder`; errors: see `load_model`.
        adapters: LoRAs and embeddings that are added to its weights.
    """

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()

    def load(
        cls: type[nn.Module], part: str, memory_format: torch.memory_format = torch.preserve_format
    ) -> nn.Module:
        model = load_model(cls, folder / part, allow_pickle, torch_dtype=dtype)
        return for_inference(model, device, memory_format)

    # channels_last makes the VAE's convolutions faster on every device, and is recommended for the
    # UNet's in half precision on GPUs (not measured here). It gains nothing for a UNet on the CPU.
    on_gpu = torch.channels_last if device.type == "cuda" else torch.preserve_format
    unet = load(UNet2DConditionModel, "unet", on_gpu)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = load(CLIPTextModel, "text_encoder")
    add_adapters(adapters, unet, text_encoder, tokenizer)
    return StableDiffusion(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=load(AutoencoderKL, "vae", torch.channels_last),
        unet=unet,
        schedule=NoiseSchedule.of_checkpoint(folder),
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )


# `load_stable_diffusion`, or a function that caches the last checkpoint.
Loader = Callable[[Path, torch.device, torch.dtype, bool, Adapters], StableDiffusion]


class KeptModels:
    """Loads checkpoints as `load_stable_diffusion` does, and keeps the last one in memory.

    Attributes:
        calls: how often models were asked for; a job that finds its result asks for none.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._kept: dict[tuple, StableDiffusion] = {}

    def __call__(self, folder: Path, *settings: Any) -> StableDiffusion:
        self.calls += 1
        key = folder.resolve(), *settings
        if key not in self._kept:
            self.forget()  # never two checkpoints in memory
            self._kept[key] = load_stable_diffusion(folder, *settings)
        return self._kept[key]

    def forget(self) -> None:
        """Drops the models and frees their memory."""
        self._kept.clear()
        torch.cuda.empty_cache()


def compile_unet(unet: UNet2DConditionModel, backend: str = "inductor") -> None:
    """Compiles a UNet's forward in place, as one graph; a second call does nothing.

    Each kind of pass (each mode of the patch, with and without injection, a shorter last chunk) is
    compiled at its first call. These can be more graphs than torch allows for one function by
    default, so the process's limit is raised.
    """
    if hasattr(unet.forward, "_torchdynamo_orig_callable"):
        return
    config = torch._dynamo.config
    config.cache_size_limit = max(MOST_KINDS_OF_PASS, config.cache_size_limit)
    unet.forward = torch.compile(unet.forward, fullgraph=True, backend=backend)
