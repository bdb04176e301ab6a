"""Builds the source cache in resumable stages: encode, invert, reconstruct; then its features."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenflow.cache.inputs import PreprocessInputs, check_disk, open_preprocess_inputs
from tokenflow.cache.options import PreprocessOptions
from tokenflow.cache.source_cache import (
    AUDIO_FILE,
    CLEAN_LATENTS,
    DEPTH_FILE,
    FEATURES,
    FORMAT,
    MANIFEST,
    Manifest,
    identity,
    latents_file,
    open_cache,
)
from tokenflow.cache.source_features import find_features
from tokenflow.cache.source_pass import build_features, evaluations_of_a_step
from tokenflow.diffusion.conditions import estimate_depth
from tokenflow.diffusion.ddim import CLEAN
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.inversion import invert, sample
from tokenflow.diffusion.memory import unet_batch_size, vae_batch_size
from tokenflow.diffusion.models import Loader, StableDiffusion, load_stable_diffusion
from tokenflow.diffusion.vae import SquaredError, decode_latents, encode_frames
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.ops.profiling import Stopwatch, versions
from tokenflow.ops.progress import Progress
from tokenflow.storage.audio import cut_audio
from tokenflow.storage.images import save_frames
from tokenflow.storage.video import resolve_clip, save_video
from tokenflow.storage.work_dir import WorkDir, locked, recover, resumable_dir
from tokenflow.storage.yaml_files import save_yaml
from util import UserError, atomic_file, load_tensors, save_tensors

log = logging.getLogger("tokenflow")

# A reconstruction this far below the VAE's own makes visibly worse edits.
WARN_GAP_DB = 3.0
DEPTH_BATCH = 8  # frames at once in the depth estimator, at most
FEATURE_BATCH = 8  # frames at once in the source pass of edits, at most
SAVE_EVERY = 10  # steps of the reconstruction
# Every how many frames --reconstruction shows one, from the least to the most; None: no frame.
RECONSTRUCTED = {"none": None, "sample": 8, "full": 1}

T = TypeVar("T")


def build_cache(
    options: PreprocessOptions,
    load: Loader | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    watch: Stopwatch | None = None,
) -> Path:
    """Builds the cache of one clip, resumes building it, or finds it complete.

    Args:
        load: what loads the models, `load_stable_diffusion` if None.
        group: the processes that build it together, each of which calls this.
        watch: times the stages; a new one if None.

    Returns:
        the cache's folder.

    Raises:
        UserError: an option does not fit the clip or the model, or the cache has other settings.
    """
    with group.raise_together():
        inputs = open_preprocess_inputs(options, group, watch)
    settings = json.dumps(identity(inputs.manifest), sort_keys=True)
    group.assert_same(settings, "clip, model and settings")
    with locked(inputs.folder, group):
        inverted = complete = False
        with group.raise_together():
            if group.is_main:
                inverted, complete = _find_work(inputs)
        inverted, complete = group.broadcast([inverted, complete])
        if complete:
            log.info("%s already exists with these settings", inputs.folder)
        else:
            log.info("%s", _plan(inputs, inverted))
            with inputs.watch("load"):
                models = (load or load_stable_diffusion)(
                    inputs.checkpoint,
                    inputs.device,
                    inputs.dtype,
                    options.allow_pickle,
                    inputs.adapters,
                )
            with Progress(_evaluations(inputs, inverted), group.is_main) as progress:
                if not inverted:
                    _add_inversion(inputs, models, progress)
                if inputs.features is not None:
                    _add_features(inputs, models, progress)
    return inputs.folder


# ---------------------------------------------------------------------------------------------
# Finding earlier work


def _find_work(inputs: PreprocessInputs) -> tuple[bool, bool]:
    """Whether the inversion is complete, and all of the cache; checks the disk's room if not."""
    recover(inputs.folder)
    recover(inputs.folder / FEATURES)
    verify = inputs.options.verify
    keep = _was_overwritten(inputs) if inputs.options.overwrite else True
    inverted = keep and _has_inversion(inputs, verify)
    complete = inverted and (inputs.features is None or _has_features(inputs, verify))
    if not complete:
        check_disk(inputs, inverted)
    return inverted, complete


def _has_inversion(inputs: PreprocessInputs, verify: bool) -> bool:
    """Whether the cache exists, apart from its features; refuses other settings and damage."""
    if not inputs.folder.exists():
        return False
    found = open_cache(inputs.folder, lambda _: "run the same command with", verify).manifest
    have, want = identity(found), identity(inputs.manifest)
    differing = [f"{k} is {have[k]!r} there, {want[k]!r} here" for k in have if have[k] != want[k]]
    if differing:
        raise UserError(
            f"{inputs.folder}: made with other settings ({'; '.join(differing)}); add --overwrite"
        )
    kinds, asked = list(RECONSTRUCTED), inputs.options.reconstruction
    if kinds.index(found.reconstruction) < kinds.index(asked):
        raise UserError(
            f"{inputs.folder}: made with --reconstruction {found.reconstruction}, {asked} here; "
            f"edits need none: use --reconstruction {found.reconstruction}, or --overwrite to "
            "invert it again"
        )
    return True


def _was_overwritten(inputs: PreprocessInputs) -> bool:
    """Whether --overwrite finds a cache with these settings and no damage that lacks its features.

    An interrupted run with --overwrite built it; the same command then adds the features.
    """
    if inputs.features is None or (inputs.folder / FEATURES).exists():
        return False
    try:
        return _has_inversion(inputs, verify=True)
    except UserError:
        return False


def _has_features(inputs: PreprocessInputs, verify: bool) -> bool:
    """Whether the finished cache has features that fit; logs why others will be replaced."""
    found = find_features(open_cache(inputs.folder), "the same command")
    if found is None:
        return False
    if verify:
        found.verify()
    difference = found.settings.mismatch(inputs.features)
    if difference:
        log.info("%s is computed again: %s", found.folder, difference)
    return not difference


# ---------------------------------------------------------------------------------------------
# Building it


def _plan(inputs: PreprocessInputs, inverted: bool) -> str:
    """What will be done, in one line."""
    clip, options, manifest = inputs.clip, inputs.options, inputs.manifest
    n, stride, size = len(clip.frames), options.frame_stride, f"{manifest.width}x{manifest.height}"
    last, seconds = options.frame_start + (n - 1) * stride, float(n / clip.fps)
    every = "" if stride == 1 else f" with stride {stride}"
    of_all = f"{seconds:.3g} s of {float(clip.n_source / stride / clip.fps):.3g} s"
    more = "; --n_frames for more" if last + stride < clip.n_source else ""
    fitted = {"crop": "cropped to", "stretch": "resized to"}[options.fit]
    stages = {} if inverted else {"inversion": manifest.steps}
    if not inverted and manifest.reconstruction != "none":
        stages["reconstruction"] = manifest.recon_steps
    if inputs.features is not None:
        stages["source features"] = inputs.features.n_timesteps
    return (
        f"{manifest.source_name}: frames {options.frame_start}-{last} of {clip.n_source}{every} "
        f"({of_all}{more}), {clip.native_size[1]}x{clip.native_size[0]} {fitted} {size}; steps: "
        + ", ".join(f"{name} {steps}" for name, steps in stages.items())
    )


def _evaluations(inputs: PreprocessInputs, inverted: bool) -> float:
    """UNet evaluations of a frame that this process makes, at most."""
    manifest, group, total = inputs.manifest, inputs.group, 0.0
    if not inverted:
        every, n_frames = RECONSTRUCTED[manifest.reconstruction], manifest.n_frames
        shown = -(-n_frames // every) if every else 0
        own, own_shown = (len(group.shard(n).local_indices) for n in (n_frames, shown))
        total += own * manifest.steps * manifest.inversion_iters
        total += own_shown * manifest.recon_steps
    if inputs.features is not None:
        steps = inputs.features.n_timesteps / group.size
        total += evaluations_of_a_step(inputs.features) * steps
    return total


def _add_inversion(inputs: PreprocessInputs, models: StableDiffusion, progress: Progress) -> None:
    """Writes the cache but for its features, and reports how well it was reconstructed."""
    depends_on = {"format": FORMAT, **identity(inputs.manifest)}
    if inputs.options.reconstruction != "full":
        depends_on["reconstruction"] = inputs.options.reconstruction
    if not inputs.options.audio:
        depends_on["audio"] = False
    with resumable_dir(inputs.folder, depends_on, inputs.group) as work:
        manifest = _Inversion(inputs, models, work, progress).run()
    if inputs.group.is_main:
        _report_reconstruction(manifest)


def _add_features(inputs: PreprocessInputs, models: StableDiffusion, progress: Progress) -> None:
    """Runs the source pass of edits and adds its features to the finished cache."""
    cache = open_cache(inputs.folder)
    manifest, frames = cache.manifest, inputs.clip.frames
    denoiser = make_denoiser(
        models, frames, manifest.inversion_prompt, manifest.control, cache.depth(len(frames))
    )
    # The pass holds the tokens of all keyframes too, so memory alone must not decide.
    batch_size, size = inputs.options.batch_size, frames.shape[1:3]
    at_once = unet_batch_size(batch_size, denoiser, size, most=FEATURE_BATCH)
    timesteps, settings = inputs.timesteps.sampling, inputs.features
    build_features(
        cache, denoiser, timesteps, settings, at_once, inputs.watch, inputs.group, progress
    )


class _Inversion:
    """Builds one cache, stage by stage, from where an earlier run stopped.

    Of several processes each computes its shard of the frames, and the main one writes.
    """

    def __init__(
        self,
        inputs: PreprocessInputs,
        models: StableDiffusion,
        work: WorkDir,
        progress: Progress,
    ) -> None:
        self.progress = progress
        self.inputs, self.manifest, self.frames = inputs, inputs.manifest, inputs.clip.frames
        self.models, self.work, self.watch = models, work, inputs.watch
        self.batch_size = inputs.options.batch_size
        self.group, self.shard = inputs.group, inputs.group.shard(len(self.frames))
        every = RECONSTRUCTED[inputs.options.reconstruction]
        # The frames that are reconstructed.
        self.shown = torch.arange(0, len(self.frames) if every else 0, every or 1)
        self.image_forwards = {"inversion": 0, "reconstruction": 0}  # of this process
        if work.checkpoint is not None and self.group.is_main:  # of all processes of earlier runs
            self.image_forwards.update(work.checkpoint.figures["image_forwards"])
            for stage, seconds in work.checkpoint.figures["seconds"].items():
                self.watch.add(stage, seconds)

    def run(self) -> Manifest:
        """Runs the stages that are left; returns the manifest, which the main process wrote."""
        size = self.frames.shape[1:3]
        with self.watch("load"):
            at_once = vae_batch_size(self.batch_size, self.models, size)
            self.vae_batch = min(self.group.all_gather(at_once))  # they decode in step
        resumed = self.work.checkpoint
        clean, depth = self._encode() if resumed is None else self._read_encoded()
        self.denoiser = make_denoiser(
            self.models, self.frames, self.manifest.inversion_prompt, self.manifest.control, depth
        )
        with self.watch("load"):
            self.unet_batch = unet_batch_size(self.batch_size, self.denoiser, size)
        if resumed is not None and resumed.stage == "reconstruction":
            latents, t = resumed.tensors["latents"], resumed.figures["t"]
            evaluations = len(self.shard.local_indices) * self.manifest.inversion_iters
            self.progress.skip(evaluations * self.manifest.steps)
        else:
            latents, t = self._invert(clean), self.inputs.timesteps.reconstruction[0]
        figures = {}
        if len(self.shown):
            latents = self._reconstruct(latents, t)
            figures = self._save_reconstruction(clean[self.shown], latents)
        figures |= {
            "seconds": self.watch.seconds,
            "image_forwards": self._total_image_forwards(),
            "versions": versions(),
        }
        manifest = self.manifest.model_copy(update=figures)
        if self.work.writes:  # written last: from now on the cache is whole
            manifest = manifest.model_copy(update={"files": self.work.record_files()})
            save_yaml(self.work.folder / MANIFEST, manifest.model_dump())
        return manifest

    def _encode(self) -> tuple[Tensor, Tensor | None]:
        """Writes frames, sound, clean latents and depth; returns the latents and any depth."""
        depth, folder, manifest = None, self.work.folder, self.manifest
        if manifest.depth_model is not None:
            with self.watch("depth"):
                batch = min(self.batch_size or DEPTH_BATCH, DEPTH_BATCH)
                allow = self.inputs.options.allow_pickle
                key, checkpoint = manifest.depth_model, self.inputs.checkpoint
                depth = estimate_depth(
                    self.frames, key, checkpoint, self.inputs.device, batch, allow
                )
        if self.work.writes:
            save_frames(folder / "frames", self.frames)
            if self.inputs.options.audio:
                source = resolve_clip(self.inputs.options.data_path)
                cut_audio(source, folder / AUDIO_FILE, self.inputs.clip)
            with atomic_file(folder / "inversion_prompt.txt") as temporary:
                temporary.write_text(manifest.inversion_prompt, encoding="utf-8")
            if depth is not None:
                save_tensors(folder / DEPTH_FILE, {"depth": depth})
        with self.watch("vae"):
            own = encode_frames(self.models, self.frames[self.shard.local], self.vae_batch)
            decode_latents(self.models, own[:1])  # a VAE that fails must do so now, not later
        clean = self.shard.gather(own)
        self._save_latents(CLEAN_LATENTS, clean)
        self._save("encoded", {}, CLEAN)
        return clean, depth

    def _read_encoded(self) -> tuple[Tensor, Tensor | None]:
        """What `_encode` wrote; the frames are the same, else this would be other work."""
        depth = None
        if self.manifest.depth_model is not None:
            depth = load_tensors(self.work.folder / DEPTH_FILE)["depth"]
        return self._read_latents(CLEAN_LATENTS), depth

    def _invert(self, clean: Tensor) -> Tensor:
        """Writes the latents of the saved timesteps, from the newest ones on if there are some.

        Returns those of the frames `shown`, (m, 4, h, w), that the reconstruction starts from.
        """
        timesteps, resumed = self.inputs.timesteps, self.work.checkpoint
        latents, t, start, past = clean, CLEAN, None, []
        if resumed.stage == "inversion":
            t = resumed.figures["t"]
            latents, start = self._read_latents(t), resumed.tensors.get("start")
            times = sorted(int(n[6:]) for n in resumed.tensors if n.startswith("noise_"))
            past = [(p, self.shard.take(resumed.tensors[f"noise_{p}"])) for p in times]
        steps = invert(
            self.denoiser,
            self.shard.take(latents),
            timesteps.inversion,
            self.manifest.inversion_iters,
            self.manifest.inversion_tol,
            self.unet_batch,
            t=t,
            past=past,
            frames=self.shard.local_indices,
            progress=self.progress,
        )
        for t, own in self._timed("inversion", steps):
            if t == timesteps.reconstruction[0]:
                start = self.shard.gather(own)
            if t not in timesteps.saved:
                continue
            self._save_latents(t, self.shard.gather(own))
            tensors = {} if start is None else {"start": start}
            if self.manifest.inversion_tol:  # else no step needs it
                tensors |= {f"noise_{p}": self.shard.gather(noise) for p, noise in past}
            self._save("inversion", tensors, t)
        start = start[self.shown]
        self._save("reconstruction", {"latents": start}, timesteps.reconstruction[0])
        return start

    def _reconstruct(self, latents: Tensor, t: int) -> Tensor:
        """The clean latents (m, 4, h, w) that sampling from those at timestep t leads to."""
        if t == CLEAN:
            return latents
        shard, timesteps = self.group.shard(len(latents)), self.inputs.timesteps.reconstruction
        own, frames = shard.take(latents), shard.take(self.shown)
        steps = sample(self.denoiser, own, timesteps, self.unet_batch, t, frames, self.progress)
        for number, (t, own) in enumerate(self._timed("reconstruction", steps), start=1):
            if number % SAVE_EVERY == 0 or t == CLEAN:
                latents = shard.gather(own)
                self._save("reconstruction", {"latents": latents}, t)
        return latents

    def _timed(self, stage: str, steps: Iterator[T]) -> Iterator[T]:
        """The steps, whose seconds and evaluations count for a stage."""
        while True:
            before = self.denoiser.image_forwards
            with self.watch(stage):
                step = next(steps, None)
            self.image_forwards[stage] += self.denoiser.image_forwards - before
            if step is None:
                return
            yield step

    def _read_latents(self, name: str | int) -> Tensor:
        return load_tensors(self.work.folder / latents_file(name))["latents"]

    def _save_latents(self, name: str | int, latents: Tensor) -> None:
        if self.work.writes:
            save_tensors(self.work.folder / latents_file(name), {"latents": latents})

    def _save(self, stage: str, tensors: dict[str, Tensor], t: int) -> None:
        made = self._total_image_forwards()
        self.work.save(stage, tensors, t=t, seconds=self.watch.seconds, image_forwards=made)

    def _total_image_forwards(self) -> dict[str, int]:
        return {stage: sum(self.group.all_gather(n)) for stage, n in self.image_forwards.items()}

    def _save_reconstruction(self, clean: Tensor, latents: Tensor) -> dict[str, float]:
        """Decodes latents of the clip and of its reconstruction in step; writes inverted.mp4.

        No more than a chunk of each decoding is held (of several processes, a chunk each). Returns
        the three PSNRs of the manifest; inverted.mp4 needs all frames.
        """
        frames = self.frames[self.shown.numpy()]
        pairs = {
            "psnr": SquaredError(),  # reconstruction and frames
            "vae_psnr": SquaredError(),  # the VAE's decoding and frames
            "psnr_to_vae": SquaredError(),  # reconstruction and the VAE's decoding
        }

        def decoded() -> Iterator[np.ndarray]:
            at_once = self.vae_batch * self.group.size
            for first in range(0, len(clean), at_once):
                part = slice(first, first + at_once)
                with self.watch("vae"):
                    bound, found = (
                        decode_latents(self.models, x[part], self.vae_batch, self.group)
                        for x in (clean, latents)
                    )
                pairs["psnr"].add(found, frames[part])
                pairs["vae_psnr"].add(bound, frames[part])
                pairs["psnr_to_vae"].add(found, bound)
                yield from found

        if self.work.writes and self.inputs.options.reconstruction == "full":
            folder, audio = self.work.folder, self.work.folder / AUDIO_FILE
            audio = audio if audio.is_file() else None
            save_video(folder / "inverted.mp4", decoded(), self.inputs.clip.fps, audio)
        else:
            deque(decoded(), maxlen=0)  # takes part in the decoding
        return {name: round(error.psnr, 3) for name, error in pairs.items()}


def _report_reconstruction(manifest: Manifest) -> None:
    if manifest.reconstruction != "none":
        log.info(
            "reconstruction PSNR %.2f dB (upper bound of the VAE: %.2f dB); %.2f dB against the "
            "VAE's own reconstruction%s",
            manifest.psnr,
            manifest.vae_psnr,
            manifest.psnr_to_vae,
            " (every eighth frame)" if manifest.reconstruction == "sample" else "",
        )
    log.info(
        "image-forwards a frame: %s",
        ", ".join(f"{n / manifest.n_frames:.1f} {s}" for s, n in manifest.image_forwards.items()),
    )
    gap = manifest.vae_psnr - manifest.psnr
    if gap > WARN_GAP_DB:
        log.warning(
            # All that --fast sets, which may not be given too.
            "the reconstruction is %.1f dB below the VAE's: edits may lose the clip's layout; try "
            "--inversion_iters %d --inversion_tol %g --steps %d --save_steps %d, or an "
            "--inversion_prompt that says what the clip shows",
            gap,
            manifest.inversion_iters + 2,
            manifest.inversion_tol,
            manifest.steps,
            manifest.save_steps,
        )
