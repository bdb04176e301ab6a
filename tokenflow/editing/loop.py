"""The denoising loop of an edit.

An `EditSession` holds the loaded models and the source of one edit. A technique makes an `EditPlan`
of it (what differs between PnP, SDEdit and ControlNet), and `EditSession.edit_latents` runs the
sampling steps: Algorithm 1 (`tokenflow_utils.tokenflow_step`), or `ablation_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from tokenflow.cache.source_cache import CLEAN_LATENTS
from tokenflow.cache.source_features import (
    CachedFeatures,
    CachedSource,
    FeatureSettings,
    Step,
    find_features,
    layer_sizes,
)
from tokenflow.cache.source_pass import (
    INJECTED_BLOCK,
    FeatureRecorder,
    LiveSource,
    recorded_features,
    recover_features,
)
from tokenflow.diffusion.ddim import CLEAN
from tokenflow.diffusion.denoiser import Denoiser, make_denoiser
from tokenflow.diffusion.memory import MOST_VAE, chunked_forward
from tokenflow.diffusion.models import Loader, load_stable_diffusion
from tokenflow.diffusion.optical_flow import flow_model
from tokenflow.diffusion.samplers import SAMPLERS, DDIMSampler
from tokenflow.diffusion.temporal_decoder import decode_temporally, load_temporal_decoder
from tokenflow.diffusion.vae import decode_latents
from tokenflow.editing.config import EditConfig
from tokenflow.editing.deflicker import deflicker
from tokenflow.editing.flow_field import ClipFlow, FlowSource, smooth_along_flow, warped_noise
from tokenflow.editing.inputs import EditInputs, features_remedy
from tokenflow.editing.keyframe_windows import WindowedAttention, keyframe_windows
from tokenflow.editing.masks import composite, edited_cells
from tokenflow.editing.techniques import EditPlan
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.ops.profiling import Stopwatch, reset_peak_memory
from tokenflow.ops.progress import Progress
from tokenflow.storage.work_dir import WorkDir
from tokenflow_utils import (
    Neighbours,
    Pass,
    Source,
    TokenFlowContext,
    keyframe_schedule,
    neighbours,
    released_neighbours,
    tokenflow_patch,
    tokenflow_step,
)

log = logging.getLogger("tokenflow")

# The choices of a config that the cached features are made for.
SERVED_BY_CACHED_FEATURES = {
    "consistency": "tokenflow",
    "propagation": "paper",
    "keyframes": "random",
}
# Settings that all features of one cache share, whatever preprocess.py is asked to add.
CACHE_SETTINGS = ("n_frames", "n_timesteps", "dtype")


class EditSession:
    """The loaded models and source of one edit.

    Args:
        watch: times the stages; a new one if None.
        load: loads the models; `load_stable_diffusion` if None.
        work: saves the edit every few steps and resumes it; None: not saved.

    Attributes:
        frames, depth: of the source, (n, H, W, 3) uint8 and (n, 1, H, W), or None if the cache
            has none and the plan computes none.
        image_forwards: of the last edit, UNet evaluations (images x branches).
        source_features: of the last edit, "cached" or "live".
        preview: is called after each step with its number and the predicted clean latents.
    """

    def __init__(
        self,
        inputs: EditInputs,
        watch: Stopwatch | None = None,
        load: Loader | None = None,
        work: WorkDir | None = None,
    ) -> None:
        self.inputs, self.config, self.cache = inputs, inputs.config, inputs.cache
        self.group, self.work = inputs.group, work
        self.image_forwards = 0
        self.source_features = "live"
        self.preview: Callable[[int, Tensor], None] | None = None
        self.watch = watch or Stopwatch(inputs.device)
        chunk_size, interval = self.config.chunk_size, self.config.keyframe_interval
        self.chunk_size = interval if chunk_size in (None, "auto") else chunk_size
        reset_peak_memory(inputs.device)
        self._load = load or load_stable_diffusion
        with self.watch("load"):
            self.models = inputs.load_models(self._load, inputs.adapters)
            self.frames = self.cache.frames(inputs.n_frames)
            self.depth = self.cache.depth(inputs.n_frames)

    def latents(self, name: str | int) -> Tensor:
        """The source's latents at a timestep, or the clean ones, (n, 4, h, w)."""
        return self.cache.latents(name, self.inputs.n_frames)

    def ddim_start(self, t: int) -> Tensor:
        """The latents at timestep t that DDIM inversion leads to, (n, 4, h, w).

        `propagation: released` takes the noise of the noisiest latents that preprocess saved
        instead, whose timestep may lie beyond the first sampling timestep, and applies it at t.
        """
        if self.config.propagation == "paper":
            return self.latents(t)
        noisiest = max(self.cache.manifest.timesteps)
        alpha, sigma = self.models.schedule.alpha_sigma(noisiest)
        clean = self.latents(CLEAN_LATENTS)
        eps = (self.latents(noisiest) - alpha * clean) / sigma
        return self.models.schedule.add_noise(clean, eps, t)

    def noisy_start(self, t: int, noise: str) -> Tensor:
        """The source's latents at timestep t with a noise of `NoiseConfig`, (n, 4, h, w)."""
        if noise == "ddim":
            return self.ddim_start(t)
        clean = self.latents(CLEAN_LATENTS)
        generator = torch.Generator().manual_seed(self.config.seed)
        if noise == "shared":
            eps = torch.randn(clean[:1].shape, generator=generator).expand_as(clean)
        else:
            eps = warped_noise(self.flow, clean.shape[1], generator)
        return self.models.schedule.add_noise(clean, eps, t)

    @cached_property
    def flow(self) -> ClipFlow:
        """The optical flow between the source's frames, on the grid of the latents."""
        model = flow_model(self.inputs.flow_weights, self.models.device)
        grid = tuple(size // self.models.vae_factor for size in self.frames.shape[1:3])
        return ClipFlow(self.frames, grid, model)

    @torch.inference_mode()
    def edit_latents(self, plan: EditPlan) -> Tensor:
        """The denoising loop: from the plan's start to clean edited latents, (n, 4, h, w).

        Of several processes, each computes the chunks of its own frames, and the predictions are
        gathered; keyframes that are edited together are shared between the processes separately.
        """
        config, n_frames = self.config, len(self.frames)
        steps = plan_steps(config, plan, n_frames)
        sampler = SAMPLERS[config.sampler](self.models.schedule, plan.timesteps)
        x, done, before = plan.start, 0, 0
        if self.work is not None and self.work.checkpoint is not None:
            saved = self.work.checkpoint
            x, done = saved.tensors["latents"], saved.figures["steps"]
            before = saved.figures["image_forwards"]
            sampler.resume(done, saved.tensors)
            self.watch.add("edit", saved.figures["seconds"])
        self.image_forwards = before
        prompts = [config.negative_prompt, config.prompt]
        if config.guidance_scale == 1.0:  # the unconditional branch would have weight 0
            prompts = [config.prompt]
        with self.watch("load"):
            denoiser = make_denoiser(self.models, self.frames, prompts, plan.control, self.depth)
        shard = self.group.shard(n_frames)
        own = shard.local_indices  # empty if there are more processes than frames
        chunks = own.split(self.chunk_size) if len(own) else ()
        smooth_steps = int(len(steps) * config.smooth_steps)
        context = self._context(denoiser.branches)
        guided = partial(guided_noise, denoiser, context, config.guidance_scale)
        with ExitStack() as stack:
            unet, backend = self.models.unet, config.attention_backend
            stack.enter_context(tokenflow_patch(unet, context, backend))
            features = self._open_features(stack, context, steps, done)
            source = self._with_flow(features, context)
            live = [features.denoiser] if isinstance(features, LiveSource) else []
            denoisers = [denoiser, *live]
            self._bound_memory(stack, denoisers)
            # Entered last: its bar ends before an error is printed.
            progress = stack.enter_context(Progress(len(steps), self.group.is_main))
            for i in progress.over(range(done, len(steps)), "edit", done=done):
                step = steps[i]
                context.inject_attention, context.inject_features = step.attention, step.features
                with self.watch("edit"):
                    eps = self._predict(guided, source, context, x, step, chunks)
                    eps = shard.gather(shard.take(eps))
                    x = self._advance(sampler, x, eps, i, smooth=i < smooth_steps)
                    if isinstance(features, FeatureRecorder):
                        features.save_step(i)
                if self.preview is not None:
                    with self.watch("preview"):
                        self.preview(i, self._expected)
                if (i + 1) % config.checkpoint_every == 0 or i + 1 == len(steps):
                    evaluated = sum(each.image_forwards for each in denoisers)
                    self.image_forwards = before + sum(self.group.all_gather(evaluated))
                    self._checkpoint({"latents": x, **sampler.state()}, i + 1)
        return x

    def _predict(
        self,
        guided: Callable[[Tensor, int, Tensor], Tensor],
        source: Source,
        context: TokenFlowContext,
        x: Tensor,
        step: Step,
        chunks: Sequence[Tensor],
    ) -> Tensor:
        """The guided noise of a step, of the frames in `chunks`: Algorithm 1, or an ablation."""
        if self.config.consistency != "tokenflow":
            consistency = self.config.consistency
            return ablation_step(consistency, guided, source, context, x, step.t, chunks)
        return tokenflow_step(
            guided, source, context, x, step.t, step.keyframes, chunks, self._neighbours
        )

    def _advance(
        self, sampler: DDIMSampler, x: Tensor, eps: Tensor, i: int, smooth: bool
    ) -> Tensor:
        """The latents after step i, from those before it and their noise, all (n, 4, h, w).

        Args:
            smooth: average the predicted clean latents along the flow first.
        """
        schedule, t = self.models.schedule, sampler.levels[i]
        if smooth:
            clean = smooth_along_flow(schedule.predict_clean(x, eps, t), self.flow)
            eps = schedule.predict_noise(x, clean, t)
        if self.preview is not None:
            self._expected = schedule.predict_clean(x, eps, t)
        x = sampler.step(x, eps, i)
        if self.inputs.masks is not None:  # outside, the source's latents at that timestep
            t = sampler.levels[i + 1]
            source = self.latents(CLEAN_LATENTS if t == CLEAN else t)
            x = torch.where(self._edited_cells, x, source)
        return x

    @cached_property
    def _edited_cells(self) -> Tensor:
        return edited_cells(self.inputs.masks, self.models.vae_factor)

    def _checkpoint(self, tensors: dict[str, Tensor], steps: int) -> None:
        if self.work is not None:
            figures = {
                "seconds": self.watch.seconds["edit"],
                "image_forwards": self.image_forwards,
                "source_features": self.source_features,
            }
            self.work.save("edit", tensors, steps=steps, **figures)

    def decode(self, latents: Tensor) -> np.ndarray:
        """The (n, H, W, 3) uint8 frames of clean latents (n, 4, h, w), deflickered if asked for."""
        models, group, key = self.models, self.group, self.config.temporal_decoder
        decode = partial(decode_latents, models, latents, min(self.chunk_size, MOST_VAE), group)
        if key is not None:
            with self.watch("load"):
                decoder = load_temporal_decoder(models, key)
            decode = partial(decode_temporally, models, decoder, latents, group)
        with self.watch("decode"):
            frames = decode()
        if self.config.deflicker:
            with self.watch("deflicker"):
                frames = deflicker(frames, self.frames, self.flow.model, group=group)
        return frames

    def composite(self, frames: np.ndarray) -> np.ndarray:
        """The edited frames with the source's pixels outside of the mask, if there is one."""
        if self.inputs.masks is None or not self.config.composite:
            return frames
        return composite(frames, self.frames, self.inputs.masks)

    def _context(self, branches: int) -> TokenFlowContext:
        """The patch's context; processes share the frames that attend to each other."""
        config = self.config
        context = TokenFlowContext(
            branches=branches,
            propagate_source=config.propagation == "released",
            keep_base=config.consistency == "tokenflow",
            nearest=None if config.correspondence == "flow" else nearest_tokens,
        )
        if config.consistency in ("tokenflow", "extended_attention"):
            together = len(self.frames)
            if config.consistency == "tokenflow":
                together = -(-together // config.keyframe_interval)
            shard = self.group.shard(together, joint=True)
            windows = keyframe_windows(together, config.max_keyframes, self.chunk_size)
            context.attend = WindowedAttention(windows, self.models.device, shard)
            context.shard, context.gather = shard.take, shard.gather
        return context

    def _neighbours(self, chunk: Tensor, keyframes: Tensor) -> Neighbours:
        if self.config.propagation == "released":
            near = released_neighbours(chunk, self.config.keyframe_interval)
        else:
            near = neighbours(chunk, keyframes, self.config.blend)
        return near.to(self.models.device)

    def _bound_memory(self, stack: ExitStack, denoisers: Sequence[Denoiser]) -> None:
        """Lets the networks compute a chunk's images at once, at most."""
        # first_frame adds the first frame to each chunk.
        images = self.chunk_size + (self.config.consistency == "first_frame")
        for network in {network for each in denoisers for network in each.networks}:
            bounded = chunked_forward(network, images * denoisers[0].branches, (INJECTED_BLOCK,))
            stack.enter_context(bounded)

    def _with_flow(self, source: Source, context: TokenFlowContext) -> Source:
        """A source with the correspondences of the config, which may be those of optical flow."""
        if self.config.correspondence == "nn" or self.config.consistency != "tokenflow":
            return source
        grid = self.flow.grid
        sizes = layer_sizes(self.models.unet, grid)
        grids = {layer: (h, w) for layer, (h, w, _) in sizes.items()}
        hybrid = self.config.correspondence == "hybrid"
        return FlowSource(source, context, self.flow, grids, hybrid)

    def _open_features(
        self, stack: ExitStack, context: TokenFlowContext, steps: Sequence[Step], done: int
    ) -> CachedSource | LiveSource:
        """Chooses cached or live source features; logs the choice."""
        saves = self.config.source_features == "save" and self.group.size == 1
        if saves:
            recover_features(self.cache)
        features, needed, reason = None, *self._needed_features(steps)
        if needed is not None:
            features, reason = self._cached_features(needed)
        self.source_features = "live" if features is None else "cached"
        kind = f"{self.source_features} of {self.cache.sha256}"
        self.group.assert_same(kind, "source cache and its features")
        if 0 < done == len(steps):  # none is left to take; the checkpoint says what those took
            figures = self.work.checkpoint.figures
            self.source_features = figures.get("source_features", self.source_features)
        if features is not None:
            log.info("source features: read from %s", features.folder)
            device = self.models.device
            source = CachedSource(context, device, features, steps[done:])
            return stack.enter_context(closing(source))
        if self.config.consistency == "tokenflow":
            log.info("source features: computed live (%s)", reason)
        live = self._live_source(stack, context)
        if saves and needed is not None:
            if len(steps) < self.config.n_timesteps:
                log.warning("source_features: save: nothing is saved of a part of the steps")
                return live
            log.info("source features: saved in %s for later edits", self.cache.folder)
            recorded = recorded_features(
                self.cache, live, needed, self.inputs.timesteps, self.chunk_size
            )
            return stack.enter_context(recorded)
        return live

    def _live_source(self, stack: ExitStack, context: TokenFlowContext) -> LiveSource:
        manifest, models = self.cache.manifest, self.models
        if self.inputs.source_adapters != self.inputs.adapters:
            with self.watch("load"):
                models = self.inputs.load_models(self._load, self.inputs.source_adapters)
            stack.enter_context(
                tokenflow_patch(models.unet, context, self.config.attention_backend)
            )
        denoiser = make_denoiser(
            models, self.frames, manifest.inversion_prompt, manifest.control, self.depth
        )
        return LiveSource(denoiser, context, self.latents)

    def _needed_features(self, steps: Sequence[Step]) -> tuple[FeatureSettings | None, str]:
        """The features that serve this edit; None if no cached ones do, and why not."""
        config = self.config
        if config.source_features == "live":
            return None, "source_features: live"
        for key, served in SERVED_BY_CACHED_FEATURES.items():
            if getattr(config, key) != served:
                return None, f"{key}: {getattr(config, key)}"
        attention = sum(step.attention for step in steps)
        injected = sum(step.features for step in steps)
        if config.correspondence == "flow" and not (attention or injected):
            return None, "optical flow needs none"
        skipped = config.n_timesteps - len(steps)  # SDEdit leaves the noisiest out
        needed = FeatureSettings(
            n_frames=len(self.frames),
            keyframe_interval=config.keyframe_interval,
            keyframe_seed=config.keyframe_seed,
            n_timesteps=config.n_timesteps,
            attention_steps=attention and skipped + attention,
            feature_steps=injected and skipped + injected,
            dtype=self.models.dtype_name,
            correspondence="flow" if config.correspondence == "flow" else "nn",
        )
        return needed, ""

    def _cached_features(self, needed: FeatureSettings) -> tuple[CachedFeatures | None, str]:
        """The cache's features if they serve this edit; else None, and why not."""
        config, cache = self.config, self.cache
        fix_hint = features_remedy(config, cache.manifest)
        features = find_features(cache, fix_hint)
        if features is None:
            return None, f"{cache.folder} holds none; for some, {fix_hint}"
        reason = features.settings.mismatch(needed)
        if not reason:
            return features, ""
        same = {key: getattr(features.settings, key) for key in CACHE_SETTINGS}
        if features.settings.mismatch(needed.model_copy(update=same)):  # preprocess.py could add
            reason += f"; for others, {fix_hint}"
        return None, f"{features.folder}: {reason}"


def keyframes_of_steps(config: EditConfig, n_frames: int, n_steps: int) -> Tensor:
    """The keyframes of the steps that an edit takes, (n_steps, k) int64.

    SDEdit takes the last steps of the schedule, and each step has the same keyframes whether or
    not others come before it. With `propagation: released` the first step taken draws first, as
    in the published code.
    """
    schedule = keyframe_schedule(
        n_frames,
        config.keyframe_interval,
        config.n_timesteps,
        config.keyframe_seed,
        config.keyframes,
    )
    return schedule[:n_steps] if config.propagation == "released" else schedule[-n_steps:]


def plan_steps(config: EditConfig, plan: EditPlan, n_frames: int) -> list[Step]:
    """The steps of a plan: timestep, keyframes, and what is injected."""
    keyframes = keyframes_of_steps(config, n_frames, len(plan.timesteps))
    return [
        Step(t, kf, attention=i < plan.attention_steps, features=i < plan.feature_steps)
        for i, (t, kf) in enumerate(zip(plan.timesteps, keyframes, strict=True))
    ]


def guided_noise(
    denoiser: Denoiser,
    context: TokenFlowContext,
    guidance_scale: float,
    x: Tensor,
    t: int,
    frames: Tensor,
) -> Tensor:
    """eps of frames (m,) with classifier-free guidance, (m, 4, h, w) float32 on the CPU.

    Of frames that attend to each other, each process computes its shard.
    """
    if context.mode is Pass.EXTENDED:
        x, frames = context.shard(x), context.shard(frames)
    eps = denoiser(x, t, frames)  # (B, m, 4, h, w)
    if len(eps) == 2:
        uncond, cond = eps
        eps = (uncond + guidance_scale * (cond - uncond))[None]
    return eps[0].cpu()


# Each frame on its own, or with the first alone (Text2Video-Zero, Khachatryan et al. 2023), or with
# all frames as keyframes ("w/o TokenFlow").
ABLATIONS = {
    "none": Pass.PER_FRAME,
    "first_frame": Pass.FIRST_FRAME,
    "extended_attention": Pass.EXTENDED,
}


def ablation_step(
    consistency: str,
    edit: Callable[[Tensor, int, Tensor], Tensor],
    source: Source,
    context: TokenFlowContext,
    x: Tensor,
    t: int,
    chunks: Sequence[Tensor],
) -> Tensor:
    """A sampling step without TokenFlow: the ablations and baselines of Table 1.

    Args:
        consistency: of `ABLATIONS`.
        edit, source, context, x, t, chunks: as in `tokenflow_step`, and so is what is returned.
    """
    eps = torch.empty_like(x)
    mode, n_first = ABLATIONS[consistency], int(consistency == "first_frame")
    if mode is Pass.EXTENDED:
        chunks = [torch.arange(len(x))]
    for chunk in chunks:
        frames = torch.cat([torch.zeros(n_first, dtype=chunk.dtype), chunk])
        if context.inject_attention or context.inject_features:
            source.load_keyframes(t, frames)
        context.mode = mode
        found = edit(x[frames], t, frames)[n_first:]
        eps[chunk] = context.gather(found) if mode is Pass.EXTENDED else found
    return eps
