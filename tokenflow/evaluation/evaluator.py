"""Scores edited videos by one protocol: loads models once, and measures a source once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from tokenflow.diffusion import optical_flow
from tokenflow.diffusion.models import resolve_device
from tokenflow.diffusion.vae import psnr
from tokenflow.editing.results import find_results
from tokenflow.evaluation import inputs, metrics, motion
from tokenflow.evaluation.options import Protocol
from tokenflow.evaluation.score_table import Row
from tokenflow.ops.profiling import versions
from util import UserError

log = logging.getLogger("tokenflow")


def check_subject(subject: inputs.Subject, protocol: Protocol) -> inputs.Subject:
    """Refuse what cannot be scored by a protocol, before a model is needed.

    Raises:
        UserError: it has no prompt, or its ground truth or masks are missing or do not fit.
    """
    row = subject.row
    if protocol.clip_model and not row.prompt:
        raise UserError(
            f"{f'{row.folder}/config.yaml' if row.folder else row.video}: the prompt is missing, "
            "which the CLIP score needs: give it by --prompt (a result's by its config.yaml), or "
            "leave CLIP out: --clip_model none"
        )
    if protocol.flow == "truth":
        inputs.find_truth(subject.source, protocol.truth)
    if protocol.masks is not None:
        inputs.find_masks(subject.source, protocol.masks)
    return subject


class Evaluator:
    """Scores edited videos by one protocol; models are loaded once, when first needed.

    What depends on the source alone (flow, embeddings) is kept for the next edit of the same
    frames: score the edits of one clip one after another.

    Raises:
        UserError: a model or its weights cannot be had.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.device = resolve_device(protocol.device)
        self._weights = self._weights_name = None
        if protocol.flow == "raft":
            self._weights = optical_flow.find_raft_weights(protocol.flow_weights)
            self._weights_name = optical_flow.raft_weights_name(self._weights)
        self._folders = {
            option: metrics.model_folder(key, option)
            for option in ("clip_model", "dino_model")
            if (key := getattr(protocol, option))
        }
        self._kept: SourceScores | None = None

    @cached_property
    def clip(self) -> metrics.ClipEmbedder:
        return metrics.ClipEmbedder(self._folders["clip_model"], self.device)

    @cached_property
    def dino(self) -> metrics.DinoKeys:
        return metrics.DinoKeys(self._folders["dino_model"], self.device)

    @cached_property
    def flow(self) -> optical_flow.FlowModel:
        return optical_flow.flow_model(self._weights, self.device)

    def score_result(self, folder: Path) -> Row:
        """Score a result's folder; errors as those of `open_result`."""
        return self.score(check_subject(inputs.open_result(folder), self.protocol))

    def score(self, subject: inputs.Subject) -> Row:
        """Measure a checked subject."""
        edited, protocol, row = subject.read(), self.protocol, subject.row
        if edited.shape[:3] != subject.source.shape:
            raise UserError(f"{row.video}: its frames changed while they were scored")
        source = self.scores_of(subject.source)
        frames, masks = source.frames, source.masks
        whole, inside, outside = metrics.ssim(edited, frames, masks)
        tested = f"forward-backward, alpha1 {optical_flow.ALPHA1}, alpha2 {optical_flow.ALPHA2}"
        measures = {
            "protocol": {
                "flow": protocol.flow,
                "flow_weights": self._weights_name,
                "occlusion": "ground truth" if protocol.flow == "truth" else tested,
                "resolution": f"{row.height}x{row.width}{subject.resized}",
                "mask": inputs.MASK_RULE if protocol.masks else None,
                "clip_model": protocol.clip_model,
                "dino_model": protocol.dino_model,
                "versions": versions() | {"torchvision": str(torchvision.__version__)},
            },
            "warp_error": metrics.warp_error(edited, source.motion),
            "sharpness": metrics.sharpness(edited),
            "psnr": psnr(edited, frames),
            "ssim": whole,
            "ssim_object": inside,
            "ssim_background": outside,
        }
        for part, where in {} if masks is None else {"object": masks, "background": ~masks}.items():
            measures[f"warp_error_{part}"] = metrics.warp_error(edited, source.motion, where)
            measures[f"sharpness_{part}"] = metrics.sharpness(edited, where)
            measures[f"psnr_{part}"] = psnr(edited, frames, where)
        if protocol.clip_model:
            embeddings, text = self.clip.embed_frames(edited), self.clip.embed_text(row.prompt)
            measures["clip_score"] = metrics.clip_score(embeddings, text)
            measures["clip_frame"] = metrics.clip_frame_consistency(embeddings)
            if row.source_prompt:
                texts = text, self.clip.embed_text(row.source_prompt)
                directional = metrics.clip_directional(embeddings, source.embeddings, *texts)
                measures["clip_directional"] = directional
        if protocol.dino_model:
            measures["dino_distance"] = metrics.structure_distance(self.dino(edited), source.keys)
        return row.model_copy(update=measures)

    def scores_of(self, source: inputs.Source) -> SourceScores:
        """The last source's if it has the same frames: its cache may be another model's."""
        frames, kept, protocol = source.read(), self._kept, self.protocol
        if kept is None or kept.source != source or not np.array_equal(kept.frames, frames):
            if protocol.flow == "truth":
                moved = inputs.read_truth(source, protocol.truth)
            else:
                moved = motion.motion_by(self.flow, frames)
            masks = inputs.read_masks(source, protocol.masks) if protocol.masks else None
            embeddings = self.clip.embed_frames(frames) if protocol.clip_model else None
            keys = self.dino(frames) if protocol.dino_model else None
            self._kept = SourceScores(source, frames, moved, masks, embeddings, keys)
        return self._kept


class SourceScores(NamedTuple):
    """What the scores of all edits of one source share."""

    source: inputs.Source
    frames: np.ndarray
    motion: motion.Motion
    masks: np.ndarray | None
    embeddings: Tensor | None
    keys: Tensor | None


def open_results(
    paths: Sequence[Path], protocol: Protocol, source_prompt: str | None = None
) -> tuple[list[inputs.Subject], list[str]]:
    """Find and check all results in some folders; edits of one source follow each other.

    Args:
        source_prompt: as in `open_result`.

    Returns:
        the results, and what is wrong with those that cannot be scored by the protocol.

    Raises:
        UserError: there are no results, or none can be scored.
    """
    subjects, errors = [], []
    finished, unfinished = find_results(paths)
    if unfinished:
        log.warning("left out %d unfinished results, as %s", len(unfinished), unfinished[0])
    for folder in finished:
        try:
            subject = inputs.open_result(folder, source_prompt)
            subjects.append(check_subject(subject, protocol))
        except UserError as error:
            errors.append(error)
    if not subjects:
        raise errors[0]
    for error in errors:
        log.error("%s", error)
    source_keys = ("clip", "path", "shape", "numbers")
    subjects.sort(key=attrgetter(*(f"source.{key}" for key in source_keys)))
    clips = dict.fromkeys(subject.source.clip for subject in subjects)
    if protocol.masks is not None and len(clips) > 1:
        for clip in clips:
            if not Path(protocol.masks, clip).is_dir():
                raise UserError(f"--masks: {protocol.masks}: holds no folder {clip}/ of masks")
    return subjects, [str(error) for error in errors]


def score_all(
    subjects: Sequence[inputs.Subject], evaluator: Evaluator
) -> tuple[list[Row], list[str]]:
    """Score edits one after another.

    Returns:
        the rows, and what is wrong with edits that could not be scored: one damaged frame must
        not lose hours of other results.
    """
    rows, errors = [], []
    for done, subject in enumerate(subjects, start=1):
        log.info("%d/%d: %s: %s", done, len(subjects), subject.row.clip, subject.row.method)
        try:
            rows.append(evaluator.score(subject))
        except (UserError, torch.OutOfMemoryError) as error:
            log.error("%s", error)
            errors.append(str(error))
    return rows, errors
