"""The making of a source cache: encoding, inversion, reconstruction; it can be gone on with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np
from torch import Tensor

from tokenflow.cache.inputs import PreprocessInputs
from tokenflow.cache.source_cache import (
    CLEAN_LATENTS,
    DEPTH_FILE,
    Manifest,
    finish_cache,
    latents_file,
    save_latents,
    save_source,
)
from tokenflow.diffusion.batch_size import unet_batch_size, vae_batch_size
from tokenflow.diffusion.conditions import estimate_depth
from tokenflow.diffusion.ddim import CLEAN
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.inversion import invert, sample
from tokenflow.diffusion.models import StableDiffusion
from tokenflow.diffusion.vae import SquaredError, decode_latents, encode_frames
from tokenflow.ops.profiling import Stopwatch, versions
from tokenflow.storage.video import save_video
from tokenflow.storage.work_dir import Workplace
from util import load_tensors

DEPTH_BATCH = 8  # frames at once in the depth estimator, at most
SAVE_EVERY = 10  # steps of the reconstruction
COUNTED_STAGES = ("inversion", "reconstruction")  # whose evaluations of the UNet are counted

T = TypeVar("T")


class CacheMaker:
    """The making of one cache, stage after stage; what an earlier run saved is not made again.

    Of several processes each computes its share of the frames, and the main one writes.
    """

    def __init__(
        self,
        inputs: PreprocessInputs,
        models: StableDiffusion,
        work: Workplace,
        watch: Stopwatch,
        batch_size: int | None,
    ) -> None:
        self.inputs, self.manifest, self.frames = inputs, inputs.manifest, inputs.clip.frames
        self.models, self.work, self.watch, self.batch_size = models, work, watch, batch_size
        self.group, self.shard = inputs.group, inputs.group.shard(len(self.frames))
        self.image_forwards = dict.fromkeys(COUNTED_STAGES, 0)  # of this process
        if work.state is not None and self.group.is_main:  # of all processes of an earlier run
            self.image_forwards.update(work.state.figures["image_forwards"])
            for stage, seconds in work.state.figures["seconds"].items():
                watch.add(stage, seconds)

    def run(self) -> Manifest:
        """Runs what is left of the stages; returns the manifest, which the main process wrote."""
        size = self.frames.shape[1:3]
        with self.watch("load"):
            at_once = vae_batch_size(self.batch_size, self.models, size)
            self.vae_batch = min(self.group.all_gather(at_once))  # for they decode in step
        clean, depth = self._encode() if self.work.state is None else self._encoded()
        self.denoiser = make_denoiser(
            self.models, self.frames, self.manifest.inversion_prompt, self.manifest.control, depth
        )
        with self.watch("load"):
            self.unet_batch = unet_batch_size(self.batch_size, self.denoiser, size)
        if self.work.state.stage != "reconstruction":
            self._invert()
        latents = self._reconstruct()
        scores = self._save_reconstruction(clean, latents)
        if not self.work.writes:
            return self.manifest
        return finish_cache(
            self.work.folder,
            self.manifest,
            self.work.record_files(),
            **scores,
            seconds=self.watch.seconds,
            image_forwards=self.work.state.figures["image_forwards"],
            versions=versions(),
        )

    def _encode(self) -> tuple[Tensor, Tensor | None]:
        """Writes frames, clean latents and depth; returns the latents, and the depth if any."""
        depth, manifest = None, self.manifest
        if manifest.depth_model is not None:
            with self.watch("depth"):
                batch = min(self.batch_size or DEPTH_BATCH, DEPTH_BATCH)
                where = self.inputs.device, batch, self.inputs.allow_pickle
                depth = estimate_depth(self.frames, manifest.depth_model, *where)
        if self.work.writes:
            save_source(self.work.folder, self.frames, manifest.inversion_prompt, depth)
        with self.watch("vae"):
            own = encode_frames(self.models, self.frames[self.shard.local], self.vae_batch)
            decode_latents(self.models, own[:1])  # a VAE that fails shall do so now, not later
        clean = self.shard.gather(own)
        self._save_latents(CLEAN_LATENTS, clean)
        self._save("encoded", {"latents": clean}, CLEAN)
        return clean, depth

    def _encoded(self) -> tuple[Tensor, Tensor | None]:
        """What `_encode` wrote; the frames are as they were, or this were other work."""
        folder = self.work.folder
        depth = None
        if self.manifest.depth_model is not None:
            depth = load_tensors(folder / DEPTH_FILE)["depth"]
        return load_tensors(latents_file(folder, CLEAN_LATENTS))["latents"], depth

    def _invert(self) -> None:
        """Writes the latents of the saved timesteps."""
        manifest, timesteps, state = self.manifest, self.inputs.timesteps, self.work.state
        own = {name: self.shard.take(x) for name, x in state.tensors.items()}
        start = own.get("start")  # of the reconstruction
        past = [(t, own[f"noise_{t}"]) for t in state.figures["past"]]
        how = manifest.inversion_iters, manifest.inversion_tol, self.unet_batch
        steps = invert(
            self.denoiser,
            own["latents"],
            timesteps.inversion,
            *how,
            t=state.figures["t"],
            past=past,
            **self._own_frames,
        )
        with closing(steps):  # so that its bar ends before an error is told
            for t, latents in self._timed("inversion", steps):
                if t == timesteps.reconstruction[0]:
                    start = latents
                if t not in timesteps.saved:
                    continue
                own = {"latents": latents} | ({} if start is None else {"start": start})
                known = past if manifest.inversion_tol else []  # else no step needs it
                own |= {f"noise_{t_past}": noise for t_past, noise in known}
                whole = {name: self.shard.gather(x) for name, x in own.items()}
                self._save_latents(t, whole["latents"])
                self._save("inversion", whole, t, past=[t_past for t_past, _ in known])
        start = self.shard.gather(start)
        self._save("reconstruction", {"latents": start}, timesteps.reconstruction[0])

    def _reconstruct(self) -> Tensor:
        """The clean latents (n, 4, h, w) that sampling from the inverted ones leads to."""
        timesteps, state = self.inputs.timesteps.reconstruction, self.work.state
        latents, t = state.tensors["latents"], state.figures["t"]
        if t == CLEAN:
            return latents
        own = self.shard.take(latents)
        steps = sample(self.denoiser, own, timesteps, self.unet_batch, t, **self._own_frames)
        with closing(steps):
            for number, (t, own) in enumerate(self._timed("reconstruction", steps), start=1):
                if number % SAVE_EVERY == 0 or t == CLEAN:
                    latents = self.shard.gather(own)
                    self._save("reconstruction", {"latents": latents}, t)
        return latents

    @property
    def _own_frames(self) -> dict[str, object]:
        return {"frames": self.shard.local_indices, "progress": self.group.is_main}

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

    def _save_latents(self, name: str | int, latents: Tensor) -> None:
        if self.work.writes:
            save_latents(self.work.folder, name, latents)

    def _save(
        self, stage: str, tensors: dict[str, Tensor], t: int, past: Sequence[int] = ()
    ) -> None:
        made = {name: sum(self.group.all_gather(n)) for name, n in self.image_forwards.items()}
        self.work.save(
            stage,
            tensors,
            t=t,
            past=list(past),
            seconds=self.watch.seconds,
            image_forwards=made,
        )

    def _save_reconstruction(self, clean: Tensor, latents: Tensor) -> dict[str, float]:
        """Decodes the reconstruction and the clean latents in step, and writes inverted.mp4.

        Args:
            clean, latents: (n, 4, h, w) of the clip and of its reconstruction.

        Returns:
            the three PSNRs of the manifest; no more than a chunk of each decoding is held (of
            several processes, a chunk of each process's).
        """
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
                    how = self.vae_batch, self.group
                    bound = decode_latents(self.models, clean[part], *how)
                    found = decode_latents(self.models, latents[part], *how)
                pairs["psnr"].add(found, self.frames[part])
                pairs["vae_psnr"].add(bound, self.frames[part])
                pairs["psnr_to_vae"].add(found, bound)
                yield from found

        if self.work.writes:
            save_video(self.work.folder / "inverted.mp4", decoded(), self.inputs.clip.fps)
        else:
            deque(decoded(), maxlen=0)  # takes part in the decoding
        return {name: round(error.psnr, 3) for name, error in pairs.items()}
