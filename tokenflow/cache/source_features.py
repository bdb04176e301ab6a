"""What an edit needs from the source at each sampling step: computed, or read from the cache.

No prompt has a part in it: the tokens of the keyframes that PnP injects, the correspondences of
every frame, PnP's convolution features. `LiveSource` computes it with the source pass, a third of
an edit's work. `write_features` runs that pass once per clip for `CachedSource` to read, which is
possible since the keyframes of all steps are a pure function of a seed.

    <cache>/features/
        manifest.yaml               what they depend on, and the files; written last
        step_<t>.safetensors        of a sampling timestep; c and L differ from layer to layer
            tokens/<layer>          (k, L, c) of the keyframes; PnP's layers, first attention_steps
            previous/<layer>, next/<layer>      (n, L) int16 or int32
            features                (n, C, h, w); first feature_steps
        tokens_<t>.safetensors      with save_tokens: all; no edit reads them
            all_tokens/<layer>      (n, L, c) of every layer

The files are memory-mapped, and a thread reads them ahead of the steps that need them. Each file's
checksum is compared before it is used. The folder is made as the cache is: beside, with a manifest
that has its own checksum, gone on with after an interruption.
"""

from __future__ import annotations

import shlex
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from tokenflow.cache.source_cache import (
    FEATURES,
    MANIFEST,
    SourceCache,
    check_file,
    refuse_foreign_files,
)
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.ops.distributed import ALONE, Team
from tokenflow.ops.profiling import Stopwatch
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.work_dir import FileRecord, resumable_folder
from tokenflow_utils import (
    ATTENTION_LAYERS,
    FEATURE_LAYER,
    Correspondence,
    Pass,
    TokenFlowContext,
    in_pieces,
    keyframe_schedule,
    neighbours,
    self_attention_layers,
    tokenflow_patch,
)
from util import UserError, load_sealed_yaml, save_sealed_yaml, save_tensors

FORMAT = 2
READER = "read-ahead"  # the thread's name
_READ_AHEAD = 2  # chunks that wait, read, for the edit to come to them

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------
# The source pass


class Source(Protocol):
    """Where the sampling loop has the source's part of a step from; it fills the loop's context."""

    def tokens(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` and, if features are injected, `features` of these frames."""

    def matches(self, t: int, frames: Tensor) -> None:
        """Fills `matches` of these frames, next to the keyframes that `tokens` was called for.

        `context.neighbours` are those of the frames. Fills `features` as `tokens` does.
        """

    def close(self) -> None:
        """Ends whatever runs in the background."""


class LiveSource:
    """Computes the source's part with the patched UNet.

    Args:
        denoiser: under the inversion's prompt and conditions.
        context: of the patch.
        latents: the source's (n, 4, h, w) latents at a timestep.
    """

    def __init__(
        self, denoiser: Denoiser, context: TokenFlowContext, latents: Callable[[int], Tensor]
    ) -> None:
        self.denoiser, self.context, self.latents = denoiser, context, latents

    def tokens(self, t: int, frames: Tensor) -> None:
        self._run(Pass.SOURCE, t, frames)

    def matches(self, t: int, frames: Tensor) -> None:
        self._run(Pass.MATCH, t, frames)

    def close(self) -> None:
        """Nothing runs in the background."""

    def _run(self, mode: Pass, t: int, frames: Tensor) -> None:
        context = self.context
        injects = context.inject_attention or context.inject_features
        if context.flow is not None and not injects and not context.propagate_source:
            return  # the flow of the frames says it all
        context.mode = mode
        self.denoiser(self.latents(t)[frames], t, frames)


# ---------------------------------------------------------------------------------------------
# What cached features depend on


class FeatureSettings(Model):
    """What cached features depend on beside the cache that they lie in.

    Attributes:
        n_frames: of the clip; with the next three, it says the keyframes of every step.
        interval: frames per keyframe (`batch_size` of an edit).
        keyframe_seed, n_timesteps: as in an edit.
        attention_steps, feature_steps: in this many first steps there are tokens and features.
        dtype: of the pass, and of tokens and features: float32, float16 or bfloat16.
        save_tokens: "keyframes", or "all": those of every frame, layer and step too.
    """

    n_frames: int
    interval: int
    keyframe_seed: int
    n_timesteps: int
    attention_steps: int
    feature_steps: int
    dtype: str
    save_tokens: Literal["keyframes", "all"] = "keyframes"

    def keyframes(self) -> Tensor:
        """(n_timesteps, k) int64."""
        return keyframe_schedule(self.n_frames, self.interval, self.n_timesteps, self.keyframe_seed)

    @property
    def n_keyframes(self) -> int:
        return -(-self.n_frames // self.interval)

    def serve(self, needed: FeatureSettings) -> str:
        """Why features of these settings cannot serve an edit that needs others; "" if they can."""
        same = ("n_frames", "interval", "keyframe_seed", "n_timesteps", "dtype")
        differing = [name for name in same if getattr(self, name) != getattr(needed, name)]
        for name in ("attention_steps", "feature_steps"):
            if getattr(self, name) < getattr(needed, name):
                differing.append(name)
        if needed.save_tokens == "all" != self.save_tokens:
            differing.append("save_tokens")
        return "; ".join(
            f"{name} is {getattr(self, name)} there, {getattr(needed, name)} here"
            for name in differing
        )


class FeaturesManifest(Model):
    """What a cache's features depend on, the figures of their making, and their files."""

    format: int
    cache_sha256: str
    settings: FeatureSettings
    seconds: float
    image_forwards: int
    files: dict[str, FileRecord]


def feature_bytes(
    unet: UNet2DConditionModel, grid: tuple[int, int], settings: FeatureSettings
) -> int:
    """The size of the tensors that `write_features` writes.

    Args:
        unet: its configuration counts; it may be on the meta device.
        grid: (h, w) of the latents.
    """
    sizes = layer_sizes(unet, grid)
    width = torch.finfo(getattr(torch, settings.dtype)).bits // 8
    n, steps = settings.n_frames, settings.n_timesteps
    injected = sum(h * w * c for layer, (h, w, c) in sizes.items() if layer in ATTENTION_LAYERS)
    total = settings.attention_steps * settings.n_keyframes * injected * width
    total += steps * n * sum(2 * h * w * _index_dtype(h * w).itemsize for h, w, _ in sizes.values())
    total += settings.feature_steps * n * _feature_size(unet, grid) * width
    if settings.save_tokens == "all":
        total += steps * n * sum(h * w * c for h, w, c in sizes.values()) * width
    return total


def layer_sizes(
    unet: UNet2DConditionModel, grid: tuple[int, int]
) -> dict[str, tuple[int, int, int]]:
    """(h, w, c) of the tokens of each self-attention layer; L = h * w."""
    levels = len(unet.config.block_out_channels)
    return {
        layer: (
            *_grid_of_block(layer, grid, levels),
            unet.get_submodule(layer.removesuffix(".processor")).to_q.in_features,
        )
        for layer in self_attention_layers(unet)
    }


def _feature_size(unet: UNet2DConditionModel, grid: tuple[int, int]) -> int:
    layer = dict(unet.named_modules()).get(FEATURE_LAYER)
    if layer is None:
        return 0
    h, w = _grid_of_block(FEATURE_LAYER, grid, len(unet.config.block_out_channels))
    return layer.out_channels * h * w


def _grid_of_block(name: str, grid: tuple[int, int], levels: int) -> tuple[int, int]:
    """The latent grid at a module of the UNet; each level halves the one above, rounding up."""
    block, index = name.split(".")[:2]
    level = levels - 1  # mid_block
    if block == "down_blocks":
        level = int(index)
    elif block == "up_blocks":
        level = levels - 1 - int(index)
    h, w = grid
    for _ in range(level):
        h, w = (h + 1) // 2, (w + 1) // 2
    return h, w


def _index_dtype(n_tokens: int) -> torch.dtype:
    return torch.int16 if n_tokens <= torch.iinfo(torch.int16).max else torch.int32


def check_room(folder: Path, needed: int, option: str) -> None:
    """Refuses work whose result the disk has no room for.

    Args:
        folder: where it goes; need not exist yet.
        needed: bytes.
        option: what would make it smaller.

    Raises:
        UserError: saying what is needed and what is free.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{folder}: {size_text(needed)} are needed, {size_text(free)} are free; {option}"
        )


def size_text(n_bytes: float) -> str:
    """A number of bytes for people: 12 kB, 3.4 MB, 2.9 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 or unit == "bytes" else f"{n_bytes:.1f} {unit}"


# ---------------------------------------------------------------------------------------------
# Writing (preprocess.py)


@torch.inference_mode()
def write_features(
    cache: SourceCache,
    denoiser: Denoiser,
    timesteps: Sequence[int],
    settings: FeatureSettings,
    chunk_size: int,
    watch: Stopwatch,
    team: Team = ALONE,
) -> None:
    """Runs the source pass of every sampling step and writes the cache's features.

    Of several processes, each takes every `team.size`-th step and writes its files itself.

    Args:
        denoiser: under the inversion's prompt and conditions.
        timesteps: of sampling, noisiest first; settings.n_timesteps of them.
        chunk_size: frames evaluated at once.
        watch: times the stage "features".
        team: the processes that do it together, each of which calls this.
    """
    context = TokenFlowContext(images_at_once=chunk_size)
    latents = partial(cache.latents, n_frames=settings.n_frames)
    live = LiveSource(denoiser, context, latents)
    steps = list(zip(timesteps, settings.keyframes(), strict=True))
    unet = denoiser.models.unet
    identity = {"format": FORMAT, "cache_sha256": cache.sha256, "settings": settings.model_dump()}
    with resumable_folder(cache.folder / FEATURES, identity, team) as work:
        before = {"steps": 0, "seconds": 0.0, "image_forwards": 0}  # of an interrupted run
        if work.state is not None:
            before = work.state.figures
            watch.add("features", before["seconds"])
        evaluated, done = denoiser.image_forwards, before["steps"]
        with ExitStack() as stack:
            stack.enter_context(tokenflow_patch(unet, context))
            if denoiser.control is not None:
                stack.enter_context(in_pieces(denoiser.control.controlnet, context))
            left = range(done, len(steps), team.size)
            shown = {"unit": "step", "initial": done, "total": len(steps)}
            # Entered last: its bar ends before an error is told.
            progress = stack.enter_context(tqdm(desc="features", **shown, disable=not team.is_main))
            for first in left:
                step = first + team.rank
                with watch("features"):
                    if step < len(steps):
                        t, keyframes = steps[step]
                        tensors = _record_step(live, t, step, keyframes, settings, chunk_size)
                        _save_step(work.folder, t, tensors)
                # Every process has written its step when all have told their number.
                made = sum(team.of_all(denoiser.image_forwards - evaluated))
                done = min(first + team.size, len(steps))
                work.save(
                    "features",
                    {},
                    steps=done,
                    seconds=watch.seconds["features"],
                    image_forwards=before["image_forwards"] + made,
                )
                team.wait()  # nobody writes while the main process looks at what is there
                progress.update(done - progress.n)
        if team.is_main:
            figures = {key: work.state.figures[key] for key in ("seconds", "image_forwards")}
            files = work.record_files()
            save_sealed_yaml(work.folder / MANIFEST, {**identity, **figures, "files": files})


def _save_step(folder: Path, t: int, tensors: dict[str, Tensor]) -> None:
    """Writes what `_record_step` found: what edits read, and apart from it what they do not."""
    every = {name: tensors.pop(name) for name in list(tensors) if _is_of_all(name)}
    save_tensors(folder / _file_name(t), tensors)
    if every:
        save_tensors(folder / _file_name(t, "tokens"), every)


def _record_step(
    live: LiveSource,
    t: int,
    step: int,
    keyframes: Tensor,
    settings: FeatureSettings,
    chunk_size: int,
) -> dict[str, Tensor]:
    """All that an edit reads for one step, on the CPU."""
    context, device = live.context, live.denoiser.models.device
    context.inject_features = step < settings.feature_steps
    context.keep_matched_tokens = settings.save_tokens == "all"
    live.tokens(t, keyframes)
    tensors = {}
    if step < settings.attention_steps:
        injected = [layer for layer in context.tokens if layer in ATTENTION_LAYERS]
        tensors = {f"tokens/{layer}": context.tokens[layer].cpu() for layer in injected}
    chunks = []
    for frames in torch.arange(settings.n_frames).split(chunk_size):
        context.neighbours = neighbours(frames, keyframes).to(device)
        live.matches(t, frames)
        found = {}
        for layer, match in context.matches.items():
            dtype = _index_dtype(match.next.shape[1])
            found[f"previous/{layer}"] = match.previous.to("cpu", dtype)
            found[f"next/{layer}"] = match.next.to("cpu", dtype)
        if context.inject_features and context.features is not None:
            found["features"] = context.features.cpu()
        for layer, tokens in context.matched_tokens.items():
            found[f"all_tokens/{layer}"] = tokens.cpu()
        chunks.append(found)
    return tensors | {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}


def _file_name(t: int, kind: str = "step") -> str:
    return f"{kind}_{t}.safetensors"


def _is_of_all(name: str) -> bool:
    return name.startswith("all_tokens/")


# ---------------------------------------------------------------------------------------------
# Reading (edits)


@dataclass(frozen=True)
class CachedFeatures:
    """The features in a cache; made by `find_features`."""

    folder: Path
    settings: FeatureSettings
    files: dict[str, dict]
    advice: str

    def of_keyframes(
        self, t: int, keyframes: Tensor, attention: bool, features: bool
    ) -> dict[str, Tensor]:
        """What is injected at timestep t.

        Args:
            keyframes: whose "features" are read; "tokens/<layer>" are those of all keyframes.
        """
        with self._open(t) as file:
            names = [name for name in file.keys() if name.startswith("tokens/") and attention]  # noqa: SIM118
            found = {name: file.get_tensor(name) for name in names}
            if features:
                rows = file.get_slice("features")
                found["features"] = torch.cat([rows[i : i + 1] for i in keyframes.tolist()])
        return found

    def of_chunk(self, t: int, frames: Tensor, features: bool) -> dict[str, Tensor]:
        """Of consecutive frames at timestep t: "previous/<layer>", "next/<layer>", "features"."""
        start, end = int(frames[0]), int(frames[-1]) + 1
        with self._open(t) as file:
            names = [name for name in file.keys() if name.startswith(("previous/", "next/"))]  # noqa: SIM118
            names += ["features"] if features else []
            return {name: file.get_slice(name)[start:end] for name in names}

    def tokens(self, t: int, layer: str) -> Tensor:
        """(n, L, c) tokens of every frame, where they were saved (save_tokens: all).

        Raises:
            UserError: if the file is missing or damaged.
        """
        self.check(t, "tokens")
        with self._open(t, "tokens") as file:
            return file.get_tensor(f"all_tokens/{layer}")

    def check(self, t: int, kind: str = "step") -> None:
        """Compares a timestep's file with its checksum.

        Raises:
            UserError: if it is missing or damaged.
        """
        check_file(self.folder, _file_name(t, kind), self.files, self.advice)

    def verify(self) -> None:
        """Compares every file with its checksum, and refuses files that the manifest lacks."""
        for name in self.files:
            check_file(self.folder, name, self.files, self.advice)
        refuse_foreign_files(self.folder, self.files)

    def _open(self, t: int, kind: str = "step") -> safe_open:
        path = self.folder / _file_name(t, kind)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {self.advice}") from error


def find_features(
    cache: SourceCache, remake: str = "run preprocess.py again"
) -> CachedFeatures | None:
    """The finished features of a cache, if it has any: all files there, of the right size.

    Args:
        remake: what makes them again, for errors.

    Raises:
        UserError: if a file is missing or damaged, or they belong to another cache.
    """
    folder = cache.folder / FEATURES
    if not folder.exists():
        return None
    advice = (
        f"run: rm -r {shlex.quote(str(folder))} and then {remake.removeprefix('run: ')}; "
        "or edit without: --set source_features=live"
    )
    path = folder / MANIFEST
    try:
        data = load_sealed_yaml(path)
        if data.get("format") != FORMAT:
            raise UserError(f"{path}: not a manifest of format {FORMAT}")
        manifest = parse(FeaturesManifest, data, str(path))
    except UserError as error:
        raise type(error)(f"{error}; {advice}") from error
    if manifest.cache_sha256 != cache.sha256:
        raise UserError(f"{folder}: belongs to another cache; {advice}")
    for name in manifest.files:
        check_file(folder, name, manifest.files, advice, read=False)
    return CachedFeatures(folder, manifest.settings, manifest.files, advice)


@dataclass(frozen=True)
class StepNeeds:
    """What a sampling step needs of the source."""

    t: int
    keyframes: Tensor
    attention: bool
    features: bool


class CachedSource:
    """Reads the source's part of the steps from the cache, ahead of the loop.

    Args:
        context: of the patch.
        device: the UNet's.
        features: that serve the edit (`FeatureSettings.serve`).
        steps: in the order in which the loop will take them.
        chunks: of each step, in order, consecutive frames.
        team: with whom the keyframes are shared out: tokens are those of all of them, features
            of this process's.
    """

    def __init__(
        self,
        context: TokenFlowContext,
        device: torch.device,
        features: CachedFeatures,
        steps: Sequence[StepNeeds],
        chunks: Sequence[Tensor],
        team: Team = ALONE,
    ) -> None:
        self.context, self.device = context, device
        self._items = read_ahead(_loads(features, steps, chunks, device, team), _READ_AHEAD)

    def tokens(self, t: int, frames: Tensor) -> None:
        found = self._next()
        self.context.tokens = {
            name.removeprefix("tokens/"): x for name, x in found.items() if name != "features"
        }
        self.context.features = found.get("features")

    def matches(self, t: int, frames: Tensor) -> None:
        found = self._next()
        layers = [name.removeprefix("next/") for name in found if name.startswith("next/")]
        self.context.matches = {
            layer: Correspondence(found[f"previous/{layer}"].long(), found[f"next/{layer}"].long())
            for layer in layers
        }
        self.context.features = found.get("features")

    def close(self) -> None:
        """Ends the reading thread."""
        self._items.close()

    def _next(self) -> dict[str, Tensor]:
        found = next(self._items)
        pinned = self.device.type == "cuda"
        return {name: x.to(self.device, non_blocking=pinned) for name, x in found.items()}


def _loads(
    features: CachedFeatures,
    steps: Sequence[StepNeeds],
    chunks: Sequence[Tensor],
    device: torch.device,
    team: Team,
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """What is to be read, in order; run by the thread."""
    pin = device.type == "cuda"  # the loop does not wait for copies of pinned memory

    def pinned(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.pin_memory() for name, x in found.items()} if pin else found

    def keyframes(step: StepNeeds) -> dict[str, Tensor]:
        features.check(step.t)
        own = team.share_jointly(len(step.keyframes)).take(step.keyframes)
        return pinned(features.of_keyframes(step.t, own, step.attention, step.features))

    def chunk(step: StepNeeds, frames: Tensor) -> dict[str, Tensor]:
        return pinned(features.of_chunk(step.t, frames, step.features))

    for step in steps:
        yield partial(keyframes, step)
        for frames in chunks:
            yield partial(chunk, step, frames)


def read_ahead(loads: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """The results of functions, run one after another by a thread, `depth` of them in advance."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=READER) as thread:
        try:
            for load in loads:
                waiting.append(thread.submit(load))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
