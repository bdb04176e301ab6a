"""The source pass of edits: computed live, or once per clip for the cache.

The source pass evaluates the UNet on the inverted latents x_t under the inversion's prompt. It
gives the tokens that PnP injects, the correspondences of Eq. 5 and PnP's convolution features.
`LiveSource` runs it inside an edit, `recorded_features` also writes what it gave for later edits;
`build_features` runs it without an edit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor

from tokenflow.cache.source_cache import FEATURES, MANIFEST, SourceCache
from tokenflow.cache.source_features import FORMAT, FeatureSettings, file_name, index_dtype
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.memory import chunked_forward
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.ops.profiling import Stopwatch
from tokenflow.ops.progress import Progress
from tokenflow.storage.work_dir import WorkDir, begun_dirs, locked, recover, resumable_dir
from tokenflow.storage.yaml_files import save_yaml
from tokenflow_utils import (
    ATTENTION_LAYERS,
    FEATURE_LAYER,
    Pass,
    TokenFlowContext,
    keyframe_schedule,
    neighbours,
    tokenflow_patch,
)
from util import save_tensors

log = logging.getLogger("tokenflow")

# The residual block whose features PnP injects sees the whole batch, as its hook needs.
INJECTED_BLOCK = FEATURE_LAYER.rpartition(".")[0]


class LiveSource:
    """A `tokenflow_utils.Source` that runs the patched UNet.

    Args:
        denoiser: under the inversion's prompt and conditions.
        context: of the patch.
        latents: the source's (n, 4, h, w) latents at a timestep; called once a timestep.
    """

    def __init__(
        self, denoiser: Denoiser, context: TokenFlowContext, latents: Callable[[int], Tensor]
    ) -> None:
        self.denoiser, self.context, self.latents = denoiser, context, latents
        self._latents = lru_cache(maxsize=1)(latents)

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` and `features` of frames (m,); of several processes, of their shard."""
        self._run(Pass.SOURCE, t, self.context.shard(frames))

    def load_chunk(self, t: int, frames: Tensor) -> None:
        """Fills `matches` and `features` of frames (m,)."""
        self._run(Pass.MATCH, t, frames)

    def _run(self, mode: Pass, t: int, frames: Tensor) -> None:
        self.context.mode = mode
        self.denoiser(self._latents(t)[frames], t, frames)


class FeatureRecorder(LiveSource):
    """A `LiveSource` that notes a step's features as it fills them in, and writes them.

    Args:
        settings: of the features.
        timesteps: of sampling, noisiest first; settings.n_timesteps of them.
        chunk_size: frames evaluated at once by `take_step`.
        work: where features are written.
    """

    _counted = 0  # image-forwards of this process that the checkpoint has

    def __init__(
        self,
        denoiser: Denoiser,
        context: TokenFlowContext,
        latents: Callable[[int], Tensor],
        settings: FeatureSettings,
        timesteps: Sequence[int],
        chunk_size: int,
        work: WorkDir,
    ) -> None:
        super().__init__(denoiser, context, latents)
        self.settings, self.chunk_size, self.work = settings, chunk_size, work
        self.steps = list(zip(timesteps, feature_keyframes(settings), strict=True))
        self._tokens: dict[str, Tensor] = {}
        self._chunks: list[dict[str, Tensor]] = []

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        super().load_keyframes(t, frames)
        if self.context.inject_attention:
            found = self.context.tokens.items()
            self._tokens = {f"tokens/{k}": x.cpu() for k, x in found if k in ATTENTION_LAYERS}

    def load_chunk(self, t: int, frames: Tensor) -> None:
        super().load_chunk(t, frames)
        context, found = self.context, {}
        for layer, match in context.matches.items() if context.nearest else ():
            both = match.to("cpu", index_dtype(match.shape[2]))  # (m, 2, L)
            found[f"previous/{layer}"], found[f"next/{layer}"] = both.unbind(dim=1)
        if context.inject_features and context.features is not None:
            found["features"] = context.features.cpu()
        for layer, tokens in context.matched_tokens.items():
            found[f"all_tokens/{layer}"] = tokens.cpu()
        self._chunks.append(found)

    def recorded(self) -> dict[str, Tensor]:
        """The features noted since the last call, by their names in a step's file."""
        tensors, chunks = self._tokens, self._chunks
        self._tokens, self._chunks = {}, []
        names = chunks[0] if chunks else ()
        return tensors | {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}

    def take_step(self, step: int) -> dict[str, Tensor]:
        """Runs the passes of a step, without an edit; returns its features."""
        context, settings, (t, keyframes) = self.context, self.settings, self.steps[step]
        context.inject_attention = step < settings.attention_steps
        context.inject_features = step < settings.feature_steps
        context.keep_matched_tokens = settings.save_tokens == "all"
        matched = context.nearest is not None
        if matched or context.inject_attention:
            self.load_keyframes(t, keyframes)
        if matched or context.inject_features or context.keep_matched_tokens:
            for frames in torch.arange(settings.n_frames).split(self.chunk_size):
                near = neighbours(frames, keyframes)
                context.neighbours = near.to(self.denoiser.models.device)
                self.load_chunk(t, frames)
        return self.recorded()

    def save_step(self, step: int) -> None:
        """Writes the features of the step that the edit has just taken.

        Those of earlier steps that are missing are computed: an edit took them that recorded none.
        """
        tensors = self.recorded()
        self.save_missing(step)
        if self.done == step:
            self._save(step, tensors)
        self._counted = self.denoiser.image_forwards  # also of a step that is written already

    @property
    def done(self) -> int:
        """How many steps, from the first, are written."""
        return 0 if self.work.checkpoint is None else self.work.checkpoint.figures["steps"]

    def save_missing(self, step: int) -> None:
        """Computes and writes the features of the steps before `step` that are not written."""
        for missing in range(self.done, step):
            self._save(missing, self.take_step(missing))

    def _save(self, step: int, tensors: dict[str, Tensor]) -> None:
        _write_step(self.work, self.steps[step][0], tensors)
        before = self.work.checkpoint.figures["image_forwards"] if self.done else 0
        made = self.denoiser.image_forwards - self._counted
        self._counted = self.denoiser.image_forwards
        self.work.save("features", {}, steps=step + 1, seconds=0.0, image_forwards=before + made)


def recover_features(cache: SourceCache) -> None:
    """Ends what an edit that saves features began, if it was killed as they came into place."""
    folder = cache.folder
    if not (begun_dirs(folder, FEATURES) or begun_dirs(folder.parent, folder.name)):
        return  # nothing is written: the disk may be read-only
    with locked(folder, wait=False) as held:
        if held:
            recover(folder / FEATURES)


@contextmanager
def recorded_features(
    cache: SourceCache,
    live: LiveSource,
    settings: FeatureSettings,
    timesteps: Sequence[int],
    chunk_size: int,
) -> Iterator[LiveSource]:
    """Yields a source of an edit that takes all steps; then the cache has their features.

    If the block fails, the next call with the same settings resumes. Features of other settings are
    replaced. If another process works on the cache, nothing is recorded: the source is `live`.

    Args:
        settings, timesteps, chunk_size: as in `FeatureRecorder`, which is yielded.
    """
    with locked(cache.folder, wait=False) as held:
        if not held:
            log.info("%s: another process works on it; no features are saved", cache.folder)
            yield live
            return
        identity = _identity(cache, settings)
        with resumable_dir(cache.folder / FEATURES, identity) as work:
            recorder = FeatureRecorder(
                live.denoiser, live.context, live.latents, settings, timesteps, chunk_size, work
            )
            yield recorder
            recorder.save_missing(len(recorder.steps))
            _write_manifest(work, identity)


@torch.inference_mode()
def build_features(
    cache: SourceCache,
    denoiser: Denoiser,
    timesteps: Sequence[int],
    settings: FeatureSettings,
    chunk_size: int,
    watch: Stopwatch,
    group: ProcessGroup = SINGLE_PROCESS,
    progress: Progress | None = None,
) -> None:
    """Runs the source pass of every sampling step and writes the cache's features.

    Of several processes, each takes every `group.size`-th step and writes its files itself.

    Args:
        denoiser: under the inversion's prompt and conditions.
        timesteps: of sampling, noisiest first; settings.n_timesteps of them.
        chunk_size: frames evaluated at once.
        watch: times the stage "features".
        group: the processes that do it together, each of which calls this.
        progress: of the run that this is a stage of, in evaluations of a frame.
    """
    progress = progress or Progress(shown=False)
    nearest = nearest_tokens if settings.correspondence == "nn" else None
    context = TokenFlowContext(nearest=nearest)
    latents = partial(cache.latents, n_frames=settings.n_frames)
    identity = _identity(cache, settings)
    with resumable_dir(cache.folder / FEATURES, identity, group) as work:
        source = FeatureRecorder(denoiser, context, latents, settings, timesteps, chunk_size, work)
        steps = source.steps
        before = {"steps": 0, "seconds": 0.0, "image_forwards": 0}  # of an interrupted run
        if work.checkpoint is not None:
            before = work.checkpoint.figures
            watch.add("features", before["seconds"])
        evaluated, done = denoiser.image_forwards, before["steps"]
        with patched(denoiser, context, chunk_size):
            left, cost = range(done, len(steps), group.size), evaluations_of_a_step(settings)
            for first in progress.over(left, "features", cost, done / group.size):
                with watch("features"):
                    if first + group.rank < len(steps):
                        step = first + group.rank
                        _write_step(work, steps[step][0], source.take_step(step))
                # Every process has written its step when all have sent their number.
                made = sum(group.all_gather(denoiser.image_forwards - evaluated))
                done = min(first + group.size, len(steps))
                figures = {
                    "seconds": watch.seconds["features"],
                    "image_forwards": before["image_forwards"] + made,
                }
                work.save("features", {}, steps=done, **figures)
                group.barrier()  # nobody writes while the main process reads the folder
        if group.is_main:
            _write_manifest(work, identity)


@contextmanager
def patched(denoiser: Denoiser, context: TokenFlowContext, chunk_size: int) -> Iterator[None]:
    """Patches the UNet for a source pass without an edit, of `chunk_size` frames at once."""
    with ExitStack() as stack:
        stack.enter_context(tokenflow_patch(denoiser.models.unet, context))
        for model in denoiser.networks:
            stack.enter_context(chunked_forward(model, chunk_size, skip=(INJECTED_BLOCK,)))
        yield


def evaluations_of_a_step(settings: FeatureSettings) -> int:
    """Frames that a step of the source pass evaluates: all, and the keyframes again."""
    return settings.n_frames - (-settings.n_frames // settings.keyframe_interval)


def feature_keyframes(settings: FeatureSettings) -> Tensor:
    """The keyframes of every step that cached features are computed for, (n_timesteps, k) int64."""
    return keyframe_schedule(
        settings.n_frames, settings.keyframe_interval, settings.n_timesteps, settings.keyframe_seed
    )


def _identity(cache: SourceCache, settings: FeatureSettings) -> dict[str, object]:
    """All that features depend on."""
    return {"format": FORMAT, "cache_sha256": cache.sha256, "settings": settings.model_dump()}


def _write_step(work: WorkDir, t: int, tensors: dict[str, Tensor]) -> None:
    """Writes one step: what edits read, and in a file of its own what they do not."""
    unread = {name: x for name, x in tensors.items() if name.startswith("all_tokens/")}
    read = {name: x for name, x in tensors.items() if name not in unread}
    save_tensors(work.folder / file_name(t), read)
    if unread:
        save_tensors(work.folder / file_name(t, "tokens"), unread)


def _write_manifest(work: WorkDir, identity: dict[str, object]) -> None:
    figures = {key: work.checkpoint.figures[key] for key in ("seconds", "image_forwards")}
    files = work.record_files()
    # `identity` is last, so that a manifest that was cut lacks it.
    save_yaml(work.folder / MANIFEST, {"files": files, **figures, **identity})
