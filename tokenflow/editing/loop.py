"""The denoising loop of an edit.

An `EditSession` holds the loaded models and the source of one edit. A technique makes an `EditPlan`
of it (what differs between PnP, SDEdit and ControlNet), and `EditSession.edit_latents` runs the
sampling steps. One step is a function with the signature of `tokenflow_utils.tokenflow_step`;
`STEPS` has one for each choice of `consistency`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.cache.source_cache import CLEAN_LATENTS
from tokenflow.cache.source_features import (
    CachedFeatures,
    CachedSource,
    FeatureSettings,
    Step,
    find_features,
)
from tokenflow.cache.source_pass import INJECTED_BLOCK, LiveSource
from tokenflow.diffusion.chunked import chunked_forward
from tokenflow.diffusion.conditions import Control
from tokenflow.diffusion.ddim import CLEAN, ddim_step
from tokenflow.diffusion.denoiser import Denoiser, depth_channel, encode_prompts, make_denoiser
from tokenflow.diffusion.models import Loader, StableDiffusion, compile_unet, load_stable_diffusion
from tokenflow.diffusion.vae import decode_latents
from tokenflow.editing.config import EditConfig
from tokenflow.editing.flow_field import FlowSource
from tokenflow.editing.inputs import EditInputs, features_remedy
from tokenflow.editing.keyframe_windows import WindowedAttention, keyframe_windows
from tokenflow.editing.results import Edited
from tokenflow.ops.distributed import ProcessGroup
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.ops.profiling import Stopwatch, device_name, reset_peak_memory, versions
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
    "source_features": "auto",
    "consistency": "tokenflow",
    "propagation": "paper",
    "correspondence": "nn",
    "keyframes": "random",
}
# Settings that all features of one cache share, whatever preprocess.py is asked to add.
CACHE_SETTINGS = ("n_frames", "n_timesteps", "dtype")


@dataclass(frozen=True)
class EditPlan:
    """What a technique does: where sampling starts, what is injected, what conditions it.

    Attributes:
        timesteps: of the steps to take, noisiest first: the schedule's last ones, or all.
        start: (n, 4, h, w) float32 latents at timesteps[0].
        attention_steps: PnP injects queries and keys in this many first steps.
        feature_steps: PnP injects convolution features in this many first steps.
        control: a ControlNet that conditions the edit.
    """

    timesteps: list[int]
    start: Tensor
    attention_steps: int = 0
    feature_steps: int = 0
    control: Control | None = None


class EditSession:
    """The loaded models and source of one edit.

    Args:
        models: of the inputs' checkpoint, device and dtype; loaded if None.
        watch: times the stages; a new one if None.
        load: loads the models; `load_stable_diffusion` if None.
        work: saves the edit every few steps and resumes it; None: not saved.

    Attributes:
        frames, depth: of the source, (n, H, W, 3) uint8 and (n, 1, H, W) or None.
        image_forwards: of the last edit, UNet evaluations (images x branches).
        source_features: of the last edit, "cached" or "live"; of a resumed one perhaps both.
    """

    def __init__(
        self,
        inputs: EditInputs,
        models: StableDiffusion | None = None,
        watch: Stopwatch | None = None,
        load: Loader | None = None,
        work: WorkDir | None = None,
    ) -> None:
        self.inputs, self.config, self.cache = inputs, inputs.config, inputs.cache
        self.group: ProcessGroup = inputs.group
        self.work = work
        self.image_forwards = 0
        self.source_features = "live"
        self.watch = watch or Stopwatch(inputs.device)
        self.chunk_size = self.config.chunk_size or self.config.batch_size
        reset_peak_memory(inputs.device)
        with self.watch("load"):
            self.models = models or (load or load_stable_diffusion)(
                inputs.checkpoint, inputs.device, inputs.dtype, inputs.config.allow_pickle
            )
            if inputs.config.compile:
                compile_unet(self.models.unet)
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

    def gaussian_start(self, t: int) -> Tensor:
        """The clean latents with one Gaussian noise, shared by all frames, at timestep t."""
        clean = self.latents(CLEAN_LATENTS)
        generator = torch.Generator().manual_seed(self.config.seed)
        eps = torch.randn(clean[:1].shape, generator=generator)
        return self.models.schedule.add_noise(clean, eps.expand_as(clean), t)

    @torch.inference_mode()
    def edit_latents(self, plan: EditPlan) -> Tensor:
        """The denoising loop: from the plan's start to clean edited latents, (n, 4, h, w)."""
        config, schedule = self.config, self.models.schedule
        steps = plan_steps(config, plan, len(self.frames))
        with self.watch("edit"):
            sampler = _Sampler(self, plan)
        x, done, before = plan.start, 0, 0
        saved = self.work and self.work.checkpoint
        if saved:
            x, done = saved.tensors["latents"], saved.figures["steps"]
            before = saved.figures["image_forwards"]
            self.watch.add("edit", saved.figures["seconds"])
        self.image_forwards = before
        with ExitStack() as stack:
            stack.enter_context(sampler.patched())
            source = stack.enter_context(sampler.open_source(steps, done))
            following = [*plan.timesteps[1:], CLEAN]
            progress = {"initial": done, "disable": not self.group.is_main, "unit": "step"}
            for i in tqdm(range(done, len(steps)), "edit", len(steps), **progress):
                t, step = steps[i].t, steps[i]
                with self.watch("edit"):
                    eps = sampler.predict(source, x, step)
                    x = ddim_step(
                        x, eps, schedule.alpha_sigma(t), schedule.alpha_sigma(following[i])
                    )
                if (i + 1) % config.checkpoint_every == 0 or following[i] == CLEAN:
                    self.image_forwards = before + sum(
                        self.group.all_gather(sampler.image_forwards)
                    )
                    self._checkpoint(x, i + 1)
        return x

    def _checkpoint(self, x: Tensor, steps: int) -> None:
        """Checkpoints the latents after step `steps`."""
        if self.work is not None:
            self.work.save(
                "edit",
                {"latents": x},
                steps=steps,
                seconds=self.watch.seconds["edit"],
                image_forwards=self.image_forwards,
                source_features=self.source_features,
            )

    def decode(self, latents: Tensor) -> Edited:
        """The edited clip of clean latents (n, 4, h, w)."""
        with self.watch("decode"):
            frames = decode_latents(self.models, latents, self.chunk_size, self.group)
        return Edited(frames, latents)

    def run_record(self) -> dict:
        """What run.yaml says of the edit, apart from its technique, files and peak memory."""
        return {
            "cache": str(self.cache.folder),
            "cache_sha256": self.cache.sha256,
            "checkpoint": str(self.inputs.checkpoint),
            "checkpoint_revision": self.cache.manifest.model_revision,
            "n_frames": len(self.frames),
            "device": device_name(self.inputs.device),
            "processes": self.group.size,
            "dtype": self.models.dtype_name,
            "source_features": self.source_features,
            "image_forwards": self.image_forwards,
            "seconds": self.watch.seconds,
            "versions": versions(),
        }


def keyframes_of_steps(config: EditConfig, n_frames: int, n_steps: int) -> Tensor:
    """The keyframes of the steps that an edit takes, (n_steps, k) int64.

    SDEdit takes the last steps of the schedule, and each step has the same keyframes whether or
    not others come before it. With `propagation: released` the first step taken draws first, as
    in the published code.
    """
    schedule = keyframe_schedule(
        n_frames, config.batch_size, config.n_timesteps, config.keyframe_seed, config.keyframes
    )
    return schedule[:n_steps] if config.propagation == "released" else schedule[-n_steps:]


def plan_steps(config: EditConfig, plan: EditPlan, n_frames: int) -> list[Step]:
    """The steps of a plan: timestep, keyframes, and what is injected."""
    keyframes = keyframes_of_steps(config, n_frames, len(plan.timesteps))
    return [
        Step(t, kf, attention=i < plan.attention_steps, features=i < plan.feature_steps)
        for i, (t, kf) in enumerate(zip(plan.timesteps, keyframes, strict=True))
    ]


# ---------------------------------------------------------------------------------------------
# Sampling steps without TokenFlow: the ablations and baselines of Table 1, with the signature of
# `tokenflow_step`

Edit = Callable[[Tensor, int, Tensor], Tensor]
FindNeighbours = Callable[[Tensor, Tensor], Neighbours]


def extended_attention_step(
    edit: Edit, source: Source, context: TokenFlowContext, x: Tensor, t: int, keyframes: Tensor,
    chunks: Sequence[Tensor], find_neighbours: FindNeighbours,
) -> Tensor:  # fmt: skip
    """Every frame is a keyframe, and nothing is propagated (Table 1, "w/o TokenFlow")."""
    frames = torch.arange(len(x))
    if context.inject_attention or context.inject_features:
        source.load_keyframes(t, frames)
    context.mode = Pass.EXTENDED
    return context.gather(edit(x, t, frames))


def per_frame_step(
    edit: Edit, source: Source, context: TokenFlowContext, x: Tensor, t: int, keyframes: Tensor,
    chunks: Sequence[Tensor], find_neighbours: FindNeighbours,
) -> Tensor:  # fmt: skip
    """The base technique alone, each frame by itself."""
    eps = torch.empty_like(x)
    for chunk in chunks:
        if context.inject_attention or context.inject_features:
            source.load_keyframes(t, chunk)
        context.mode = Pass.PER_FRAME
        eps[chunk] = edit(x[chunk], t, chunk)
    return eps


def first_frame_step(
    edit: Edit, source: Source, context: TokenFlowContext, x: Tensor, t: int, keyframes: Tensor,
    chunks: Sequence[Tensor], find_neighbours: FindNeighbours,
) -> Tensor:  # fmt: skip
    """Every frame attends to the first alone (Text2Video-Zero, Khachatryan et al. 2023)."""
    eps = torch.empty_like(x)
    for chunk in chunks:
        frames = torch.cat([torch.zeros(1, dtype=chunk.dtype), chunk])
        if context.inject_attention or context.inject_features:
            source.load_keyframes(t, frames)
        context.mode = Pass.FIRST_FRAME
        eps[chunk] = edit(x[frames], t, frames)[1:]
    return eps


STEPS = {
    "tokenflow": tokenflow_step,
    "extended_attention": extended_attention_step,
    "first_frame": first_frame_step,
    "none": per_frame_step,
}


# ---------------------------------------------------------------------------------------------


class _Sampler:
    """What one run of the loop needs: the denoiser of the edit, the context, the source.

    With several processes, each computes the chunks of its own frames, and the predictions are
    gathered; keyframes that are edited together are shared between the processes separately.
    """

    def __init__(self, session: EditSession, plan: EditPlan) -> None:
        config, models = session.config, session.models
        self.session, self.config, self.device = session, config, models.device
        self.grid = plan.start.shape[-2:]
        prompts = [config.negative_prompt, config.prompt]
        if config.guidance_scale == 1.0:  # the unconditional branch would have weight 0
            prompts = [config.prompt]
        text = encode_prompts(models, prompts)
        depth = depth_channel(models, session.frames, session.depth)
        self.edit = Denoiser(models, text, depth, plan.control)
        self.live: Denoiser | None = None  # of the source pass, unless its features are cached
        n_frames, group = len(session.frames), session.group
        self.shard = group.shard(n_frames)
        own = self.shard.local_indices  # empty if there are more processes than frames
        self.chunks = own.split(session.chunk_size) if len(own) else ()
        self.context = TokenFlowContext(
            branches=len(prompts),
            propagate_source=config.propagation == "released",
            keep_base=config.consistency == "tokenflow",
            nearest=nearest_tokens if config.correspondence == "nn" else None,
        )
        if config.consistency in ("tokenflow", "extended_attention"):
            together = n_frames  # frames in extended attention
            if config.consistency == "tokenflow":
                together = -(-n_frames // config.batch_size)
            keyframe_shard = group.shard(together, joint=True)
            windows = keyframe_windows(together, config.max_keyframes, session.chunk_size)
            self.context.attend = WindowedAttention(windows, self.device, keyframe_shard)
            self.context.shard, self.context.gather = keyframe_shard.take, keyframe_shard.gather

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Patches the UNet, and bounds the images that it computes at once."""
        unet, backend = self.session.models.unet, self.config.attention_backend
        with (
            tokenflow_patch(unet, self.context, backend),
            self._chunked(unet, skip=(INJECTED_BLOCK,)),
        ):
            yield

    def _chunked(self, model: nn.Module, skip: Sequence[str] = ()) -> AbstractContextManager:
        # A chunk's images; first_frame adds the first frame to each.
        images = self.session.chunk_size + (self.config.consistency == "first_frame")
        return chunked_forward(model, images * self.context.branches, skip)

    def predict(self, source: Source, x: Tensor, step: Step) -> Tensor:
        """The guided noise of all frames, (n, 4, h, w) float32 on the CPU.

        Args:
            x: (n, 4, h, w) latents of the edit at step.t.
        """
        self.context.inject_attention = step.attention
        self.context.inject_features = step.features
        sampling_step = STEPS[self.config.consistency]
        eps = sampling_step(
            self._guided, source, self.context, x, step.t, step.keyframes, self.chunks,
            self._neighbours,
        )  # fmt: skip
        if self.config.consistency == "extended_attention":  # gathered by the keyframes' shards
            return eps
        return self.shard.gather(self.shard.take(eps))

    def _guided(self, x: Tensor, t: int, frames: Tensor) -> Tensor:
        """eps of frames (m,) with classifier-free guidance; of keyframes, this process's shard."""
        if self.context.mode is Pass.EXTENDED:
            x, frames = self.context.shard(x), self.context.shard(frames)
        eps = self.edit(x, t, frames)  # (B, m, 4, h, w)
        if len(eps) == 2:
            uncond, cond = eps
            eps = (uncond + self.config.guidance_scale * (cond - uncond))[None]
        return eps[0].cpu()

    def _neighbours(self, chunk: Tensor, keyframes: Tensor) -> Neighbours:
        if self.config.propagation == "released":
            near = released_neighbours(chunk, self.config.batch_size)
        else:
            near = neighbours(chunk, keyframes, self.config.blend)
        return near.to(self.device)

    @property
    def image_forwards(self) -> int:
        """Evaluations of the UNet on one image and branch so far."""
        return self.edit.image_forwards + (self.live.image_forwards if self.live else 0)

    @contextmanager
    def open_source(self, steps: Sequence[Step], done: int) -> Iterator[Source]:
        """Chooses cached or live source features for the remaining steps, and logs the choice.

        Args:
            steps, done: all steps of the plan, and how many are done.
        """
        session = self.session
        features, reason = self._cached_features(steps)
        session.source_features = "cached" if features is not None else "live"
        if session.work and session.work.checkpoint:
            before = session.work.checkpoint.figures["source_features"]
            if not before.endswith(session.source_features):
                session.source_features = f"{before}, then {session.source_features}"
            else:
                session.source_features = before
        kind = f"{session.source_features} of {session.cache.sha256}"
        session.group.assert_same(kind, "source cache and its features")
        with ExitStack() as stack:
            if features is not None:
                log.info("source features: read from %s", features.folder)
                source = CachedSource(
                    self.context, self.device, features, steps[done:], self.chunks
                )
                stack.enter_context(closing(source))
            else:
                if self.config.consistency == "tokenflow":
                    log.info("source features: computed live (%s)", reason)
                source = self._live_source()
            denoisers = [self.edit, self.live] if self.live else [self.edit]
            for control in {d.control.controlnet for d in denoisers if d.control}:
                stack.enter_context(self._chunked(control))
            yield source

    def _live_source(self) -> Source:
        session, manifest = self.session, self.session.cache.manifest
        self.live = make_denoiser(
            session.models,
            session.frames,
            manifest.inversion_prompt,
            manifest.control,
            session.depth,
        )
        source = LiveSource(self.live, self.context, session.latents)
        if self.config.correspondence == "flow":
            return FlowSource(source, session.frames, self.grid)
        return source

    def _cached_features(self, steps: Sequence[Step]) -> tuple[CachedFeatures | None, str]:
        """The cache's features if they serve this edit; else None, and why not."""
        config, cache = self.config, self.session.cache
        for key, served in SERVED_BY_CACHED_FEATURES.items():
            if getattr(config, key) != served:
                return None, f"{key}: {getattr(config, key)}"
        fix_hint = features_remedy(config, cache.manifest)
        features = find_features(cache, fix_hint)
        if features is None:
            return None, f"{cache.folder} holds none; for some, {fix_hint}"
        skipped = config.n_timesteps - len(steps)  # SDEdit leaves the noisiest out
        needed = FeatureSettings(
            n_frames=len(self.session.frames),
            interval=config.batch_size,
            keyframe_seed=config.keyframe_seed,
            n_timesteps=config.n_timesteps,
            attention_steps=_last_true([step.attention for step in steps], skipped),
            feature_steps=_last_true([step.features for step in steps], skipped),
            dtype=self.session.models.dtype_name,
        )
        reason = features.settings.mismatch(needed)
        if not reason:
            return features, ""
        same = {key: getattr(features.settings, key) for key in CACHE_SETTINGS}
        needed = needed.model_copy(update=same)
        if features.settings.mismatch(needed):  # preprocess.py could add those
            reason += f"; for others, {fix_hint}"
        return None, f"{features.folder}: {reason}"


def _last_true(flags: Sequence[bool], offset: int) -> int:
    """Number of schedule steps up to and including the last flagged one."""
    return max((offset + i + 1 for i, flag in enumerate(flags) if flag), default=0)
