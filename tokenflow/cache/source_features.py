"""The features of a source cache: what edits need from the source at each sampling step.

They depend on no prompt: the tokens of the keyframes that PnP injects, the correspondences of
every frame, PnP's convolution features. preprocess.py computes them once per clip
(source_pass.build_features), which is possible since the keyframes of all steps are a pure function
of a seed; `CachedSource` reads them into an edit. This saves a third of an edit's work.

    <cache>/features/
        manifest.yaml               what they depend on, and the files; written last
        step_<t>.safetensors        of a sampling timestep; c and L differ from layer to layer
            tokens/<layer>          (k, L, c) of the keyframes; PnP's layers, first attention_steps
            previous/<layer>, next/<layer>      (n, L) int16 or int32; not for optical flow
            features                (n, C, h, w); first feature_steps
        tokens_<t>.safetensors      with save_tokens: all; no edit reads them
            all_tokens/<layer>      (n, L, c) of every layer

The files are memory-mapped. Each file's checksum is compared before the file is used.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenflow.cache.source_cache import FEATURES, MANIFEST, SourceCache
from tokenflow.storage.manifest import (
    FileRecord,
    check_file,
    load_manifest,
    refuse_unexpected_files,
)
from tokenflow.storage.schema import Model
from tokenflow_utils import ATTENTION_LAYERS, FEATURE_LAYER, TokenFlowContext, self_attention_layers
from util import UserError

FORMAT = 2
READER = "read-ahead"  # the thread's name

# ---------------------------------------------------------------------------------------------
# What cached features depend on


class FeatureSettings(Model):
    """What cached features depend on beside the cache that they lie in."""

    ALIASES: ClassVar = {"interval": "keyframe_interval"}  # of earlier caches

    n_frames: int  # these four determine the keyframes of every step
    keyframe_interval: int
    keyframe_seed: int
    n_timesteps: int
    attention_steps: int  # how many first steps have tokens
    feature_steps: int  # how many first steps have convolution features
    dtype: str  # of the pass, of tokens and features: float32, float16 or bfloat16
    save_tokens: Literal["keyframes", "all"] = "keyframes"  # all: of every frame, layer and step
    correspondence: Literal["nn", "flow"] = "nn"  # whether there are nearest tokens; flow: none

    @property
    def n_keyframes(self) -> int:
        return -(-self.n_frames // self.keyframe_interval)

    def mismatch(self, needed: FeatureSettings) -> str:
        """Why features of these settings cannot serve an edit that needs others; "" if they can."""
        same = ("n_frames", "keyframe_interval", "keyframe_seed", "n_timesteps", "dtype")
        differing = [name for name in same if getattr(self, name) != getattr(needed, name)]
        for name in ("attention_steps", "feature_steps"):
            if getattr(self, name) < getattr(needed, name):
                differing.append(name)
        if needed.save_tokens == "all" and self.save_tokens != "all":
            differing.append("save_tokens")
        if needed.correspondence == "nn" != self.correspondence:
            differing.append("correspondence")
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
    """The size in bytes of the tensors that `build_features` writes.

    Args:
        unet: its configuration counts; it may be on the meta device.
        grid: (h, w) of the latents.
    """
    sizes = layer_sizes(unet, grid)
    width = torch.finfo(getattr(torch, settings.dtype)).bits // 8
    n, steps = settings.n_frames, settings.n_timesteps
    injected = sum(h * w * c for layer, (h, w, c) in sizes.items() if layer in ATTENTION_LAYERS)
    total = settings.attention_steps * settings.n_keyframes * injected * width
    if settings.correspondence == "nn":
        grids = [h * w for h, w, _ in sizes.values()]
        total += steps * n * sum(2 * cells * index_dtype(cells).itemsize for cells in grids)
    size = math.prod(injected_shape(unet, grid))
    total += settings.feature_steps * n * size * width
    if settings.save_tokens == "all":
        total += steps * n * sum(h * w * c for h, w, c in sizes.values()) * width
    return total


def layer_sizes(
    unet: UNet2DConditionModel, grid: tuple[int, int]
) -> dict[str, tuple[int, int, int]]:
    """(h, w, c) of the tokens of each self-attention layer; arguments of `feature_bytes`."""
    return {
        layer: (
            *_grid_at(unet, layer, grid),
            unet.get_submodule(layer.removesuffix(".processor")).to_q.in_features,
        )
        for layer in self_attention_layers(unet)
    }


def injected_shape(unet: UNet2DConditionModel, grid: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the features that PnP injects; (0, h, w) of a UNet without that layer."""
    convolution = dict(unet.named_modules()).get(FEATURE_LAYER)
    channels = 0 if convolution is None else convolution.out_channels
    return channels, *_grid_at(unet, FEATURE_LAYER, grid)


def _grid_at(unet: UNet2DConditionModel, module: str, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid at a module of the UNet; each level halves the one above, rounding up."""
    block, index = module.split(".")[:2]
    level = len(unet.config.block_out_channels) - 1  # mid_block
    if block == "down_blocks":
        level = int(index)
    elif block == "up_blocks":
        level -= int(index)
    h, w = (-(-side // 2**level) for side in grid)
    return h, w


def index_dtype(n_tokens: int) -> torch.dtype:
    """The smallest integer dtype that holds the index of a token."""
    return torch.int16 if n_tokens <= torch.iinfo(torch.int16).max else torch.int32


def file_name(t: int, kind: str = "step") -> str:
    """The file of a timestep; kind "tokens": that of save_tokens: all."""
    return f"{kind}_{t}.safetensors"


# ---------------------------------------------------------------------------------------------
# Reading (edits)


@dataclass(frozen=True)
class CachedFeatures:
    """The features in a cache; made by `find_features`.

    Each method raises a UserError if a file is missing or damaged.
    """

    folder: Path
    settings: FeatureSettings
    files: dict[str, dict]
    advice: str
    inode: int  # of the folder

    def check_unchanged(self) -> None:
        """Refuses features that others replaced since they were found."""
        if not self.folder.exists() or self.folder.stat().st_ino != self.inode:
            raise UserError(f"{self.folder}: was replaced meanwhile; run the same command again")

    def tokens(self, t: int, layer: str) -> Tensor:
        """(n, L, c) tokens of every frame, where they were saved (save_tokens: all)."""
        self.check(t, "tokens")
        with self.open(t, "tokens") as file:
            return file.get_tensor(f"all_tokens/{layer}")

    def check(self, t: int, kind: str = "step") -> None:
        """Compares a timestep's file with its checksum."""
        check_file(self.folder, file_name(t, kind), self.files, self.advice)

    def verify(self) -> None:
        """Compares every file with its checksum, and refuses files that the manifest lacks."""
        for name in self.files:
            check_file(self.folder, name, self.files, self.advice)
        refuse_unexpected_files(self.folder, {MANIFEST, *self.files})

    def open(self, t: int, kind: str = "step") -> safe_open:
        """A timestep's file, memory-mapped."""
        path = self.folder / file_name(t, kind)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {self.advice}") from error


def find_features(
    cache: SourceCache, remake: str = "run preprocess.py again"
) -> CachedFeatures | None:
    """The finished features of a cache, if it has any: all files there, of the right size.

    Args:
        remake: the command that computes them again, for errors.

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
    inode = folder.stat().st_ino
    manifest = load_manifest(FeaturesManifest, folder / MANIFEST, FORMAT, advice)
    if manifest.cache_sha256 != cache.sha256:
        raise UserError(f"{folder}: belongs to another cache; {advice}")
    for name in manifest.files:
        check_file(folder, name, manifest.files, advice, read=False)
    return CachedFeatures(folder, manifest.settings, manifest.files, advice, inode)


@dataclass(frozen=True)
class Step:
    """A sampling step, and what it needs of the source."""

    t: int
    keyframes: Tensor  # (k,) frame numbers
    attention: bool  # whether PnP injects queries and keys
    features: bool  # whether PnP injects convolution features


class CachedSource:
    """A `tokenflow_utils.Source` that reads a cache's features.

    A thread compares the files' checksums, and so reads them, ahead of the loop.

    Args:
        context: of the patch; it says what is injected.
        device: the UNet's.
        features: that serve the edit (`FeatureSettings.mismatch`).
        steps: in the order in which the loop takes them.
    """

    def __init__(
        self,
        context: TokenFlowContext,
        device: torch.device,
        features: CachedFeatures,
        steps: Sequence[Step],
    ) -> None:
        self.context, self.device, self.features = context, device, features
        self._keyframes = {step.t: step.keyframes for step in steps}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=READER)
        self._checks = {t: self._thread.submit(features.check, t) for t in self._keyframes}

    def load_keyframes(self, t: int, frames: Tensor) -> None:
        """Fills `tokens` of the keyframes (k,), and `features` of this process's shard of them.

        Raises:
            LookupError: if the step has other keyframes, or is none of the edit's.
            UserError: if the step's file is missing or damaged.
        """
        if t not in self._keyframes or not torch.equal(frames, self._keyframes[t]):
            raise LookupError(f"timestep {t}: holds no features of keyframes {frames.tolist()}")
        self._checks[t].result()
        context, found = self.context, {}
        with self.features.open(t) as file:
            if context.inject_attention:
                names = [name for name in file.keys() if name.startswith("tokens/")]  # noqa: SIM118
                found = {name: file.get_tensor(name) for name in names}
            if context.inject_features:
                rows = file.get_slice("features")
                own = context.shard(frames).tolist()
                found["features"] = torch.cat([rows[i : i + 1] for i in own])
        self.features.check_unchanged()
        found = self._moved(found)
        context.features = found.pop("features", None)
        context.tokens = {name.removeprefix("tokens/"): x for name, x in found.items()}

    def load_chunk(self, t: int, frames: Tensor) -> None:
        """Fills `matches` and `features` of consecutive frames (m,) of the keyframes' step."""
        start, end = int(frames[0]), int(frames[-1]) + 1
        kinds = ("previous/", "next/") if self.context.nearest else ()
        if self.context.inject_features:
            kinds += ("features",)
        with self.features.open(t) as file:
            names = [name for name in file.keys() if name.startswith(kinds)]  # noqa: SIM118
            found = self._moved({name: file.get_slice(name)[start:end] for name in names})
        self.features.check_unchanged()
        layers = [name.removeprefix("next/") for name in found if name.startswith("next/")]
        self.context.matches = {
            layer: torch.stack([found[f"previous/{layer}"], found[f"next/{layer}"]], dim=1).long()
            for layer in layers
        }
        self.context.features = found.get("features")

    def close(self) -> None:
        """Ends the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    def _moved(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cuda":  # the loop does not wait for copies of pinned memory
            found = {name: x.pin_memory() for name, x in found.items()}
        return {name: x.to(self.device, non_blocking=True) for name, x in found.items()}
