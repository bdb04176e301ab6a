"""Self-attention tokens of clips: how they are taken, coloured and matched.

The tokens of a layer are extracted at one timestep of the cache's inversion, with the cache's own
denoiser: ordinary attention, no guidance, no TokenFlow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.cache.source_cache import CLEAN_LATENTS, SourceCache
from tokenflow.cache.source_features import find_features, layer_sizes
from tokenflow.diffusion.adapters import recorded_adapters
from tokenflow.diffusion.checkpoints import (
    checkpoint_folder,
    checkpoint_revision,
    load_unet_skeleton,
)
from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule, ddim_step
from tokenflow.diffusion.denoiser import Denoiser, make_denoiser
from tokenflow.diffusion.inversion import invert
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import (
    StableDiffusion,
    load_stable_diffusion,
    resolve_device,
    resolve_dtype,
)
from tokenflow.diffusion.vae import encode_frames
from tokenflow.figures.options import ViewOptions
from tokenflow_utils import (
    Neighbours,
    Pass,
    TokenFlowContext,
    self_attention_layers,
    tokenflow_patch,
)
from util import UserError

_LAYER_SUFFIX = ".transformer_blocks.0.attn1.processor"


class View:
    """Takes the tokens of a layer at a timestep; the model is loaded when it is first needed.

    Tokens are (frames, L, c) float32 on the CPU.

    Attributes:
        layer: a key of `unet.attn_processors`.
        inversion: the inversion's timesteps up to the chosen one, ascending.
        sampling: the timesteps that preprocess saved latents for, noisiest first.

    Raises:
        UserError: naming the option that does not fit the cache, and what it could be.
    """

    def __init__(self, options: ViewOptions, cache: SourceCache) -> None:
        self.cache, self.manifest = cache, cache.manifest
        self.what, self.batch_size = options.what, options.batch_size
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        half = self.dtype is torch.float16
        self.checkpoint = checkpoint_folder(
            options.model_key or self.manifest.model_key,
            architecture_key=self.manifest.architecture_key or MODELS[self.manifest.sd_version],
            half=half,
        )
        if checkpoint_revision(self.checkpoint, half) != self.manifest.model_revision:
            raise UserError(
                f"{self.checkpoint}: not the model that {cache.folder} was made with "
                f"({self.manifest.model_key}); name that one with --model_key, or build the cache "
                "again"
            )
        layers = self_attention_layers(load_unet_skeleton(self.checkpoint))
        names = {layer.removesuffix(_LAYER_SUFFIX): layer for layer in layers}
        self.name = options.layer.removesuffix(_LAYER_SUFFIX)
        if self.name not in names:
            raise UserError(
                f"--layer: {options.layer} is unknown, expected one of {', '.join(names)}"
            )
        self.layer = names[self.name]
        schedule = NoiseSchedule.of_checkpoint(self.checkpoint)
        inversion = schedule.timesteps(self.manifest.steps)[::-1]
        self.sampling = schedule.timesteps(self.manifest.save_steps)
        self.timestep = options.timestep
        if self.timestep is None:
            self.timestep = self.sampling[len(self.sampling) // 2]
        if self.timestep not in inversion:
            nearest = min(inversion, key=lambda t: abs(t - self.timestep))
            raise UserError(
                f"--timestep: {self.timestep} is none of the {len(inversion)} of the inversion; "
                f"the nearest is {nearest}; those with cached latents are "
                f"{', '.join(map(str, self.manifest.timesteps))}"
            )
        self.inversion = inversion[: inversion.index(self.timestep) + 1]

    @cached_property
    def models(self) -> StableDiffusion:
        manifest = self.manifest
        adapters = recorded_adapters(
            manifest, manifest.adapters, self.cache.folder, "build the cache again"
        )
        return load_stable_diffusion(self.checkpoint, self.device, self.dtype, False, adapters)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """The (h, w) in which a frame's tokens lie."""
        factor = self.models.vae_factor
        latents = self.manifest.height // factor, self.manifest.width // factor
        return layer_sizes(self.models.unet, latents)[self.layer][:2]

    @property
    def title(self) -> str:
        """What the features are, for a figure."""
        h, w = self.grid
        where = f"{self.name} ({h} x {w}) at timestep {self.timestep}"
        return f"self-attention {self.what} tokens of {where}"

    def source_tokens(self, chosen: Sequence[int]) -> Tensor:
        """The tokens of some of the clip's frames, from what the cache holds of them."""
        cache, chosen, n_frames = self.cache, list(chosen), max(chosen) + 1
        saved = self._saved_tokens()
        if saved is not None:
            return saved[chosen].float()
        denoiser = self.source_denoiser(chosen)
        if self.timestep in self.manifest.timesteps:
            return self._tokens(denoiser, cache.latents(self.timestep, n_frames)[chosen])
        clean = cache.latents(CLEAN_LATENTS, n_frames)[chosen]
        return self._tokens(denoiser, self._inverted(denoiser, clean))

    def edit_tokens(self, frames: np.ndarray, prompt: str) -> Tensor:
        """The tokens of an edited video, taken as the source's were: encoded and inverted.

        A ControlNet of the inversion follows the edited frames, but depth is the source's.

        Args:
            frames: (n, H, W, 3) uint8, the first ones of the clip.
            prompt: the edit's.
        """
        denoiser = self._denoiser(frames, prompt, range(len(frames)))
        clean = encode_frames(self.models, frames, self.batch_size)
        return self._tokens(denoiser, self._inverted(denoiser, clean))

    def source_denoiser(self, chosen: Sequence[int]) -> Denoiser:
        """The noise prediction of the cache's inversion, for some of the clip's frames."""
        frames = self.cache.frames(max(chosen) + 1)[list(chosen)]
        return self._denoiser(frames, self.manifest.inversion_prompt, chosen)

    def _denoiser(self, frames: np.ndarray, prompt: str, chosen: Sequence[int]) -> Denoiser:
        depth = self.cache.depth(max(chosen) + 1)
        depth = depth if depth is None else depth[list(chosen)]
        return make_denoiser(self.models, frames, prompt, self.manifest.control, depth)

    def _saved_tokens(self) -> Tensor | None:
        """The tokens of every frame, where --save_tokens all saved them."""
        found = find_features(self.cache)
        if found is None or self.what != "input" or self.timestep not in self.sampling:
            return None
        dtype = str(self.dtype).removeprefix("torch.")
        if found.settings.save_tokens != "all" or found.settings.dtype != dtype:
            return None
        return found.tokens(self.timestep, self.layer)

    def _inverted(self, denoiser: Denoiser, clean: Tensor) -> Tensor:
        """Clean latents inverted up to the timestep, in the steps of the cache's inversion."""
        how = self.manifest.inversion_iters, self.manifest.inversion_tol, self.batch_size
        [(_, latents)] = deque(invert(denoiser, clean, self.inversion, *how), maxlen=1)  # the last
        return latents

    @torch.inference_mode()
    def _tokens(self, denoiser: Denoiser, noisy: Tensor) -> Tensor:
        """The tokens of latents (n, 4, h, w) at the timestep."""
        kept: list[Tensor] = []
        attention = self.models.unet.get_submodule(self.layer.removesuffix(".processor"))

        def keep(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            kept.append((given[0] if self.what == "input" else output).float().cpu())

        with attention.register_forward_hook(keep):
            for frames in torch.arange(len(noisy)).split(self.batch_size):
                denoiser(noisy[frames], self.timestep, frames)
        return torch.cat(kept)


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
    which = torch.zeros(1, 2, dtype=torch.long, device=models.device)
    near = Neighbours(which, weight=torch.ones(1, device=models.device))
    context = TokenFlowContext(propagate_source=True, neighbours=near)
    steps = list(zip(timesteps, [*timesteps[1:], CLEAN], strict=True))
    with tokenflow_patch(models.unet, context):
        for t, t_next in tqdm(steps, desc="rebuild", unit="step"):
            context.mode = Pass.SOURCE
            keyframe_eps = denoiser(keyframe, t, torch.tensor([1]))[0].cpu()
            context.mode = Pass.MATCH
            eps = denoiser(frame, t, torch.tensor([0]))[0].cpu()
            frame = ddim_step(frame, eps, schedule, t, t_next)
            keyframe = ddim_step(keyframe, keyframe_eps, schedule, t, t_next)
    return frame


# ---------------------------------------------------------------------------------------------
# Feature tokens as colours


def principal_components(tokens: Tensor, n_components: int = 3) -> tuple[Tensor, Tensor]:
    """The principal components of (N, c) tokens, from the exact eigenvectors of their covariance.

    Float64 throughout, so that a second run and another machine find the same colours. Each
    component points to where its direction's entry of the largest magnitude is positive.

    Returns:
        the tokens' coordinates (N, k) float32, by descending variance; and the share of the
        variance along each, (k,) float64.
    """

    def pieces() -> Iterator[Tensor]:  # a copy in float64 of all would be large
        return (piece.double() for piece in tokens.split(1 << 16))

    mean = sum(piece.sum(0) for piece in pieces()) / len(tokens)
    covariance = sum((piece - mean).T @ (piece - mean) for piece in pieces()) / len(tokens)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    basis = vectors[:, -n_components:].flip(1)  # (c, k)
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    explained = values[-n_components:].flip(0) / values.sum().clamp(min=1e-300)
    return torch.cat([((piece - mean) @ basis).float() for piece in pieces()]), explained


def component_colours(coordinates: np.ndarray) -> np.ndarray:
    """Three components (..., 3) as colours, (..., 3) uint8 RGB, on one scale for all.

    The first component is green, the second red, the third blue: in this order they weigh in a
    colour's brightness, so that a print in grey shows mostly the first. The 1st to the 99th
    percentile of each becomes 0 to 255.
    """
    low, high = np.percentile(coordinates.reshape(-1, 3), [1, 99], axis=0)
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
    coordinates, explained = principal_components(together.flatten(0, 2))
    colours = component_colours(coordinates.numpy()).reshape(*together.shape[:2], *grid, 3)
    return [cells_to_pixels(video, size) for video in colours], float(explained.sum())


def cells_to_pixels(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells (..., h, w, k) enlarged to (..., H, W, k): a pixel shows the cell that it lies in."""
    grid = cells.shape[-3:-1]
    y, x = ((np.arange(n) * 2 + 1) * of // (2 * n) for n, of in zip(size, grid, strict=True))
    return cells[..., y[:, None], x, :]


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
    there, here = (np.stack(np.divmod(cells, w), -1) for cells in (match, np.arange(h * w)))
    moved = (there - here) * (size[0] / h, size[1] / w)  # down, right
    return moved[:, ::-1].reshape(h, w, 2)


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
