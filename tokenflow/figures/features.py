"""Features of clips: how visualize.py takes them, and rebuilds a frame from another one's.

The tokens of a layer are looked at at one timestep of the cache's inversion, with the cache's own
denoiser: ordinary attention, no guidance, no TokenFlow.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.cache.source_cache import CLEAN_LATENTS, SourceCache
from tokenflow.cache.source_features import find_features
from tokenflow.diffusion.checkpoints import (
    checkpoint_folder,
    checkpoint_revision,
    load_unet_skeleton,
)
from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule, ddim_step
from tokenflow.diffusion.denoiser import Denoiser, make_denoiser
from tokenflow.diffusion.inversion import invert
from tokenflow.diffusion.models import (
    StableDiffusion,
    load_stable_diffusion,
    resolve_device,
    resolve_dtype,
)
from tokenflow.diffusion.vae import encode_frames
from tokenflow_utils import (
    Neighbours,
    Pass,
    TokenFlowContext,
    self_attention_layers,
    tokenflow_patch,
)
from util import UserError

LAYER = "up_blocks.2.attentions.1"  # looked at by default: in the middle of the decoder
_LAYER_SUFFIX = ".transformer_blocks.0.attn1.processor"


@dataclass(frozen=True)
class View:
    """Where and how features of a clip are taken; all of it checked before a model is loaded.

    Attributes:
        inversion: the inversion's timesteps up to the one that is looked at, ascending.
        sampling: the timesteps that preprocess saved latents for, noisiest first.
        layer: a key of `unet.attn_processors`.
        what: "input", the tokens phi that a self-attention is given, or its "output".
    """

    cache: SourceCache
    checkpoint: Path
    inversion: list[int]
    sampling: list[int]
    layer: str
    what: str
    device: torch.device
    dtype: torch.dtype
    batch_size: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def timestep(self) -> int:
        return self.inversion[-1]

    def load(self) -> StableDiffusion:
        return load_stable_diffusion(self.checkpoint, self.device, self.dtype)

    def describe(self, grid: tuple[int, int]) -> str:
        """What the features are, for a figure's title."""
        return (
            f"self-attention {self.what} tokens of {short_name(self.layer)} ({grid[0]} x {grid[1]})"
            f" at timestep {self.timestep}"
        )


def open_view(args: argparse.Namespace, cache: SourceCache) -> View:
    """Checks the options that say how features are taken.

    Raises:
        UserError: naming the option, and what it could be.
    """
    manifest = cache.manifest
    device = resolve_device(args.device)
    if args.batch_size < 1:
        raise UserError(f"--batch_size: {args.batch_size}, expected a number of at least 1")
    checkpoint = checkpoint_folder(args.model_key or manifest.model_key)
    if checkpoint_revision(checkpoint) != manifest.model_revision:
        raise UserError(
            f"{checkpoint}: not the model that {cache.folder} was made with "
            f"({manifest.model_key}); name that one with --model_key, or make the cache anew"
        )
    layer = find_layer(load_unet_skeleton(checkpoint), args.layer)
    schedule = NoiseSchedule.of_checkpoint(checkpoint)
    inversion = schedule.timesteps(manifest.steps)[::-1]
    sampling = schedule.timesteps(manifest.save_steps)
    timestep = sampling[len(sampling) // 2] if args.timestep is None else args.timestep
    if timestep not in inversion:
        nearest = min(inversion, key=lambda t: abs(t - timestep))
        raise UserError(
            f"--timestep: {timestep} is none of the {len(inversion)} of the inversion; the nearest "
            f"is {nearest}; those with cached latents are {', '.join(map(str, manifest.timesteps))}"
        )
    return View(
        cache=cache,
        checkpoint=checkpoint,
        inversion=inversion[: inversion.index(timestep) + 1],
        sampling=sampling,
        layer=layer,
        what=args.what,
        device=device,
        dtype=resolve_dtype(args.dtype, device),
        batch_size=args.batch_size,
    )


def short_name(layer: str) -> str:
    """up_blocks.2.attentions.1 for the only self-attention layer in there."""
    return layer.removesuffix(_LAYER_SUFFIX)


def find_layer(unet: UNet2DConditionModel, name: str) -> str:
    """The self-attention layer of a name: its key in `unet.attn_processors`, or its `short_name`.

    Raises:
        UserError: listing the names there are.
    """
    layers = {short_name(layer): layer for layer in self_attention_layers(unet)}
    if short_name(name) not in layers:
        raise UserError(f"--layer: {name} is unknown, expected one of {', '.join(layers)}")
    return layers[short_name(name)]


# ---------------------------------------------------------------------------------------------
# Features


@contextmanager
def recorded_tokens(unet: nn.Module, layer: str, what: str) -> Iterator[list[Tensor]]:
    """Keeps what a self-attention layer is given or returns, (m, L, c) float32 on the CPU a pass.

    Args:
        layer: its key in `unet.attn_processors`.
        what: "input" or "output".
    """
    attention = unet.get_submodule(layer.removesuffix(".processor"))
    kept: list[Tensor] = []

    def keep(tokens: Tensor) -> None:
        kept.append(tokens.float().cpu())

    if what == "input":
        handle = attention.register_forward_pre_hook(lambda module, args: keep(args[0]))
    else:
        handle = attention.register_forward_hook(lambda module, args, output: keep(output))
    try:
        yield kept
    finally:
        handle.remove()


@torch.inference_mode()
def tokens_at(view: View, denoiser: Denoiser, noisy: Tensor) -> Tensor:
    """The view's tokens of latents (n, 4, h, w) at its timestep: (n, L, c) float32 on the CPU."""
    with recorded_tokens(denoiser.models.unet, view.layer, view.what) as tokens:
        for frames in torch.arange(len(noisy)).split(view.batch_size):
            denoiser(noisy[frames], view.timestep, frames)
    return torch.cat(tokens)


def inverted(view: View, denoiser: Denoiser, clean: Tensor) -> Tensor:
    """Clean latents inverted up to the view's timestep, in the steps of the cache's inversion."""
    manifest = view.cache.manifest
    how = manifest.inversion_iters, manifest.inversion_tol, view.batch_size
    [(_, latents)] = deque(invert(denoiser, clean, view.inversion, *how), maxlen=1)  # the last
    return latents


def source_tokens(view: View, models: StableDiffusion, chosen: Sequence[int]) -> Tensor:
    """The tokens of some of the clip's frames, from the cached latents where these were saved.

    Returns:
        (len(chosen), L, c) float32 on the CPU.
    """
    cache, chosen, n_frames = view.cache, list(chosen), max(chosen) + 1
    saved = saved_tokens(view)
    if saved is not None:
        return saved[chosen].float()
    denoiser = source_denoiser(view, models, chosen)
    if view.timestep in cache.manifest.timesteps:
        noisy = cache.latents(view.timestep, n_frames)[chosen]
    else:
        noisy = inverted(view, denoiser, cache.latents(CLEAN_LATENTS, n_frames)[chosen])
    return tokens_at(view, denoiser, noisy)


def saved_tokens(view: View) -> Tensor | None:
    """The view's tokens of every frame, (n, L, c), where --save_tokens all saved them."""
    found = find_features(view.cache)
    if found is None or view.what != "input" or view.timestep not in view.sampling:
        return None
    if found.settings.save_tokens != "all" or found.settings.dtype != view.dtype_name:
        return None
    return found.tokens(view.timestep, view.layer)


def source_denoiser(view: View, models: StableDiffusion, chosen: Sequence[int]) -> Denoiser:
    """The noise prediction of the cache's inversion, for some of the clip's frames."""
    frames = view.cache.frames(max(chosen) + 1)[list(chosen)]
    return _denoiser(view, models, frames, view.cache.manifest.inversion_prompt, chosen)


def edit_tokens(view: View, models: StableDiffusion, frames: np.ndarray, prompt: str) -> Tensor:
    """The tokens of an edited video, taken as the source's were: encoded, inverted, looked at.

    A ControlNet of the inversion follows the edited frames, but depth is the source's.

    Args:
        frames: (n, H, W, 3) uint8, the first ones of the clip.
        prompt: the edit's.

    Returns:
        (n, L, c) float32 on the CPU.
    """
    denoiser = _denoiser(view, models, frames, prompt, range(len(frames)))
    clean = encode_frames(models, frames, view.batch_size)
    return tokens_at(view, denoiser, inverted(view, denoiser, clean))


def _denoiser(
    view: View, models: StableDiffusion, frames: np.ndarray, prompt: str, chosen: Sequence[int]
) -> Denoiser:
    depth = view.cache.depth(max(chosen) + 1)
    depth = depth if depth is None else depth[list(chosen)]
    return make_denoiser(models, frames, prompt, view.cache.manifest.control, depth)


# ---------------------------------------------------------------------------------------------
# A frame rebuilt from another one's tokens


@torch.inference_mode()
def rebuilt_from_keyframe(denoiser: Denoiser, start: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Samples a frame in which every self-attention output is the keyframe's at the nearest tokens.

    Both frames are sampled from their own inverted latents without guidance, the keyframe as it
    is. At every step the frame's pass is the source pass of a chunk under `propagate_source`,
    with this one keyframe as its only neighbour: at each layer its tokens (which come from layers
    that were replaced already) are matched with the keyframe's, and no attention is computed.

    Args:
        denoiser: of the two frames.
        start: (2, 4, h, w) latents of the frame and of the keyframe at timesteps[0].
        timesteps: descending.

    Returns:
        (1, 4, h, w) clean latents of the frame, on the CPU.

    Source: Fig. 3.
    """
    models = denoiser.models
    schedule, frame, keyframe = models.schedule, start[:1], start[1:]
    only = torch.zeros(1, dtype=torch.long, device=models.device)
    near = Neighbours(previous=only, next=only, weight=torch.ones(1, device=models.device))
    context = TokenFlowContext(propagate_source=True, neighbours=near)
    steps = list(zip(timesteps, [*timesteps[1:], CLEAN], strict=True))
    with tokenflow_patch(models.unet, context):
        for t, t_next in tqdm(steps, desc="rebuild", unit="step"):
            levels = schedule.level(t), schedule.level(t_next)
            context.mode = Pass.SOURCE
            keyframe_eps = denoiser(keyframe, t, torch.tensor([1]))[0].cpu()
            context.mode = Pass.MATCH
            eps = denoiser(frame, t, torch.tensor([0]))[0].cpu()
            frame = ddim_step(frame, eps, *levels)
            keyframe = ddim_step(keyframe, keyframe_eps, *levels)
    return frame
