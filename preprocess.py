"""Inverts a clip with DDIM and writes the source cache that every edit of it reads.

python preprocess.py --data_path clip.mp4 --inversion_prompt "a woman running"
"""

from __future__ import annotations

import argparse
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from batch_sizes import unet_batch_size, vae_batch_size
from checkpoints import (
    check_controlnet_fits,
    checkpoint_folder,
    checkpoint_revision,
    controlnet_key_for,
    load_unet_skeleton,
    model_key_for,
    single_model_folder,
)
from conditions import ControlSettings, estimate_depth
from diffusion import (
    CLEAN,
    Loader,
    NoiseSchedule,
    SquaredError,
    StableDiffusion,
    decode_latents,
    encode_frames,
    load_stable_diffusion,
    make_denoiser,
    resolve_device,
    resolve_dtype,
)
from folders import Workplace, locked, recover, resumable_folder, unfinished_bytes
from inversion import InversionTimesteps, inversion_timesteps, invert, sample
from parallel import ALONE, Team, start_team
from preprocess_options import DEFAULTS, parse_args
from run_info import Stopwatch, versions
from source_cache import (
    CLEAN_LATENTS,
    DEPTH_FILE,
    FEATURES,
    FORMAT,
    Manifest,
    cache_folder,
    describe_difference,
    finish_cache,
    identity,
    latents_file,
    open_cache,
    save_latents,
    save_source,
)
from source_features import (
    FeatureSettings,
    check_room,
    feature_bytes,
    find_features,
    size_text,
    write_features,
)
from util import (
    UserError,
    check_writable,
    command_line,
    load_tensors,
    setup_logging,
)
from video import (
    Clip,
    clip_name,
    read_clip,
    resolve_clip,
    save_video,
    source_sha256,
)

log = logging.getLogger("tokenflow")

# A reconstruction this far below the VAE's own makes visibly worse edits.
WARN_GAP_DB = 3.0
VAE_FACTOR = 8  # pixels per latent cell along one side, of every Stable Diffusion
LATENT_BYTES = 4 * 4  # four channels of float32
DEPTH_BYTES = 4  # float32 a pixel
FEATURE_BATCH = 8  # frames at once in the source pass of edits, at most
DEPTH_BATCH = 8  # frames at once in the depth estimator, at most
SAVE_EVERY = 10  # steps of the reconstruction
COUNTED_STAGES = ("inversion", "reconstruction")  # whose evaluations of the UNet are counted
OVERWRITING = ".overwriting"  # in a cache that --overwrite made anew, until its features are there

T = TypeVar("T")


@dataclass(frozen=True)
class PreprocessInputs:
    """A checked command line with what it refers to.

    Attributes:
        manifest: the cache's, but for the figures of its making.
        folder: the cache's.
        features: what the cached features shall be made for, if there shall be any.
        allow_pickle: whether models may be loaded from pickled weights.
        read_seconds: what reading the clip took.
    """

    clip: Clip
    checkpoint: Path
    timesteps: InversionTimesteps
    device: torch.device
    dtype: torch.dtype
    manifest: Manifest
    folder: Path
    features: FeatureSettings | None
    read_seconds: float
    team: Team = ALONE  # the processes that make this cache together
    allow_pickle: bool = False


def open_inputs(args: argparse.Namespace, team: Team = ALONE) -> PreprocessInputs:
    """Reads the clip, and checks all that can go wrong before a model is loaded.

    Raises:
        UserError: naming what is missing or does not fit, and what mends it.
    """
    device = resolve_device(args.device, team)
    dtype = resolve_dtype(args.dtype, device)
    source = resolve_clip(args.data_path)
    sha256 = source_sha256(source)
    watch = Stopwatch(device)
    with watch("read"):
        clip = read_clip(
            source,
            args.n_frames,
            start=args.frame_start,
            stride=args.frame_stride,
            size=(args.H, args.W) if args.H else None,
            fit=args.fit,
            fps=args.fps,
        )
    if source_sha256(source) != sha256:  # its frames would go by the name of others
        raise UserError(f"{source}: changed while it was read; run the same command again")
    model_key = model_key_for(args.sd_version, args.model_key)
    checkpoint = checkpoint_folder(model_key, args.allow_pickle)
    schedule = NoiseSchedule.of_checkpoint(checkpoint)
    timesteps = inversion_timesteps(schedule, args.steps, args.save_steps, args.recon_steps)
    control, depth_model = _conditions(args, checkpoint)
    n_frames, height, width, _ = clip.frames.shape
    manifest = Manifest(
        clip=clip_name(source),
        source_name=source.name,
        source_sha256=sha256,
        frame_start=args.frame_start,
        frame_stride=args.frame_stride,
        n_frames=n_frames,
        frames_asked=args.n_frames,
        height=height,
        width=width,
        fit=args.fit,
        fps=str(clip.fps),
        sd_version=args.sd_version,
        model_key=model_key,
        model_revision=checkpoint_revision(checkpoint),
        inversion_prompt=args.inversion_prompt,
        steps=args.steps,
        save_steps=args.save_steps,
        inversion_iters=args.inversion_iters,
        inversion_tol=args.inversion_tol,
        recon_steps=args.recon_steps,
        timesteps=timesteps.saved,
        dtype=str(dtype).removeprefix("torch."),
        control=control,
        depth_model=depth_model,
    )
    folder = cache_folder(args.save_dir, args.sd_version, manifest.clip, args.steps, n_frames)
    check_writable(folder, "--save_dir")
    return PreprocessInputs(
        clip=clip,
        checkpoint=checkpoint,
        timesteps=timesteps,
        device=device,
        dtype=dtype,
        manifest=manifest,
        folder=folder,
        features=_feature_settings(args, manifest) if args.cache_features else None,
        read_seconds=watch.seconds["read"],
        team=team,
        allow_pickle=args.allow_pickle,
    )


def _feature_settings(args: argparse.Namespace, manifest: Manifest) -> FeatureSettings:
    return FeatureSettings(
        n_frames=manifest.n_frames,
        interval=args.interval,
        keyframe_seed=args.keyframe_seed,
        n_timesteps=manifest.save_steps,
        attention_steps=int(manifest.save_steps * args.pnp_attn_t),
        feature_steps=int(manifest.save_steps * args.pnp_f_t),
        dtype=manifest.dtype,
        save_tokens=args.save_tokens,
    )


def _conditions(
    args: argparse.Namespace, checkpoint: Path
) -> tuple[ControlSettings | None, str | None]:
    """The inversion's ControlNet (with --sd_version ControlNet) and depth estimator, if any."""
    in_channels = load_unet_skeleton(checkpoint).config.in_channels
    if in_channels not in (4, 5):
        raise UserError(
            f"{checkpoint}: its UNet takes {in_channels} channels, expected 4, or 5 with depth; an "
            "inpainting or upscaling checkpoint cannot be inverted"
        )
    control = None
    if args.sd_version == "ControlNet":
        key = controlnet_key_for(args.sd_version, args.control, args.controlnet_key)
        check_controlnet_fits(checkpoint, key, args.allow_pickle)
        control = ControlSettings(
            args.control, key, args.controlnet_scale, args.canny_low, args.canny_high
        )
    if in_channels == 5 or (control is not None and control.kind == "depth"):
        single_model_folder(args.depth_model, "depth_model", args.allow_pickle)
        return control, args.depth_model
    return control, None


def is_made(inputs: PreprocessInputs, verify: bool = False) -> bool:
    """Whether the cache is there already, made with the same settings.

    Args:
        verify: compare all checksums.

    Raises:
        UserError: if it is there, made with others (named) or damaged.
    """
    if not inputs.folder.exists():
        return False
    found = open_cache(inputs.folder, lambda _: "run the same command with", verify).manifest
    difference = describe_difference(identity(found), identity(inputs.manifest))
    if difference:
        raise UserError(
            f"{inputs.folder}: made with other settings ({difference}); add --overwrite"
        )
    return True


def overwriting(inputs: PreprocessInputs) -> bool:
    """Whether an interrupted run with --overwrite made the cache anew, but for its features.

    The same command goes on with these, unless the cache is damaged since or of other settings.
    """
    if inputs.features is None or not (inputs.folder / OVERWRITING).is_file():
        return False
    try:
        return is_made(inputs, verify=True)
    except UserError as error:
        log.warning("%s", error)
        return False


def has_features(inputs: PreprocessInputs, verify: bool = False) -> bool:
    """Whether the finished cache has features that serve all that are asked for.

    If it has others, the log says that these will be replaced, and why.

    Args:
        verify: compare all checksums.

    Raises:
        UserError: if they are damaged.
    """
    found = find_features(open_cache(inputs.folder), "the same command")
    if found is None:
        return False
    if verify:
        found.verify()
    difference = found.settings.serve(inputs.features)
    if difference:
        log.info("%s is made anew: %s", found.folder, difference)
    return not difference


def check_disk(inputs: PreprocessInputs, made: bool) -> None:
    """Says how large the cache will be, and refuses to begin where the disk has no room for it.

    Args:
        made: whether all but the features is there already.

    Raises:
        UserError: saying what is needed and what is free.
    """
    manifest, unet = inputs.manifest, load_unet_skeleton(inputs.checkpoint)
    grid = manifest.height // VAE_FACTOR, manifest.width // VAE_FACTOR
    needed = 0
    if not made:
        needed = LATENT_BYTES * (len(manifest.timesteps) + 1) * manifest.n_frames * math.prod(grid)
        needed += inputs.clip.frames.nbytes  # of frames/, at most
        if manifest.depth_model is not None:
            needed += DEPTH_BYTES * manifest.n_frames * manifest.height * manifest.width
    option = "make some, or use --save_dir on another disk"
    if inputs.features is not None:
        features = feature_bytes(unet, grid, inputs.features)
        log.info(
            "source features: %s in %d files", size_text(features), inputs.features.n_timesteps
        )
        needed += features
        option += ", or --no_cache_features"
    # What an interrupted run left is gone on with, or makes room.
    needed -= unfinished_bytes(inputs.folder) + unfinished_bytes(inputs.folder / FEATURES)
    check_room(inputs.folder, needed, option)


def make_features(
    inputs: PreprocessInputs,
    batch_size: int | None,
    models: StableDiffusion | None = None,
    watch: Stopwatch | None = None,
) -> None:
    """Runs the source pass of edits and adds its features to the finished cache.

    Args: as of `make_cache`.
    """
    watch = watch or Stopwatch(inputs.device)
    with watch("load"):
        models = models or load_stable_diffusion(
            inputs.checkpoint, inputs.device, inputs.dtype, inputs.allow_pickle
        )
    cache = open_cache(inputs.folder)
    manifest, frames = cache.manifest, inputs.clip.frames
    denoiser = make_denoiser(
        models, frames, manifest.inversion_prompt, manifest.control, cache.depth(len(frames))
    )
    # The pass holds tokens of all keyframes too, so memory alone shall not decide.
    at_once = unet_batch_size(batch_size, denoiser, frames.shape[1:3], most=FEATURE_BATCH)
    what = inputs.timesteps.sampling, inputs.features
    write_features(cache, denoiser, *what, at_once, watch, inputs.team)


def make_cache(
    inputs: PreprocessInputs,
    batch_size: int | None,
    models: StableDiffusion | None = None,
    watch: Stopwatch | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Inverts the clip and writes its cache, the manifest last.

    Args:
        batch_size: frames evaluated at once; None: as many as memory holds.
        models: of `inputs.checkpoint`, on its device in its dtype; loaded where there are none.
        watch: what times the stages, by default one of its own.
        overwrite: mark the cache as one whose overwriting ends with its features.

    Returns:
        the manifest with the figures of the reconstruction.
    """
    watch = watch or Stopwatch(inputs.device)
    watch.add("read", inputs.read_seconds)
    with watch("load"):
        models = models or load_stable_diffusion(
            inputs.checkpoint, inputs.device, inputs.dtype, inputs.allow_pickle
        )
    work_on = {"format": FORMAT, **identity(inputs.manifest)}
    with resumable_folder(inputs.folder, work_on, inputs.team) as work:
        manifest = _CacheMaker(inputs, models, work, watch, batch_size).run()
        if overwrite and inputs.features is not None and work.writes:
            (work.folder / OVERWRITING).touch()
        return manifest


class _CacheMaker:
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
        self.team, self.share = inputs.team, inputs.team.share(len(self.frames))
        self.image_forwards = dict.fromkeys(COUNTED_STAGES, 0)  # of this process
        if work.state is not None and self.team.is_main:  # of all processes of an earlier run
            self.image_forwards.update(work.state.figures["image_forwards"])
            for stage, seconds in work.state.figures["seconds"].items():
                watch.add(stage, seconds)

    def run(self) -> Manifest:
        """Runs what is left of the stages; returns the manifest, which the main process wrote."""
        size = self.frames.shape[1:3]
        with self.watch("load"):
            self.vae_batch = vae_batch_size(self.batch_size, self.models, size)
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
            own = encode_frames(self.models, self.frames[self.share.own], self.vae_batch)
            decode_latents(self.models, own[:1])  # a VAE that fails shall do so now, not later
        clean = self.share.gather(own)
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
        own = {name: self.share.take(x) for name, x in state.tensors.items()}
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
                whole = {name: self.share.gather(x) for name, x in own.items()}
                self._save_latents(t, whole["latents"])
                self._save("inversion", whole, t, past=[t_past for t_past, _ in known])
        start = self.share.gather(start)
        self._save("reconstruction", {"latents": start}, timesteps.reconstruction[0])

    def _reconstruct(self) -> Tensor:
        """The clean latents (n, 4, h, w) that sampling from the inverted ones leads to."""
        timesteps, state = self.inputs.timesteps.reconstruction, self.work.state
        latents, t = state.tensors["latents"], state.figures["t"]
        if t == CLEAN:
            return latents
        own = self.share.take(latents)
        steps = sample(self.denoiser, own, timesteps, self.unet_batch, t, **self._own_frames)
        with closing(steps):
            for number, (t, own) in enumerate(self._timed("reconstruction", steps), start=1):
                if number % SAVE_EVERY == 0 or t == CLEAN:
                    latents = self.share.gather(own)
                    self._save("reconstruction", {"latents": latents}, t)
        return latents

    @property
    def _own_frames(self) -> dict[str, object]:
        return {"frames": self.share.numbers, "progress": self.team.is_main}

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
        made = {name: sum(self.team.of_all(n)) for name, n in self.image_forwards.items()}
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
            at_once = self.vae_batch * self.team.size
            for first in range(0, len(clean), at_once):
                part = slice(first, first + at_once)
                with self.watch("vae"):
                    how = self.vae_batch, self.team
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


def preprocess(
    args: argparse.Namespace,
    load: Loader | None = None,
    wait: bool = True,
    team: Team = ALONE,
) -> Path:
    """Makes the cache of one clip, goes on with it, or finds it made.

    Args:
        load: what loads the models, `load_stable_diffusion` if None.
        wait: for other processes that work on the same cache, or read it; else Busy is raised.
        team: the processes that make it together, each of which calls this.

    Returns:
        the cache's folder.

    Raises:
        UserError: see `parse_args`, `open_inputs` and `is_made`.
    """
    with team.together():
        inputs = open_inputs(args, team)
    with locked(inputs.folder, wait=wait, team=team):
        with team.together():
            made = done = False
            if team.is_main:
                recover(inputs.folder)
                recover(inputs.folder / FEATURES)
                again = args.overwrite and not overwriting(inputs)
                made = not again and is_made(inputs, args.verify)
                done = made and (inputs.features is None or has_features(inputs, args.verify))
                if not done:
                    check_disk(inputs, made)
        made, done = team.agree([made, done])
        if done:
            log.info("%s is there already, made with these settings", inputs.folder)
        else:
            watch = Stopwatch(inputs.device)
            with watch("load"):
                load = load or load_stable_diffusion
                models = load(inputs.checkpoint, inputs.device, inputs.dtype, inputs.allow_pickle)
            if not made:
                manifest = make_cache(inputs, args.batch_size, models, watch, args.overwrite)
                if team.is_main:
                    report_reconstruction(manifest)
            if inputs.features is not None:
                make_features(inputs, args.batch_size, models, watch)
        if team.is_main:
            (inputs.folder / OVERWRITING).unlink(missing_ok=True)
    if args.steps != DEFAULTS["steps"]:
        log.info("edits find this cache with --set n_inversion_steps=%d", args.steps)
    return inputs.folder


def report_reconstruction(manifest: Manifest) -> None:
    """Says how good the inversion is, and what to do where it is not."""
    log.info(
        "reconstruction: %.2f dB PSNR; the VAE alone, which a good inversion reaches: %.2f dB; "
        "the one against the other, %.2f dB, is what the inversion alone loses",
        manifest.psnr,
        manifest.vae_psnr,
        manifest.psnr_to_vae,
    )
    log.info(
        "image-forwards a frame: %s",
        ", ".join(f"{n / manifest.n_frames:.1f} {s}" for s, n in manifest.image_forwards.items()),
    )
    gap = manifest.vae_psnr - manifest.psnr
    if gap > WARN_GAP_DB:
        log.warning(
            "the reconstruction is %.1f dB below the VAE's: edits will be worse for it; try "
            "--inversion_iters %d%s, or an --inversion_prompt that says what the clip shows",
            gap,
            manifest.inversion_iters + 2,
            # Beside --fast that is an error, so all of it is spelled.
            f" --inversion_tol {manifest.inversion_tol:g} --steps {manifest.steps} "
            f"--save_steps {manifest.save_steps}"
            if manifest.inversion_tol
            else "",
        )


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns the cache's folder."""
    with start_team() as team:
        setup_logging(quiet=not team.is_main)
        with team.together():
            args = parse_args(argv)
        folder = preprocess(args, team=team)
        if team.is_main:
            print(f"cache: {folder}")
    return folder


if __name__ == "__main__":
    command_line(main)
