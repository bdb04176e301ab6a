"""What an edit needs, told before a model is loaded: its loop is run on a simulated GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow.cache.inputs import VAE_FACTOR
from tokenflow.cache.simulation import SimulatedCache, SimulatedFeatures
from tokenflow.cache.source_features import Step
from tokenflow.cache.source_pass import LiveSource
from tokenflow.diffusion.memory import MOST, ON_CPU, SHARE
from tokenflow.diffusion.temporal_decoder import MOST_FRAMES
from tokenflow.editing.config import EditConfig
from tokenflow.editing.flow_field import ClipFlow
from tokenflow.editing.inputs import EditInputs, open_edit_inputs
from tokenflow.editing.loop import EditSession, plan_steps
from tokenflow.editing.techniques import EditPlan, Technique
from tokenflow.ops.distributed import ProcessGroup
from tokenflow.ops.profiling import disk_text, free_memory, memory_text
from tokenflow.ops.simulated_gpu import is_simulated, simulated_gpu
from tokenflow_utils import TokenFlowContext

log = logging.getLogger("tokenflow")

VIDEO_BYTES = 1  # of both videos for a pixel
CHUNK_SIZES = [MOST >> halvings for halvings in range(6)]  # of `chunk_size: auto`
TOTAL = 80 << 30  # bytes of the simulated GPU; nothing in an edit depends on it
CHUNKS = 2  # of a step; the others take as much


def simulated_edit(
    technique: Technique, inputs: EditInputs, cached: bool | None = None
) -> dict[str, int]:
    """The peak of an edit's GPU memory in bytes, by stage: edit and decode; of one process.

    Args:
        inputs: on any device; its cache need not exist.
        cached: whether features are read; None: whether the cache has some that serve the edit.
    """
    plain = {"compile": False, "attention_backend": "native", "deflicker": False}
    inputs = replace(
        inputs,
        config=inputs.config.model_copy(update=plain),
        cache=SimulatedCache(inputs.cache.folder, inputs.cache.manifest),
        device=torch.device("cuda"),
        group=_Silent(),
    )
    with simulated_gpu(TOTAL) as gpu:
        session = _SimulatedSession(inputs)
        session.cached, session.whole = cached, technique.plan(session)
        latents = session.edit_latents(_one_step_of_each_kind(session.whole))
        peaks = {"edit": gpu.next_stage()}
        session.decode(latents[: max(session.chunk_size, MOST_FRAMES)])
        return peaks | {"decode": gpu.next_stage()}


def fitted(technique: Technique, inputs: EditInputs) -> EditInputs:
    """Inputs whose `chunk_size: auto` is chosen; logs what the edit needs, on a GPU."""
    config, device = inputs.config, inputs.device
    on_gpu = device.type == "cuda" and torch.cuda.is_available() and not is_simulated()
    peaks = None
    if config.chunk_size == "auto":
        chunk_size, free = ON_CPU, free_memory(device)
        sizes = [size for size in CHUNK_SIZES if size < 2 * inputs.n_frames]
        for chunk_size in sizes if on_gpu else ():
            tried = config.model_copy(update={"chunk_size": chunk_size})
            peaks = simulated_edit(technique, replace(inputs, config=tried))
            if max(peaks.values()) <= SHARE * free:
                break
        chunk_size = min(inputs.group.all_gather(chunk_size))
        log.info("chunk_size: %d", chunk_size)
        inputs = replace(inputs, config=config.model_copy(update={"chunk_size": chunk_size}))
    if on_gpu and config.estimate is not False:
        peaks = peaks or simulated_edit(technique, inputs)
        log.info("this edit needs %s", memory_text(peaks, device))
    return inputs


def estimate(technique: Technique, config: EditConfig, group: ProcessGroup) -> str:
    """What an edit needs of memory and disk, two lines; errors: see `open_edit_inputs`."""
    with group.raise_together():
        inputs = open_edit_inputs(config.model_copy(update={"estimate": True}), group)
        technique.check(inputs.config, inputs.checkpoint, inputs.cache.has_depth)
    quiet = inputs.config.model_copy(update={"estimate": False})
    inputs = fitted(technique, replace(inputs, config=quiet))
    memory = memory_text(simulated_edit(technique, inputs), inputs.device)
    return f"memory: {memory}\ndisk: {disk_text(_needed_disk(inputs), Path(config.output_path))}"


def _needed_disk(inputs: EditInputs) -> float:
    """The most bytes of a result: frames/, latents and a checkpoint's, and two videos."""
    manifest = inputs.cache.manifest
    own = manifest.height, manifest.width
    pixels, cells = math.prod(inputs.output_size or own), math.prod(own) / VAE_FACTOR**2
    return inputs.n_frames * (pixels * (3 + VIDEO_BYTES) + 2 * 16 * cells)


class _Silent(ProcessGroup):
    is_main = False  # no progress is shown


def _one_step_of_each_kind(plan: EditPlan) -> EditPlan:
    """A shorter plan with a step of each kind: queries and keys, features, or none injected."""
    ends = sorted({plan.attention_steps, plan.feature_steps, len(plan.timesteps)} - {0})
    return replace(
        plan,
        timesteps=[plan.timesteps[end - 1] for end in ends],
        attention_steps=sum(end <= plan.attention_steps for end in ends),
        feature_steps=sum(end <= plan.feature_steps for end in ends),
    )


class _SimulatedSession(EditSession):
    """A session that computes some chunks of each step, and no optical flow or start noise."""

    cached: bool | None
    whole: EditPlan  # of which steps are taken

    @cached_property
    def flow(self) -> ClipFlow:
        height, width = self.frames.shape[1:3]
        grid = height // self.models.vae_factor, width // self.models.vae_factor
        return ClipFlow(self.frames, grid, lambda *_: torch.zeros(2, height, width))

    def ddim_start(self, t: int) -> Tensor:
        return self.latents(t)

    def noisy_start(self, t: int, noise: str) -> Tensor:
        return self.latents(t)

    def _predict(self, *arguments: Any) -> Tensor:
        *others, chunks = arguments
        return super()._predict(*others, chunks[:CHUNKS])

    def _open_features(
        self, stack: ExitStack, context: TokenFlowContext, steps: Sequence[Step], done: int
    ) -> SimulatedFeatures | LiveSource:
        cached = self.cached
        needed, _ = self._needed_features(plan_steps(self.config, self.whole, len(self.frames)))
        if cached is None and needed is not None:
            cached = self._cached_features(needed)[0] is not None
        if needed is None or not cached:
            return self._live_source(stack, context)
        return SimulatedFeatures(self.models.unet, context, self.flow.grid)
