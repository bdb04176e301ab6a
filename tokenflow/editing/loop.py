"""What the run scripts share: the denoising loop, and writing its results.

A run script reads its configuration, has it checked (inputs.py: all that can be known before
a model is loaded), and calls `run_edit` with a function that makes an `EditPlan` of the loaded
`EditSession`: what its technique does differently. Nothing here knows which technique runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor
from tqdm import tqdm

from tokenflow.cache.source_cache import CLEAN_LATENTS, cache_key, check_file, refuse_foreign_files
from tokenflow.cache.source_features import (
    CachedFeatures,
    CachedSource,
    FeatureSettings,
    LiveSource,
    Source,
    StepNeeds,
    find_features,
)
from tokenflow.diffusion.conditions import Control, optical_flow
from tokenflow.diffusion.ddim import CLEAN, ddim_step
from tokenflow.diffusion.denoiser import Denoiser, depth_channel, encode_prompts, make_denoiser
from tokenflow.diffusion.models import Loader, StableDiffusion, compile_unet, load_stable_diffusion
from tokenflow.diffusion.vae import decode_latents
from tokenflow.editing.config import EditConfig, read_config
from tokenflow.editing.inputs import EditInputs, features_remedy
from tokenflow.ops.distributed import Team, start_team
from tokenflow.ops.profiling import (
    Stopwatch,
    device_name,
    peak_memory_bytes,
    reset_peak_memory,
    versions,
)
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.video import MAX_FPS_DENOMINATOR, clip_name, save_frames, save_video
from tokenflow.storage.work_dir import FileRecord, Workplace, locked, recover, resumable_folder
from tokenflow_utils import (
    Correspondence,
    Neighbours,
    Pass,
    TokenFlowContext,
    flow_tokens,
    in_pieces,
    keyframe_schedule,
    keyframe_windows,
    neighbours,
    released_neighbours,
    tokenflow_patch,
    windows_of,
)
from util import (
    UserError,
    load_sealed_yaml,
    save_sealed_yaml,
    save_tensors,
    save_yaml,
    setup_logging,
    slug,
)

log = logging.getLogger("tokenflow")

RUN_FILE = "run.yaml"
PLACES = ("output_path", "latents_path", "data_path")
FIND_THE_CACHE = ("n_inversion_steps", "frame_start", "frame_stride")
CHANGES_NO_RESULT = (
    "chunk_size", "source_features", "compile", "checkpoint_every", "verify", "allow_pickle",
)  # fmt: skip

# The choices of a config that the cached features are made for.
SERVED_BY_CACHED_FEATURES = {
    "source_features": "auto",
    "consistency": "tokenflow",
    "propagation": "paper",
    "correspondence": "nn",
    "keyframes": "random",
}
# What features are the same in, whatever preprocess.py is asked to add to one cache.
OF_THE_CACHE = ("n_frames", "n_timesteps", "dtype")


@dataclass(frozen=True)
class EditPlan:
    """What a technique does: where sampling starts, what is injected, what conditions it.

    Attributes:
        timesteps: of the steps to take, noisiest first: the schedule's last ones, or all.
        start: (n, 4, h, w) float32 latents at timesteps[0].
        attention_steps: in this many first steps PnP injects queries and keys.
        feature_steps: in this many first steps PnP injects convolution features.
        control: a ControlNet that conditions the edit.
    """

    timesteps: list[int]
    start: Tensor
    attention_steps: int = 0
    feature_steps: int = 0
    control: Control | None = None


@dataclass(frozen=True)
class Edited:
    """An edited clip: (n, H, W, 3) uint8 frames and their (n, 4, h, w) float32 latents."""

    frames: np.ndarray
    latents: Tensor


class EditSession:
    """The loaded models and source of one edit.

    Args:
        models: of the inputs' checkpoint, device and dtype, if they are loaded already.
        watch: what times the stages, by default one of its own.
        load: what loads the models, `load_stable_diffusion` if None.
        work: where the edit is saved every few steps, and goes on from; None: nowhere.

    Attributes:
        image_forwards: of the last edit, evaluations of the UNet on one image and branch.
        source_features: of the last edit, "cached" or "live"; of one that was interrupted, perhaps
            the one and then the other.
    """

    def __init__(
        self,
        inputs: EditInputs,
        models: StableDiffusion | None = None,
        watch: Stopwatch | None = None,
        load: Loader | None = None,
        work: Workplace | None = None,
    ) -> None:
        self.inputs, self.config, self.cache = inputs, inputs.config, inputs.cache
        self.work = work
        self.image_forwards = 0
        self.source_features = "live"
        self.watch = watch or Stopwatch(inputs.device)
        reset_peak_memory(inputs.device)
        with self.watch("load"):
            self.models = models or (load or load_stable_diffusion)(
                inputs.checkpoint, inputs.device, inputs.dtype, inputs.config.allow_pickle
            )
            if inputs.config.compile:
                compile_unet(self.models.unet)
            self.frames = self.cache.frames(inputs.n_frames)
            self.depth = self.cache.depth(inputs.n_frames)

    def ddim_start(self, t: int) -> Tensor:
        """The latents at timestep t that DDIM inversion leads to, (n, 4, h, w).

        `propagation: released` takes the noise of the noisiest latents that preprocess saved
        instead, whose timestep may lie beyond the first sampling timestep, and adds it anew at t.
        """
        if self.config.propagation == "paper":
            return self._latents(t)
        noisiest = max(self.cache.manifest.timesteps)
        alpha, sigma = self.models.schedule.level(noisiest)
        clean = self._latents(CLEAN_LATENTS)
        eps = (self._latents(noisiest) - alpha * clean) / sigma
        return self.models.schedule.add_noise(clean, eps, t)

    def gaussian_start(self, t: int) -> Tensor:
        """The clean latents with one Gaussian noise, shared by all frames, at timestep t."""
        clean = self._latents(CLEAN_LATENTS)
        generator = torch.Generator().manual_seed(self.config.seed)
        eps = torch.randn(clean[:1].shape, generator=generator)
        return self.models.schedule.add_noise(clean, eps.expand_as(clean), t)

    @torch.inference_mode()
    def edit_latents(self, plan: EditPlan) -> Tensor:
        """The denoising loop: from the plan's start to clean edited latents, (n, 4, h, w)."""
        config, models = self.config, self.models
        schedule = models.schedule
        steps = plan_steps(config, plan, len(self.frames))
        with self.watch("edit"):
            loop = _Loop(self, plan)
        predict = {
            "tokenflow": loop.predict_tokenflow,
            "extended_attention": loop.predict_extended_attention,
            "first_frame": loop.predict_first_frame,
            "none": loop.predict_per_frame,
        }[config.consistency]

        x, done, before = plan.start, 0, 0
        saved = self.work and self.work.state
        if saved:
            x, done = saved.tensors["latents"], saved.figures["steps"]
            before = saved.figures["image_forwards"]
            self.watch.add("edit", saved.figures["seconds"])
        self.image_forwards = before
        with ExitStack() as stack:
            stack.enter_context(
                tokenflow_patch(models.unet, loop.context, config.attention_backend)
            )
            source = stack.enter_context(closing(self._source(loop, steps, done)))
            for controlnet in loop.controlnets:
                stack.enter_context(in_pieces(controlnet, loop.context))
            following = [*plan.timesteps[1:], CLEAN]
            left = range(done, len(steps))
            for i in tqdm(
                left, "edit", len(steps), unit="step", initial=done, disable=not self.team.is_main
            ):
                step = steps[i]
                with self.watch("edit"):
                    loop.context.inject_attention = step.attention
                    loop.context.inject_features = step.features
                    eps = predict(source, x, step.t, step.keyframes)
                    x = ddim_step(x, eps, schedule.level(step.t), schedule.level(following[i]))
                if (i + 1) % config.checkpoint_every == 0 or following[i] == CLEAN:
                    made = sum(self.team.of_all(loop.image_forwards))
                    self.image_forwards = before + made
                    self._checkpoint(x, i + 1)
        return x

    def _checkpoint(self, x: Tensor, steps: int) -> None:
        """Saves the latents after so many steps."""
        if self.work is not None:
            self.work.save(
                "edit",
                {"latents": x},
                steps=steps,
                seconds=self.watch.seconds["edit"],
                image_forwards=self.image_forwards,
                source_features=self.source_features,
            )

    def _source(self, loop: _Loop, steps: Sequence[StepNeeds], done: int) -> Source:
        """Where the loop has the source's part of the steps that are left; the log says it too."""
        features, reason = self._cached_features(steps)
        self.source_features = "cached" if features is not None else "live"
        if self.work and self.work.state:
            before = self.work.state.figures["source_features"]
            if self.source_features not in before:
                self.source_features = f"{before}, then {self.source_features}"
        kind = f"{self.source_features} of {self.cache.sha256}"
        self.team.check_same(kind, "source cache and its features")
        if features is not None:
            log.info("source features: read from %s", features.folder)
            where, left = (loop.context, self.models.device), steps[done:]
            return CachedSource(*where, features, left, loop.chunks, self.team)
        if self.config.consistency == "tokenflow":
            log.info("source features: computed live (%s)", reason)
        return LiveSource(loop.live_denoiser(), loop.context, self._latents)

    def _cached_features(self, steps: Sequence[StepNeeds]) -> tuple[CachedFeatures | None, str]:
        """The cache's features if they serve this edit; else None, and why not."""
        config = self.config
        for key, served in SERVED_BY_CACHED_FEATURES.items():
            if getattr(config, key) != served:
                return None, f"{key}: {getattr(config, key)}"
        advice = features_remedy(config, self.cache.manifest)
        features = find_features(self.cache, advice)
        if features is None:
            return None, f"{self.cache.folder} holds none; for some, {advice}"
        skipped = config.n_timesteps - len(steps)  # SDEdit leaves the noisiest out
        needed = FeatureSettings(
            n_frames=len(self.frames),
            interval=config.batch_size,
            keyframe_seed=config.keyframe_seed,
            n_timesteps=config.n_timesteps,
            attention_steps=_last_true([step.attention for step in steps], skipped),
            feature_steps=_last_true([step.features for step in steps], skipped),
            dtype=self.models.dtype_name,
        )
        reason = features.settings.serve(needed)
        if not reason:
            return features, ""
        settled = needed.model_copy(
            update={key: getattr(features.settings, key) for key in OF_THE_CACHE}
        )
        if features.settings.serve(settled):  # others of the same cache would serve
            reason += f"; for others, {advice}"
        return None, f"{features.folder}: {reason}"

    def edit(self, plan: EditPlan) -> Edited:
        """Edits the clip."""
        latents = self.edit_latents(plan)
        with self.watch("decode"):
            frames = decode_latents(self.models, latents, self.chunk_size, self.team)
        return Edited(frames, latents)

    def save(self, edited: Edited, technique: str, work: Workplace) -> None:
        """Fills a result's folder, run.yaml last; of several processes, the main one does."""
        peak = max(self.team.of_all(peak_memory_bytes(self.inputs.device)))
        if not self.team.is_main:
            return
        fps, folder = self.cache.fps, work.folder
        if self.config.fps is not None:
            fps = Fraction(self.config.fps).limit_denominator(MAX_FPS_DENOMINATOR)
        with self.watch("write"):
            save_frames(folder / "frames", edited.frames)
            save_video(folder / "edited.mp4", edited.frames, fps)
            pairs = zip(self.frames, edited.frames, strict=True)
            both = (np.concatenate(pair, axis=1) for pair in pairs)
            save_video(folder / "side_by_side.mp4", both, fps)
            save_tensors(folder / "edited_latents.safetensors", {"latents": edited.latents})
        save_yaml(folder / "config.yaml", self.config.model_dump())
        record = self._run_record(technique, peak) | {"files": work.record_files()}
        save_sealed_yaml(folder / RUN_FILE, record)

    @property
    def team(self) -> Team:
        return self.inputs.team

    @property
    def chunk_size(self) -> int:
        return self.config.chunk_size or self.config.batch_size

    def _latents(self, name: str | int) -> Tensor:
        return self.cache.latents(name, self.inputs.n_frames)

    def _run_record(self, technique: str, peak_memory: int) -> dict:
        return {
            "technique": technique,
            "cache": str(self.cache.folder),
            "cache_sha256": self.cache.sha256,
            "checkpoint": str(self.inputs.checkpoint),
            "checkpoint_revision": self.cache.manifest.model_revision,
            "n_frames": len(self.frames),
            "device": device_name(self.inputs.device),
            "processes": self.team.size,
            "dtype": self.models.dtype_name,
            "source_features": self.source_features,
            "image_forwards": self.image_forwards,
            "seconds": self.watch.seconds,
            "peak_memory_bytes": peak_memory,
            "versions": versions(),
        }


def run_edit(
    technique: str,
    inputs: EditInputs,
    make_plan: Callable[[EditSession], EditPlan],
    overwrite: bool = False,
    load: Loader | None = None,
    wait: bool = True,
) -> Path:
    """Makes the result of one edit, or finds it made; `make_result` of what a technique plans.

    Args:
        make_plan: what the technique does, given the loaded session.
        technique, overwrite, load, wait: as of `make_result`.

    Returns:
        the result's folder.
    """
    return make_result(
        technique, inputs, lambda session: session.edit(make_plan(session)), overwrite, load, wait
    )


def make_result(
    technique: str,
    inputs: EditInputs,
    edit: Callable[[EditSession], Edited],
    overwrite: bool = False,
    load: Loader | None = None,
    wait: bool = True,
) -> Path:
    """Makes the result of one edit, goes on with it, or finds it made.

    A result is found if it was made from the same cache by the same settings and is not damaged.

    Args:
        technique: its name in the result's path.
        edit: makes the edited clip, given the loaded session.
        overwrite: make it again in any case.
        load: what loads the models, `load_stable_diffusion` if None.
        wait: for other processes that make the same result or its cache; else Busy is raised.

    Returns:
        the result's folder: edited.mp4, frames/, side_by_side.mp4, edited_latents.safetensors,
        config.yaml (every key), run.yaml (what it resolved to, and how it went).
    """
    folder, cache, team = result_folder(inputs, technique), inputs.cache, inputs.team
    with (
        locked(cache.folder, shared=True, wait=wait, team=team),
        locked(folder, wait=wait, team=team),
    ):
        with team.together():
            cache.check_unchanged()
            found = False
            if team.is_main:
                recover(folder)
                verify = inputs.config.verify
                found = not overwrite and _is_finished(folder, cache.sha256, verify)
        if team.agree(found):
            log.info(
                "%s is there already, made with these settings; --overwrite makes it anew", folder
            )
            return folder
        work_on = {**_result_settings(inputs), "cache_sha256": cache.sha256}
        with resumable_folder(folder, work_on, team) as work:
            session = EditSession(inputs, load=load, work=work)
            edited = edit(session)
            with team.together():
                cache.check_unchanged()
            session.save(edited, technique, work)
    return folder


def run_script(
    edit: Callable[..., Path],
    config: type[EditConfig],
    argv: Sequence[str] | None,
    default: str,
    about: str,
) -> Path:
    """What a run script does: reads its command line, makes the edit, prints where the result is.

    Args:
        edit: the script's.
        config, argv, default, about: as of `config.read_config`.

    Returns:
        the result's folder.
    """
    with start_team() as team:
        setup_logging(quiet=not team.is_main)
        with team.together():
            settings, overwrite = read_config(config, argv, default, about)
        folder = edit(settings, overwrite, team=team)
        if team.is_main:
            print(f"result: {folder}")
    return folder


def plan_steps(config: EditConfig, plan: EditPlan, n_frames: int) -> list[StepNeeds]:
    """The steps of a plan: timestep, keyframes, and what is injected."""
    keyframes = keyframes_of_steps(config, n_frames, len(plan.timesteps))
    return [
        StepNeeds(t, kf, attention=i < plan.attention_steps, features=i < plan.feature_steps)
        for i, (t, kf) in enumerate(zip(plan.timesteps, keyframes, strict=True))
    ]


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


def _last_true(flags: Sequence[bool], offset: int) -> int:
    """How many steps of the whole schedule come before the last one with a flag, and it."""
    return max((offset + i + 1 for i, flag in enumerate(flags) if flag), default=0)


class _Loop:
    """One run's denoisers and context; predicts the guided noise of all frames at a step.

    Each predictor takes the source, x (n, 4, h, w), the edit's latents at timestep t, and the
    step's keyframes, and returns eps, (n, 4, h, w) float32 on the CPU. Of several processes, each
    computes its share of the frames, in its own chunks, and what it finds is gathered; keyframes
    that are edited together are shared out by themselves.
    """

    def __init__(self, session: EditSession, plan: EditPlan) -> None:
        config, models = session.config, session.models
        self.session, self.config, self.device = session, config, models.device
        self.live: Denoiser | None = None
        prompts = [config.negative_prompt, config.prompt]
        if config.guidance_scale == 1.0:  # the unconditional branch would have weight 0
            prompts = [config.prompt]
        text = encode_prompts(models, prompts)
        depth = depth_channel(models, session.frames, session.depth)
        self.edit = Denoiser(models, text, depth, plan.control)
        self.context = TokenFlowContext(
            branches=len(prompts),
            propagate_source=config.propagation == "released",
            # A chunk's images; first_frame adds the first frame to each.
            images_at_once=(session.chunk_size + (config.consistency == "first_frame"))
            * len(prompts),
            keep_base=config.consistency == "tokenflow",
        )
        self.frames = torch.arange(len(session.frames))
        self.team, self.share = session.team, session.team.share(len(self.frames))
        self.chunk_size = session.chunk_size
        own = self.share.numbers  # which there may be none of
        self.chunks = own.split(session.chunk_size) if len(own) else ()
        self.flow = None
        if config.correspondence == "flow":
            self.flow = FlowField(session.frames, plan.start.shape[-2:], models)
            self.context.flow = {}

    def live_denoiser(self) -> Denoiser:
        """The source's, under the inversion's prompt and conditions; kept in `live`."""
        session, manifest = self.session, self.session.cache.manifest
        self.live = make_denoiser(
            session.models,
            session.frames,
            manifest.inversion_prompt,
            manifest.control,
            session.depth,
        )
        return self.live

    @property
    def controlnets(self) -> set[ControlNetModel]:
        """The ControlNets at work."""
        denoisers = [self.edit, self.live] if self.live else [self.edit]
        return {denoiser.control.controlnet for denoiser in denoisers if denoiser.control}

    @property
    def image_forwards(self) -> int:
        """Evaluations of the UNet on one image and branch so far."""
        return self.edit.image_forwards + (self.live.image_forwards if self.live else 0)

    def predict_tokenflow(self, source: Source, x: Tensor, t: int, keyframes: Tensor) -> Tensor:
        """Keyframes are edited together; every frame is made from their output tokens."""
        own = self._own_keyframes(keyframes)
        source.tokens(t, own)
        self._edit(Pass.EXTENDED, x, t, own)
        eps = [x[:0]]
        for chunk in self.chunks:
            self._set_neighbours(chunk, keyframes)
            source.matches(t, chunk)
            eps.append(self._edit(Pass.PROPAGATE, x, t, chunk))
        return self.share.gather(torch.cat(eps))

    def predict_extended_attention(self, source: Source, x: Tensor, t: int, _: Tensor) -> Tensor:
        """Every frame is a keyframe, and nothing is propagated (Table 1, "w/o TokenFlow")."""
        own = self._own_keyframes(self.frames)
        if self._injecting:
            source.tokens(t, own)
        return self.context.keyframe_share.gather(self._edit(Pass.EXTENDED, x, t, own))

    def predict_per_frame(self, source: Source, x: Tensor, t: int, _: Tensor) -> Tensor:
        """The base technique alone, each frame by itself."""
        eps = [x[:0]]
        for chunk in self.chunks:
            if self._injecting:
                source.tokens(t, chunk)
            eps.append(self._edit(Pass.PER_FRAME, x, t, chunk))
        return self.share.gather(torch.cat(eps))

    def predict_first_frame(self, source: Source, x: Tensor, t: int, _: Tensor) -> Tensor:
        """Every frame attends to the first alone (Text2Video-Zero, Khachatryan et al. 2023)."""
        eps = [x[:0]]
        for chunk in self.chunks:
            frames = torch.cat([self.frames[:1], chunk])
            if self._injecting:
                source.tokens(t, frames)
            eps.append(self._edit(Pass.FIRST_FRAME, x, t, frames)[1:])
        return self.share.gather(torch.cat(eps))

    @property
    def _injecting(self) -> bool:
        return self.context.inject_attention or self.context.inject_features

    def _own_keyframes(self, keyframes: Tensor) -> Tensor:
        """Shares out the keyframes that are edited together; returns this process's."""
        share = self.team.share_jointly(len(keyframes))
        windows = keyframe_windows(len(keyframes), self.config.max_keyframes, self.chunk_size)
        windows = windows_of(windows, share.own)
        self.context.windows = [window.to(self.device) for window in windows]
        self.context.keyframe_share = share
        return share.take(keyframes)

    def _edit(self, mode: Pass, x: Tensor, t: int, frames: Tensor) -> Tensor:
        self.context.mode = mode
        eps = self.edit(x[frames], t, frames)  # (B, m, 4, h, w)
        if len(eps) == 2:  # classifier-free guidance
            uncond, cond = eps
            eps = (uncond + self.config.guidance_scale * (cond - uncond))[None]
        return eps[0].cpu()

    def _set_neighbours(self, chunk: Tensor, keyframes: Tensor) -> None:
        if self.config.propagation == "released":
            near = released_neighbours(chunk, self.config.batch_size)
        else:
            near = neighbours(chunk, keyframes, self.config.blend)
        self.context.neighbours = near.to(self.device)
        if self.flow is not None:
            self.context.flow = self.flow.matches(chunk, keyframes, near)


class FlowField:
    """Correspondences by optical flow of the source frames, for each size of token grid.

    Args:
        frames: (n, H, W, 3) uint8 source frames.
        grid: (h, w) of the latents.
        models: says how often its UNet halves the grid.
    """

    def __init__(self, frames: np.ndarray, grid: Sequence[int], models: StableDiffusion) -> None:
        self.frames, self.device = frames, models.device
        self.grids = [tuple(grid)]
        for _ in models.unet.config.block_out_channels[1:]:
            h, w = self.grids[-1]
            self.grids.append(((h + 1) // 2, (w + 1) // 2))
        self._tokens: dict[tuple[int, int], dict[int, Tensor]] = {}

    def matches(self, chunk: Tensor, keyframes: Tensor, near: Neighbours) -> dict:
        """The correspondences of a chunk's frames, by a layer's number of tokens."""
        previous = [self._pair(*pair) for pair in zip(chunk, keyframes[near.previous], strict=True)]
        following = [self._pair(*pair) for pair in zip(chunk, keyframes[near.next], strict=True)]
        return {
            h * w: Correspondence(
                torch.stack([tokens[h * w] for tokens in previous]).to(self.device),
                torch.stack([tokens[h * w] for tokens in following]).to(self.device),
            )
            for h, w in self.grids
        }

    def _pair(self, frame: Tensor, keyframe: Tensor) -> dict[int, Tensor]:
        pair = int(frame), int(keyframe)
        if pair not in self._tokens:
            flow = optical_flow(self.frames[pair[0]], self.frames[pair[1]])[None]
            self._tokens[pair] = {h * w: flow_tokens(flow, (h, w))[0] for h, w in self.grids}
        return self._tokens[pair]


def result_folder(inputs: EditInputs, technique: str) -> Path:
    """<output_path>/<technique>/<clip>/<prompt slug>-<8 hex of what the result depends on>."""
    config = inputs.config
    settings = json.dumps(_result_settings(inputs), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    clip = clip_name(config.data_path)
    return Path(config.output_path) / technique / clip / f"{slug(config.prompt)}-{digest}"


def _result_settings(inputs: EditInputs) -> dict[str, object]:
    """What a result depends on; of the cache, what that was made from."""
    own = {"dtype": str(inputs.dtype), "device": inputs.device.type}
    settings = inputs.config.model_dump() | own | {"cache": cache_key(inputs.cache.manifest)}
    left_out = (*PLACES, *FIND_THE_CACHE, *CHANGES_NO_RESULT)
    return {key: value for key, value in settings.items() if key not in left_out}


class _Finished(Model, extra="ignore"):
    """What run.yaml says of a finished result's files and the cache it was made from."""

    cache_sha256: str
    files: dict[str, FileRecord]


def _is_finished(folder: Path, cache_sha256: str, verify: bool) -> bool:
    """Whether a result is there, whole, and made from this very cache; the log says why not."""
    if not (folder / RUN_FILE).is_file():
        return False
    try:
        run = parse(_Finished, load_sealed_yaml(folder / RUN_FILE), str(folder / RUN_FILE))
        for name in run.files:
            check_file(folder, name, run.files, "the edit is made again", read=verify)
    except UserError as error:
        log.warning("%s", error)
        return False
    if verify:
        refuse_foreign_files(folder, {RUN_FILE: {}, **run.files})
    if run.cache_sha256 != cache_sha256:
        log.info("%s was made from another cache; the edit is made again", folder)
        return False
    return True
