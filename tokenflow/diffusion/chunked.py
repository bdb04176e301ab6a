"""Bounded memory: a UNet or ControlNet computes few images at a time, whatever its batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

# Modules that compute image by image and whose inner activations are several times their input.
PER_IMAGE = (
    ResnetBlock2D, Downsample2D, Upsample2D, FeedForward, ControlNetConditioningEmbedding,
)  # fmt: skip


@contextmanager
def chunked_forward(
    model: nn.Module, images_at_once: int, skip: Collection[str] = ()
) -> Iterator[None]:
    """Lets a model's `PER_IMAGE` modules compute at most `images_at_once` images at a time.

    Extended attention needs all keyframes at the same layer at the same time, so their batch goes
    through the UNet as one. With this, only hidden states, keys and values grow with that batch.
    Results do not change. Each module's forward is wrapped, and restored on leaving.

    Args:
        model: UNet or ControlNet, changed in place.
        skip: names of modules that keep their forward.
    """
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, PER_IMAGE) and name not in skip
    ]
    with ExitStack() as undo:
        for module in modules:
            undo.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.forward = _chunked(module.forward, images_at_once)
        yield


def _chunked(whole: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: object) -> Tensor:
        n = len(hidden)
        if n <= size:
            return whole(hidden, *args)
        chunks = []
        for start in range(0, n, size):
            images = slice(start, start + size)
            chunks.append(whole(hidden[images], *(_select(x, n, images) for x in args)))
        return torch.cat(chunks)

    return forward


def _select(argument: object, n_images: int, images: slice) -> object:
    """The part of a forward's argument that belongs to some of its images."""
    per_image = isinstance(argument, Tensor) and argument.shape[:1] == (n_images,)
    return argument[images] if per_image else argument


def _restore_forward(module: nn.Module, own: Callable[..., Tensor] | None) -> None:
    """Restores the forward of a module's class, or the one it had of its own (accelerate)."""
    if own is not None:
        module.forward = own
    else:
        module.__dict__.pop("forward", None)
