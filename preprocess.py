"""Inverts a clip with DDIM and writes the source cache that every edit of it reads.

python preprocess.py --data_path clip.mp4 --inversion_prompt "a woman running"
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    Denoiser,
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
from inversion import InversionTimesteps, inversion_timesteps, invert, reconstruct
from preprocess_options import DEFAULTS, parse_args
from run_info import Stopwatch, versions
from source_cache import (
    CLEAN_LATENTS,
    MANIFEST,
    Manifest,
    SourceCache,
    cache_folder,
    describe_difference,
    finish_cache,
    identity,
    open_cache,
    read_manifest,
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
    replacing_folder,
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


@dataclass(frozen=True)
class PreprocessInputs:
    """A checked command line with what it refers to.

    Attributes:
        manifest: the cache's, but for the figures of its making.
        folder: the cache's.
        features: what the cached features shall be made for, if there shall be any.
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


@dataclass(frozen=True)
class BatchSizes:
    """Images at once for the UNet and for the VAE."""

    unet: int
    vae: int


def open_inputs(args: argparse.Namespace) -> PreprocessInputs:
    """Reads the clip, and checks all that can go wrong before a model is loaded.

    Raises:
        UserError: naming what is missing or does not fit, and what mends it.
    """
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    source = resolve_clip(args.data_path)
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
    checkpoint = checkpoint_folder(model_key_for(args.sd_version, args.model_key))
    schedule = NoiseSchedule.of_checkpoint(checkpoint)
    timesteps = inversion_timesteps(schedule, args.steps, args.save_steps, args.recon_steps)
    control, depth_model = _conditions(args, checkpoint)
    n_frames, height, width, _ = clip.frames.shape
    manifest = Manifest(
        clip=clip_name(source),
        source_name=source.name,
        source_sha256=source_sha256(source),
        frame_start=args.frame_start,
        frame_stride=args.frame_stride,
        n_frames=n_frames,
        frames_asked=args.n_frames,
        height=height,
        width=width,
        fit=args.fit,
        fps=str(clip.fps),
        sd_version=args.sd_version,
        model_key=model_key_for(args.sd_version, args.model_key),
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
        check_controlnet_fits(checkpoint, key)
        control = ControlSettings(
            args.control, key, args.controlnet_scale, args.canny_low, args.canny_high
        )
    if in_channels == 5 or (control is not None and control.kind == "depth"):
        single_model_folder(args.depth_model, "depth_model")
        return control, args.depth_model
    return control, None


def is_made(inputs: PreprocessInputs) -> bool:
    """Whether the cache is there already, made with the same settings.

    Raises:
        UserError: if it is there, made with others (named) or damaged.
    """
    if not (inputs.folder / MANIFEST).is_file():
        return False
    found = open_cache(inputs.folder).manifest
    difference = describe_difference(identity(found), identity(inputs.manifest))
    if difference:
        raise UserError(
            f"{inputs.folder}: made with other settings ({difference}); add --overwrite"
        )
    return True


def has_features(inputs: PreprocessInputs) -> bool:
    """Whether the finished cache has features that serve all that are asked for.

    If it has others, the log says that these will be replaced, and why.
    """
    found = find_features(SourceCache(inputs.folder, read_manifest(inputs.folder)))
    if found is None:
        return False
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
        models = models or load_stable_diffusion(inputs.checkpoint, inputs.device, inputs.dtype)
    cache = SourceCache(inputs.folder, read_manifest(inputs.folder))
    manifest, frames = cache.manifest, inputs.clip.frames
    denoiser = make_denoiser(
        models, frames, manifest.inversion_prompt, manifest.control, cache.depth(len(frames))
    )
    # The pass holds tokens of all keyframes too, so memory alone shall not decide.
    at_once = unet_batch_size(batch_size, denoiser, frames.shape[1:3], most=FEATURE_BATCH)
    write_features(cache, denoiser, inputs.timesteps.sampling, inputs.features, at_once, watch)


def make_cache(
    inputs: PreprocessInputs,
    batch_size: int | None,
    models: StableDiffusion | None = None,
    watch: Stopwatch | None = None,
) -> Manifest:
    """Inverts the clip and writes its cache, the manifest last.

    Args:
        batch_size: frames evaluated at once; None: as many as memory holds.
        models: of `inputs.checkpoint`, on its device in its dtype; loaded where there are none.
        watch: what times the stages, by default one of its own.

    Returns:
        the manifest with the figures of the reconstruction.
    """
    clip, manifest = inputs.clip, inputs.manifest
    watch = watch or Stopwatch(inputs.device)
    watch.add("read", inputs.read_seconds)
    with watch("load"):
        models = models or load_stable_diffusion(inputs.checkpoint, inputs.device, inputs.dtype)
    depth = None
    if manifest.depth_model is not None:
        with watch("depth"):
            batch = min(batch_size or DEPTH_BATCH, DEPTH_BATCH)
            depth = estimate_depth(clip.frames, manifest.depth_model, inputs.device, batch)
    denoiser = make_denoiser(
        models, clip.frames, manifest.inversion_prompt, manifest.control, depth
    )
    size = clip.frames.shape[1:3]
    with watch("load"):
        batches = BatchSizes(
            unet_batch_size(batch_size, denoiser, size), vae_batch_size(batch_size, models, size)
        )

    with replacing_folder(inputs.folder) as partial:
        return _fill_cache(partial, inputs, denoiser, depth, batches, watch)


def _fill_cache(
    folder: Path,
    inputs: PreprocessInputs,
    denoiser: Denoiser,
    depth: Tensor | None,
    batches: BatchSizes,
    watch: Stopwatch,
) -> Manifest:
    clip, timesteps, manifest = inputs.clip, inputs.timesteps, inputs.manifest
    image_forwards = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        before = denoiser.image_forwards
        with watch(name):
            yield
        image_forwards[name] = denoiser.image_forwards - before

    save_source(folder, clip.frames, manifest.inversion_prompt, depth)
    with watch("vae"):
        clean = encode_frames(denoiser.models, clip.frames, batches.vae)
        decode_latents(denoiser.models, clean[:1])  # a VAE that fails shall do so now, not later
    save_latents(folder, CLEAN_LATENTS, clean)
    with stage("inversion"):
        how = manifest.inversion_iters, manifest.inversion_tol, batches.unet
        for t, latents in invert(denoiser, clean, timesteps.inversion, *how):
            if t in timesteps.saved:
                save_latents(folder, t, latents)
            if t == timesteps.reconstruction[0]:
                start = latents
    with stage("reconstruction"):
        latents = reconstruct(denoiser, start, timesteps.reconstruction, batches.unet)
    scores = _save_reconstruction(folder, inputs, denoiser.models, clean, latents, batches, watch)
    return finish_cache(
        folder,
        manifest,
        **scores,
        seconds=watch.seconds,
        image_forwards=image_forwards,
        versions=versions(),
    )


def _save_reconstruction(
    folder: Path,
    inputs: PreprocessInputs,
    models: StableDiffusion,
    clean: Tensor,
    latents: Tensor,
    batches: BatchSizes,
    watch: Stopwatch,
) -> dict[str, float]:
    """Decodes the reconstruction and the clean latents in step, and writes inverted.mp4.

    Args:
        clean, latents: (n, 4, h, w) of the clip and of its reconstruction.

    Returns:
        the three PSNRs of the manifest; no more than a chunk of each decoding is held.
    """
    pairs = {
        "psnr": SquaredError(),  # reconstruction and frames
        "vae_psnr": SquaredError(),  # the VAE's decoding and frames
        "psnr_to_vae": SquaredError(),  # reconstruction and the VAE's decoding
    }

    def decoded() -> Iterator[np.ndarray]:
        first = 0
        while first < len(clean):
            part = slice(first, first + batches.vae)
            frames = inputs.clip.frames[part]
            with watch("vae"):
                bound = decode_latents(models, clean[part], batches.vae)
                found = decode_latents(models, latents[part], batches.vae)
            pairs["psnr"].add(found, frames)
            pairs["vae_psnr"].add(bound, frames)
            pairs["psnr_to_vae"].add(found, bound)
            yield from found
            first += batches.vae

    save_video(folder / "inverted.mp4", decoded(), inputs.clip.fps)
    return {name: round(error.psnr, 3) for name, error in pairs.items()}


def preprocess(args: argparse.Namespace) -> Path:
    """Makes the cache of one clip, or finds it made.

    Returns:
        the cache's folder.

    Raises:
        UserError: see `parse_args`, `open_inputs` and `is_made`.
    """
    inputs = open_inputs(args)
    made = not args.overwrite and is_made(inputs)
    if made and (inputs.features is None or has_features(inputs)):
        log.info("%s is there already, made with these settings", inputs.folder)
    else:
        check_disk(inputs, made)
        watch = Stopwatch(inputs.device)
        with watch("load"):
            models = load_stable_diffusion(inputs.checkpoint, inputs.device, inputs.dtype)
        if not made:
            report_reconstruction(make_cache(inputs, args.batch_size, models, watch))
        if inputs.features is not None:
            make_features(inputs, args.batch_size, models, watch)
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
    setup_logging()
    folder = preprocess(parse_args(argv))
    print(f"cache: {folder}")
    return folder


if __name__ == "__main__":
    command_line(main)
