"""The GPU memory that preprocess needs, by a simulated GPU, and a cache without files for it."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tokenflow.cache.build import DEPTH_BATCH, FEATURE_BATCH
from tokenflow.cache.inputs import (
    VAE_FACTOR,
    PreprocessInputs,
    needed_disk,
    open_preprocess_inputs,
)
from tokenflow.cache.options import PreprocessOptions
from tokenflow.cache.source_cache import SourceCache
from tokenflow.cache.source_features import injected_shape, layer_sizes
from tokenflow.cache.source_pass import LiveSource, patched
from tokenflow.diffusion.conditions import estimate_depth
from tokenflow.diffusion.denoiser import Denoiser, make_denoiser
from tokenflow.diffusion.inversion import predicted_noise
from tokenflow.diffusion.memory import unet_batch_size, vae_batch_size
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.diffusion.vae import decode_latents, encode_frames
from tokenflow.ops.distributed import ProcessGroup
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.ops.profiling import Stopwatch, disk_text, free_memory, memory_text
from tokenflow.ops.simulated_gpu import simulated_gpu
from tokenflow_utils import ATTENTION_LAYERS, TokenFlowContext, neighbours

TOTAL = 80 << 30  # bytes of the simulated GPU where there is none


@torch.inference_mode()
def simulated_preprocess(inputs: PreprocessInputs, total: int) -> dict[str, int]:
    """The peak of preprocess.py's GPU memory in bytes, by stage.

    Args:
        inputs: on any device; the manifest's number of frames counts, not the clip's.
        total: bytes of the GPU, by which batch sizes are chosen that the options leave open.
    """
    options, manifest, device = inputs.options, inputs.manifest, torch.device("cuda")
    cache = SimulatedCache(inputs.folder, manifest)
    n_frames, size = manifest.n_frames, (manifest.height, manifest.width)
    peaks = {}
    with simulated_gpu(total) as gpu:
        models = load_stable_diffusion(
            inputs.checkpoint, device, inputs.dtype, options.allow_pickle
        )
        if manifest.depth_model is not None:
            batch = min(options.batch_size or DEPTH_BATCH, DEPTH_BATCH)
            frames = cache.frames(min(n_frames, batch))
            key, allow = manifest.depth_model, options.allow_pickle
            estimate_depth(frames, key, inputs.checkpoint, device, batch, allow)
            peaks["depth"] = gpu.next_stage()
        vae_batch = vae_batch_size(options.batch_size, models, size)
        latents = encode_frames(models, cache.frames(min(n_frames, vae_batch)), vae_batch)
        decode_latents(models, latents, vae_batch)
        peaks["vae"] = gpu.next_stage()
        denoiser = make_denoiser(
            models,
            cache.frames(n_frames),
            manifest.inversion_prompt,
            manifest.control,
            cache.depth(n_frames),
        )
        batch = unet_batch_size(options.batch_size, denoiser, size)
        rows, t = torch.arange(min(n_frames, batch)), inputs.timesteps.sampling[0]
        predicted_noise(denoiser, cache.latents(t, len(rows)), t, rows, batch)
        peaks["inversion"] = gpu.next_stage()
        if inputs.features is not None:
            batch = unet_batch_size(options.batch_size, denoiser, size, most=FEATURE_BATCH)
            _pass_over(denoiser, cache, inputs, batch)
            peaks["features"] = gpu.next_stage()
    return peaks


def estimate(options: PreprocessOptions, group: ProcessGroup) -> str:
    """What preprocess.py needs of memory and disk, two lines; errors: `open_preprocess_inputs`."""
    with group.raise_together():
        inputs = open_preprocess_inputs(options, group, Stopwatch(torch.device("cpu")))
    free = free_memory(inputs.device) if inputs.device.type == "cuda" else None
    memory = memory_text(simulated_preprocess(inputs, free or TOTAL), inputs.device)
    disk = disk_text(sum(needed_disk(inputs).values()), inputs.folder)
    return f"memory: {memory}\ndisk: {disk}"


def _pass_over(
    denoiser: Denoiser, cache: SimulatedCache, inputs: PreprocessInputs, batch: int
) -> None:
    """The source pass of all keyframes, and of a chunk."""
    settings, t = inputs.features, inputs.timesteps.sampling[0]
    matched = settings.correspondence == "nn"
    context = TokenFlowContext(
        nearest=nearest_tokens if matched else None,
        inject_features=settings.feature_steps > 0,
        keep_matched_tokens=settings.save_tokens == "all",
    )
    source = LiveSource(denoiser, context, lambda t: cache.latents(t, settings.n_frames))
    keyframes = torch.arange(0, settings.n_frames, settings.keyframe_interval)
    with patched(denoiser, context, batch):
        if matched or settings.attention_steps:
            source.load_keyframes(t, keyframes)
        chunk = torch.arange(min(settings.n_frames, batch))
        context.neighbours = neighbours(chunk, keyframes).to(denoiser.models.device)
        source.load_chunk(t, chunk)


class SimulatedCache(SourceCache):
    """The cache of a manifest, whose frames, latents and depth are 0."""

    def latents(self, name: str | int, n_frames: int) -> Tensor:
        grid = (side // VAE_FACTOR for side in (self.manifest.height, self.manifest.width))
        return torch.zeros(n_frames, 4, *grid)

    def frames(self, n_frames: int) -> np.ndarray:
        return np.zeros((n_frames, self.manifest.height, self.manifest.width, 3), np.uint8)

    @property
    def has_depth(self) -> bool:
        return self.manifest.depth_model is not None

    def depth(self, n_frames: int) -> Tensor | None:
        shape = (n_frames, 1, self.manifest.height, self.manifest.width)
        return torch.zeros(shape) if self.has_depth else None


class SimulatedFeatures:
    """A `tokenflow_utils.Source` that fills in what `CachedSource` does, without values.

    Args:
        unet: on the simulated GPU.
        context: of the patch.
        grid: (h, w) of the latents.
    """

    def __init__(
        self, unet: UNet2DConditionModel, context: TokenFlowContext, grid: tuple[int, int]
    ) -> None:
        self.unet, self.context = unet, context
        self.sizes, self.injected = layer_sizes(unet, grid), injected_shape(unet, grid)

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        context, injected = self.context, ATTENTION_LAYERS if self.context.inject_attention else ()
        context.tokens = {
            layer: self._empty(len(frames), h * w, c)
            for layer, (h, w, c) in self.sizes.items()
            if layer in injected
        }
        self._load_features(frames)

    def load_chunk(self, t: int, frames: Tensor) -> None:
        sizes = self.sizes if self.context.nearest else {}
        self.context.matches = {
            layer: self._empty(len(frames), 2, h * w).long() for layer, (h, w, _) in sizes.items()
        }
        self._load_features(frames)

    def _load_features(self, frames: Tensor) -> None:
        shape = len(frames), *self.injected
        self.context.features = self._empty(*shape) if self.context.inject_features else None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.unet.dtype, device=self.unet.device)
