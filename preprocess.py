"""Inverts a clip with DDIM and writes the source cache that every edit of it reads.

python preprocess.py --data_path clip.mp4 --inversion_prompt "a woman running"
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from tokenflow.cache.build import CacheMaker
from tokenflow.cache.inputs import PreprocessInputs, open_inputs
from tokenflow.cache.options import PreprocessOptions, parse_args
from tokenflow.cache.source_cache import (
    FEATURES,
    FORMAT,
    Manifest,
    describe_difference,
    identity,
    open_cache,
)
from tokenflow.cache.source_features import feature_bytes, find_features
from tokenflow.cache.source_pass import build_features
from tokenflow.diffusion.batch_size import unet_batch_size
from tokenflow.diffusion.checkpoints import load_unet_skeleton
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.models import Loader, StableDiffusion, load_stable_diffusion
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup, start_process_group
from tokenflow.ops.profiling import Stopwatch
from tokenflow.storage.disk import check_free_space, format_bytes
from tokenflow.storage.work_dir import locked, recover, resumable_folder, unfinished_bytes
from util import UserError, command_line, setup_logging

log = logging.getLogger("tokenflow")

# A reconstruction this far below the VAE's own makes visibly worse edits.
WARN_GAP_DB = 3.0
VAE_FACTOR = 8  # pixels per latent cell along one side, of every Stable Diffusion
LATENT_BYTES = 4 * 4  # four channels of float32
DEPTH_BYTES = 4  # float32 a pixel
FEATURE_BATCH = 8  # frames at once in the source pass of edits, at most
OVERWRITING = ".overwriting"  # in a cache that --overwrite made anew, until its features are there


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
    difference = found.settings.mismatch(inputs.features)
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
            "source features: %s in %d files", format_bytes(features), inputs.features.n_timesteps
        )
        needed += features
        option += ", or --no_cache_features"
    # What an interrupted run left is gone on with, or makes room.
    needed -= unfinished_bytes(inputs.folder) + unfinished_bytes(inputs.folder / FEATURES)
    check_free_space(inputs.folder, needed, option)


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
    build_features(cache, denoiser, *what, at_once, watch, inputs.group)


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
    with resumable_folder(inputs.folder, work_on, inputs.group) as work:
        manifest = CacheMaker(inputs, models, work, watch, batch_size).run()
        if overwrite and inputs.features is not None and work.writes:
            (work.folder / OVERWRITING).touch()
        return manifest


def preprocess(
    args: PreprocessOptions,
    load: Loader | None = None,
    wait: bool = True,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Makes the cache of one clip, goes on with it, or finds it made.

    Args:
        load: what loads the models, `load_stable_diffusion` if None.
        wait: for other processes that work on the same cache, or read it; else Busy is raised.
        group: the processes that make it together, each of which calls this.

    Returns:
        the cache's folder.

    Raises:
        UserError: see `parse_args`, `open_inputs` and `is_made`.
    """
    with group.raise_together():
        inputs = open_inputs(args, group)
    settings = json.dumps(identity(inputs.manifest), sort_keys=True)
    group.assert_same(settings, "clip, model and settings")
    with locked(inputs.folder, wait=wait, group=group):
        with group.raise_together():
            made = done = False
            if group.is_main:
                recover(inputs.folder)
                recover(inputs.folder / FEATURES)
                again = args.overwrite and not overwriting(inputs)
                made = not again and is_made(inputs, args.verify)
                done = made and (inputs.features is None or has_features(inputs, args.verify))
                if not done:
                    check_disk(inputs, made)
        made, done = group.broadcast([made, done])
        if done:
            log.info("%s is there already, made with these settings", inputs.folder)
        else:
            watch = Stopwatch(inputs.device)
            with watch("load"):
                load = load or load_stable_diffusion
                models = load(inputs.checkpoint, inputs.device, inputs.dtype, inputs.allow_pickle)
            if not made:
                manifest = make_cache(inputs, args.batch_size, models, watch, args.overwrite)
                if group.is_main:
                    report_reconstruction(manifest)
            if inputs.features is not None:
                make_features(inputs, args.batch_size, models, watch)
        if group.is_main:
            (inputs.folder / OVERWRITING).unlink(missing_ok=True)
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
    with start_process_group() as group:
        setup_logging(quiet=not group.is_main)
        with group.raise_together():
            args = parse_args(argv)
        folder = preprocess(args, group=group)
        if group.is_main:
            print(f"cache: {folder}")
    return folder


if __name__ == "__main__":
    command_line(main)
