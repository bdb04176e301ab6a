"""One edit from its configuration to its result: `Technique.edit`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from torch import Tensor

from tokenflow.diffusion.models import Loader
from tokenflow.editing.config import EditConfig
from tokenflow.editing.inputs import EditInputs, open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.preview import Preview
from tokenflow.editing.results import (
    RUN_FILE,
    TECHNIQUES,
    is_finished,
    result_folder,
    result_settings,
)
from tokenflow.editing.simulation import fitted
from tokenflow.editing.techniques import Technique
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow.ops.profiling import Stopwatch, device_name, peak_memory_bytes, versions
from tokenflow.storage.audio import in_step
from tokenflow.storage.images import resized, save_frames
from tokenflow.storage.video import MAX_FPS_DENOMINATOR, save_video
from tokenflow.storage.work_dir import WorkDir, locked, recover, resumable_dir
from tokenflow.storage.yaml_files import save_yaml
from util import save_tensors, shown

log = logging.getLogger("tokenflow")


def edit(
    technique: Technique,
    config: EditConfig,
    overwrite: bool = False,
    load: Loader | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    watch: Stopwatch | None = None,
) -> Path:
    """Edits a preprocessed clip, unless a finished result exists.

    Args:
        overwrite: write it again in any case.
        load: loads the models; `load_stable_diffusion` if None.
        group: the processes that make the edit together, each of which calls this.
        watch: times the stages; a new one if None.

    Returns:
        the result's folder.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    with group.raise_together():
        inputs = open_edit_inputs(config, group)
        technique.check(inputs.config, inputs.checkpoint, inputs.cache.has_depth)
    with open_result(technique.name, inputs, overwrite) as (folder, work):
        if work is not None:
            log.info("%s", _plan(technique, inputs))
            inputs = fitted(technique, inputs)
            session = EditSession(inputs, watch=watch, load=load, work=work)
            with session.watch("edit"):  # warped noise takes a while
                plan = technique.plan(session)
            every, picture = config.preview_every, folder.with_name(f"{folder.name}-preview.png")
            if every is not None and group.is_main:
                log.info("previews until it ends: %s (every %d. step)", picture, every)
                session.preview = Preview(picture, every, session.models, config.preview_vae)
            latents = session.edit_latents(plan)
            frames = session.composite(session.decode(latents))
            save_result(technique.name, session, frames, latents)
            if session.preview is not None:
                picture.unlink(missing_ok=True)
    return folder


def _plan(technique: Technique, inputs: EditInputs) -> str:
    """What will be done, in one line."""
    config, manifest = inputs.config, inputs.cache.manifest
    return (
        f"{TECHNIQUES[technique.name]} edit of {manifest.clip}: {inputs.n_frames} of the cache's "
        f"{manifest.n_frames} frames of {manifest.width}x{manifest.height}, {config.n_timesteps} "
        f"steps on {inputs.device}: {shown(config.prompt)}"
    )


@contextmanager
def open_result(
    technique: str, inputs: EditInputs, overwrite: bool = False
) -> Iterator[tuple[Path, WorkDir | None]]:
    """Opens the result of an edit: to write it, to resume it, or to find it finished.

    A result is finished if the same settings made it from the same cache and it is not damaged.
    Another process that writes it is waited for.

    Args:
        technique: its name in the result's path.
        overwrite: write it again in any case.

    Yields:
        its folder, and where it is written until it is whole; None for a finished one.
    """
    folder, cache, group = result_folder(inputs, technique), inputs.cache, inputs.group
    with locked(folder, group=group):
        with group.raise_together():
            cache.check_unchanged()
            found = False
            if group.is_main:
                recover(folder)
                found = not overwrite and is_finished(folder, cache.sha256, inputs.config.verify)
        if group.broadcast(found):
            log.info("%s already exists with these settings; --overwrite computes it again", folder)
            yield folder, None
            return
        depends_on = {**result_settings(inputs), "cache_sha256": cache.sha256}
        with resumable_dir(folder, depends_on, group, own=()) as work:
            yield folder, work


def save_result(technique: str, session: EditSession, frames: np.ndarray, latents: Tensor) -> None:
    """Writes a session's result, run.yaml last; of several processes, the main one does.

    Frames and videos are resized to the output size, if any.

    Args:
        frames, latents: the edited clip, (n, H, W, 3) uint8 and (n, 4, h, w) float32.
    """
    inputs, cache, group, work = session.inputs, session.cache, session.group, session.work
    with group.raise_together():
        cache.check_unchanged()
    peak = max(group.all_gather(peak_memory_bytes(inputs.device)))
    if not group.is_main:
        return
    fps = session.config.fps
    fps = cache.fps if fps is None else Fraction(fps).limit_denominator(MAX_FPS_DENOMINATOR)
    audio = _audio(session, len(frames), fps)
    with session.watch("write"):
        size = inputs.output_size
        save_frames(work.folder / "frames", resized(frames, size))
        save_video(work.folder / "edited.mp4", resized(frames, size), fps, audio)
        pairs = zip(resized(session.frames, size), resized(frames, size), strict=True)
        both = (np.concatenate(pair, axis=1) for pair in pairs)  # one pair of frames at a time
        save_video(work.folder / "side_by_side.mp4", both, fps, audio)
        save_tensors(work.folder / "edited_latents.safetensors", {"latents": latents})
    save_yaml(work.folder / "config.yaml", session.config.model_dump())
    record = {
        "technique": technique,
        "cache": str(cache.folder),
        "cache_sha256": cache.sha256,
        "checkpoint": str(inputs.checkpoint),
        "checkpoint_revision": cache.manifest.model_revision,
        **inputs.adapters.record(),
        "n_frames": len(frames),
        "device": device_name(inputs.device),
        "processes": group.size,
        "dtype": session.models.dtype_name,
        "source_features": session.source_features,
        "flow_model": inputs.flow_model,
        "image_forwards": session.image_forwards,
        "seconds": session.watch.seconds,
        "versions": versions(),
        "peak_memory_bytes": peak,
        "files": work.record_files(),
        "complete": True,
    }
    save_yaml(work.folder / RUN_FILE, record)


def _audio(session: EditSession, n_frames: int, fps: Fraction) -> Path | None:
    """The cache's sound; None if there is none, or it is not wanted or not in step."""
    audio = session.cache.audio()
    if audio is None or not session.config.audio:
        return None
    seconds = n_frames / session.cache.fps
    return audio if in_step("fps", n_frames, fps, Fraction(0), seconds) else None
