"""The source pass of edits: computed live, or once per clip for the cache.

The source pass evaluates the UNet on the inverted latents x_t under the inversion's prompt. It
gives the tokens that PnP injects, the correspondences of Eq. 5 and PnP's convolution features.
`LiveSource` runs it inside an edit; `build_features` runs it once and writes what edits read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow.cache.source_cache import FEATURES, MANIFEST, SourceCache
from tokenflow.cache.source_features import FORMAT, FeatureSettings, file_name, index_dtype
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.memory import chunked_forward
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.ops.profiling import Stopwatch
from tokenflow.storage.work_dir import resumable_dir
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
        self.denoiser, self.context = denoiser, context
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


@torch.inference_mode()
def build_features(
    cache: SourceCache,
    denoiser: Denoiser,
    timesteps: Sequence[int],
    settings: FeatureSettings,
    chunk_size: int,
    watch: Stopwatch,
    group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Runs the source pass of every sampling step and writes the cache's features.

    Of several processes, each takes every `group.size`-th step and writes its files itself.

    Args:
        denoiser: under the inversion's prompt and conditions.
        timesteps: of sampling, noisiest first; settings.n_timesteps of them.
        chunk_size: frames evaluated at once.
        watch: times the stage "features".
        group: the processes that do it together, each of which calls this.
    """
    nearest = nearest_tokens if settings.correspondence == "nn" else None
    context = TokenFlowContext(nearest=nearest)
    live = LiveSource(denoiser, context, partial(cache.latents, n_frames=settings.n_frames))
    steps = list(enumerate(zip(timesteps, feature_keyframes(settings), strict=True)))
    identity = {"format": FORMAT, "cache_sha256": cache.sha256, "settings": settings.model_dump()}
    with resumable_dir(cache.folder / FEATURES, identity, group) as work:
        before = {"steps": 0, "seconds": 0.0, "image_forwards": 0}  # of an interrupted run
        if work.checkpoint is not None:
            before = work.checkpoint.figures
            watch.add("features", before["seconds"])
        evaluated, done = denoiser.image_forwards, before["steps"]
        with ExitStack() as stack:
            stack.enter_context(tokenflow_patch(denoiser.models.unet, context))
            for model in denoiser.networks:
                stack.enter_context(chunked_forward(model, chunk_size, skip=(INJECTED_BLOCK,)))
            shown = {"unit": "step", "initial": done, "total": len(steps)}
            # Entered last: its bar ends before an error is printed.
            progress = stack.enter_context(
                tqdm(desc="features", **shown, disable=not group.is_main)
            )
            for first in range(done, len(steps), group.size):
                with watch("features"):
                    if first + group.rank < len(steps):
                        step, (t, keyframes) = steps[first + group.rank]
                        tensors = _record_step(live, t, step, keyframes, settings, chunk_size)
                        _save_step(work.folder, t, tensors)
                # Every process has written its step when all have sent their number.
                made = sum(group.all_gather(denoiser.image_forwards - evaluated))
                done = min(first + group.size, len(steps))
                figures = {
                    "seconds": watch.seconds["features"],
                    "image_forwards": before["image_forwards"] + made,
                }
                work.save("features", {}, steps=done, **figures)
                group.barrier()  # nobody writes while the main process reads the folder
                progress.update(done - progress.n)
        if group.is_main:
            figures = {key: work.checkpoint.figures[key] for key in ("seconds", "image_forwards")}
            files = work.record_files()
            # `identity` is last, so that a manifest that was cut lacks it.
            save_yaml(work.folder / MANIFEST, {"files": files, **figures, **identity})


def feature_keyframes(settings: FeatureSettings) -> Tensor:
    """The keyframes of every step that cached features are computed for, (n_timesteps, k) int64."""
    return keyframe_schedule(
        settings.n_frames, settings.keyframe_interval, settings.n_timesteps, settings.keyframe_seed
    )


def _save_step(folder: Path, t: int, tensors: dict[str, Tensor]) -> None:
    """Writes one step: what edits read, and in a file of its own what they do not."""
    unread = {name: x for name, x in tensors.items() if name.startswith("all_tokens/")}
    read = {name: x for name, x in tensors.items() if name not in unread}
    save_tensors(folder / file_name(t), read)
    if unread:
        save_tensors(folder / file_name(t, "tokens"), unread)


def _record_step(
    live: LiveSource,
    t: int,
    step: int,
    keyframes: Tensor,
    settings: FeatureSettings,
    chunk_size: int,
) -> dict[str, Tensor]:
    context, device = live.context, live.denoiser.models.device
    context.inject_features = step < settings.feature_steps
    context.keep_matched_tokens = settings.save_tokens == "all"
    tensors, matched = {}, context.nearest is not None
    if matched or step < settings.attention_steps:
        live.load_keyframes(t, keyframes)
    if step < settings.attention_steps:
        injected = [layer for layer in context.tokens if layer in ATTENTION_LAYERS]
        tensors = {f"tokens/{layer}": context.tokens[layer].cpu() for layer in injected}
    if not (matched or context.inject_features or context.keep_matched_tokens):
        return tensors
    chunks = []
    for frames in torch.arange(settings.n_frames).split(chunk_size):
        context.neighbours = neighbours(frames, keyframes).to(device)
        live.load_chunk(t, frames)
        found = {}
        for layer, match in context.matches.items():
            both = match.to("cpu", index_dtype(match.shape[2]))  # (m, 2, L)
            found[f"previous/{layer}"], found[f"next/{layer}"] = both.unbind(dim=1)
        if context.inject_features and context.features is not None:
            found["features"] = context.features.cpu()
        for layer, tokens in context.matched_tokens.items():
            found[f"all_tokens/{layer}"] = tokens.cpu()
        chunks.append(found)
    return tensors | {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}
