"""Self-attention tokens of clips: how they are taken, coloured and matched.

The tokens of a layer are extracted at one timestep of the cache's inversion, with the cache's own
denoiser: ordinary attention, no guidance, no TokenFlow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from pydantic import Field
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
from tokenflow.storage.schema import Model
from tokenflow_utils import (
    Neighbours,
    Pass,
    TokenFlowContext,
    self_attention_layers,
    tokenflow_patch,
)
from util import UserError

LAYER = "up_blocks.2.attentions.1"  # the default: in the middle of the decoder
_LAYER_SUFFIX = ".transformer_blocks.0.attn1.processor"


@dataclass(frozen=True)
class View:
    """Where and how features of a clip are taken; all of it checked before a model is loaded.

    Attributes:
        inversion: the inversion's timesteps up to the chosen one, ascending.
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


class ViewOptions(Model):
    """The options of visualize.py that say how features are taken."""

    layer: str = Field(LAYER, description="a self-attention layer")
    timestep: int | None = Field(
        None, description="of the inversion's (default: the middle of sampling)"
    )
    what: Literal["input", "output"] = Field(
        "input", description="the self-attention's input tokens or its output"
    )
    model_key: str | None = Field(
        None, description="the checkpoint, if it is not where the cache says"
    )
    batch_size: int = Field(8, ge=1, description="frames evaluated at once")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto is float16 on CUDA, float32 elsewhere"
    )


def open_view(options: ViewOptions, cache: SourceCache) -> View:
    """Checks how features are to be taken.

    Raises:
        UserError: naming the option, and what it could be.
    """
    manifest = cache.manifest
    device = resolve_device(options.device)
    checkpoint = checkpoint_folder(options.model_key or manifest.model_key)
    if checkpoint_revision(checkpoint) != manifest.model_revision:
        raise UserError(
            f"{checkpoint}: not the model that {cache.folder} was made with "
            f"({manifest.model_key}); name that one with --model_key, or build the cache again"
        )
    layer = find_layer(load_unet_skeleton(checkpoint), options.layer)
    schedule = NoiseSchedule.of_checkpoint(checkpoint)
    inversion = schedule.timesteps(manifest.steps)[::-1]
    sampling = schedule.timesteps(manifest.save_steps)
    timestep = sampling[len(sampling) // 2] if options.timestep is None else options.timestep
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
        what=options.what,
        device=device,
        dtype=resolve_dtype(options.dtype, device),
        batch_size=options.batch_size,
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
    """The tokens of an edited video, taken as the source's were: encoded and inverted.

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
            levels = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
            context.mode = Pass.SOURCE
            keyframe_eps = denoiser(keyframe, t, torch.tensor([1]))[0].cpu()
            context.mode = Pass.MATCH
            eps = denoiser(frame, t, torch.tensor([0]))[0].cpu()
            frame = ddim_step(frame, eps, *levels)
            keyframe = ddim_step(keyframe, keyframe_eps, *levels)
    return frame


# ---------------------------------------------------------------------------------------------
# Feature tokens as colours


@dataclass(frozen=True)
class Components:
    """The principal components of tokens.

    Attributes:
        mean: (c,) float64.
        basis: (c, k) float64, orthonormal columns, by descending variance; of each, the entry of
            the largest magnitude is positive.
        explained: (k,) float64, the share of the variance along each.
    """

    mean: Tensor
    basis: Tensor
    explained: Tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Coordinates (..., k) float32 of tokens (..., c)."""
        return torch.cat([
            ((piece.double() - self.mean) @ self.basis).float()
            for piece in tokens.flatten(0, -2).split(1 << 16)
        ]).unflatten(0, tokens.shape[:-1])  # fmt: skip


def principal_components(tokens: Tensor, n_components: int = 3) -> Components:
    """The principal components of (N, c) tokens, from the exact eigenvectors of their covariance.

    Float64 throughout, so that a second run and another machine find the same colours.
    """
    pieces = tokens.split(1 << 16)  # a copy in float64 of all would be large
    mean = sum(piece.double().sum(0) for piece in pieces) / len(tokens)
    covariance = sum((piece.double() - mean).T @ (piece.double() - mean) for piece in pieces)
    covariance /= len(tokens)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    basis = vectors[:, -n_components:].flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))  # (1, k)
    explained = values[-n_components:].flip(0) / values.sum().clamp(min=1e-300)
    return Components(mean, basis * largest.sign(), explained)


def component_colours(coordinates: np.ndarray) -> np.ndarray:
    """Three components as colours, on one scale for all that is given.

    The first component is green, the second red, the third blue: in this order they weigh in a
    colour's brightness, so that a print in grey shows mostly the first.

    Args:
        coordinates: (..., 3) float; the 1st to the 99th percentile of each becomes 0 to 255.

    Returns:
        (..., 3) uint8 RGB.
    """
    flat = coordinates.reshape(-1, 3)
    low, high = np.percentile(flat, [1, 99], axis=0)
    scaled = (coordinates - low) / np.maximum(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)[..., [1, 0, 2]]


def feature_colours(
    tokens: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]
) -> tuple[list[np.ndarray], float]:
    """The three principal components of tokens in colour, in one basis and on one scale for all.

    Args:
        tokens: of each video, (n, L, c).
        grid: (h, w), h * w = L.
        size: (H, W) of the pictures.

    Returns:
        of each video (n, H, W, 3) uint8; and the share of the variance that they show.
    """
    together = torch.stack(list(tokens))  # (videos, n, L, c)
    components = principal_components(together.flatten(0, 2))
    colours = component_colours(components.project(together).numpy())
    cells = colours.reshape(*colours.shape[:2], *grid, 3)
    return [cells_to_pixels(video, size) for video in cells], float(components.explained.sum())


def token_grid(latent_grid: tuple[int, int], n_tokens: int) -> tuple[int, int]:
    """The (h, w) of a layer with this many tokens: the UNet halves the latents' grid, rounding up.

    Raises:
        ValueError: if no such grid has that many.
    """
    h, w = latent_grid
    while h * w > n_tokens and h * w > 1:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != n_tokens:
        raise ValueError(f"{n_tokens} tokens fit no grid of latents of {latent_grid}")
    return h, w


def cells_of_pixels(grid: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The cell that each pixel lies in: rows (H, 1) and columns (1, W) of the grid."""
    y, x = ((np.arange(n) * 2 + 1) * cells // (2 * n) for n, cells in zip(size, grid, strict=True))
    return y[:, None], x[None]


def cells_to_pixels(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells (..., h, w, k) enlarged to (..., H, W, k): a pixel shows the cell that it lies in."""
    y, x = cells_of_pixels(cells.shape[-3:-1], size)
    return cells[..., y, x, :]


# ---------------------------------------------------------------------------------------------
# Correspondences


def displacements(match: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """How far away the counterpart of each cell lies, (h, w, 2) float: right and down, in pixels.

    Args:
        match: (h * w,) int, the cell of the other frame that each cell corresponds to.
        grid: (h, w).
        size: (H, W) of the frames.
    """
    h, w = grid
    here_y, here_x = np.divmod(np.arange(h * w), w)
    there_y, there_x = np.divmod(match, w)
    moved = np.stack([(there_x - here_x) * (size[1] / w), (there_y - here_y) * (size[0] / h)], -1)
    return moved.reshape(h, w, 2)


def warp_by_cells(other: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A frame rebuilt from the pixels of another at the counterparts of its cells.

    Args:
        other: (H, W, 3), where the pixels are taken from.
        field: (h, w, 2) of `displacements`; a pixel moves as its cell does, to whole pixels, and
            no further than the frame's edge.
    """
    height, width = other.shape[:2]
    moved = np.rint(cells_to_pixels(field, (height, width))).astype(int)
    y = (np.arange(height)[:, None] + moved[..., 1]).clip(0, height - 1)
    x = (np.arange(width) + moved[..., 0]).clip(0, width - 1)
    return other[y, x]
