"""Scores edited videos: warp error, CLIP, PSNR, SSIM, structure and cost, each with its protocol.

python evaluate.py tokenflow-results --json scores.json
python evaluate.py --source clip.mp4 --edited other.mp4 --prompt "a marble sculpture of a wolf"
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from tokenflow.cache.source_cache import SourceCache
from tokenflow.diffusion.models import resolve_device
from tokenflow.evaluation.inputs import (
    MASK_RULE,
    Source,
    Subject,
    find_masks,
    find_results,
    find_truth,
    open_result,
    open_video,
    read_masks,
    read_truth,
)
from tokenflow.evaluation.metrics import (
    ClipEmbedder,
    DinoKeys,
    clip_directional,
    clip_frame_consistency,
    clip_score,
    model_folder,
    psnr,
    ssim,
    structure_distance,
    warp_error,
)
from tokenflow.evaluation.motion import (
    ALPHA1,
    ALPHA2,
    FlowModel,
    Motion,
    find_raft_weights,
    flow_model,
    motion_by,
    raft_weights_name,
)
from tokenflow.evaluation.score_table import FORMATS, Row, text_table
from tokenflow.ops.profiling import versions
from util import (
    ArgumentParser,
    UserError,
    check_report_path,
    command_line,
    setup_logging,
    write_reports,
)

log = logging.getLogger("tokenflow")

FLOWS = ("raft", "dis", "truth")
CLIP_MODEL = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Protocol:
    """How results are measured.

    Attributes:
        flow: "raft", "dis" or "truth".
        flow_weights: a safetensors file of RAFT's; None: torchvision's own.
        truth: the file, or folder of files, of true motion; None: beside the clip.
        masks: the folder of the clip's masks, or one with a folder of them for each clip.
        clip_model, dino_model: hub id or folder; None: not measured.
        device: auto, cpu, cuda or cuda:N.
    """

    flow: str = "raft"
    flow_weights: Path | None = None
    truth: Path | None = None
    masks: Path | None = None
    clip_model: str | None = CLIP_MODEL
    dino_model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.flow not in FLOWS:
            raise UserError(f"--flow: expected one of {', '.join(FLOWS)}; got {self.flow!r}")
        if self.flow_weights is not None and self.flow != "raft":
            raise UserError("--flow_weights: goes with --flow raft only")
        if self.truth is not None and self.flow != "truth":
            raise UserError("--truth: goes with --flow truth only")


def check_subject(subject: Subject, protocol: Protocol) -> Subject:
    """Refuse what cannot be scored by a protocol, before a model is needed.

    Raises:
        UserError: it has no prompt, or its ground truth or masks are missing or do not fit.
    """
    where = subject.folder / "config.yaml" if subject.folder else subject.video
    if protocol.clip_model and not subject.prompt:
        raise UserError(
            f"{where}: the prompt is missing, which the CLIP score needs: give it by --prompt "
            "(a result's by its config.yaml), or leave CLIP out: --clip_model none"
        )
    if protocol.flow == "truth":
        find_truth(subject.source, protocol.truth)
    if protocol.masks is not None:
        find_masks(subject.source, protocol.masks)
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
        self._weights: Path | None = None
        if protocol.flow == "raft":
            self._weights = find_raft_weights(protocol.flow_weights)
        self._folders = {
            option: model_folder(key, option)
            for option in ("clip_model", "dino_model")
            if (key := getattr(protocol, option))
        }
        self._caches: dict[Path, SourceCache] = {}
        self._source: _SourceScores | None = None

    @cached_property
    def clip(self) -> ClipEmbedder:
        return ClipEmbedder(self._folders["clip_model"], self.device)

    @cached_property
    def dino(self) -> DinoKeys:
        return DinoKeys(self._folders["dino_model"], self.device)

    @cached_property
    def flow(self) -> FlowModel:
        return flow_model(self.protocol.flow, self.protocol.flow_weights, self.device)

    @cached_property
    def _weights_name(self) -> str | None:
        return raft_weights_name(self._weights) if self._weights else None

    def score_result(self, folder: Path, source_prompt: str | None = None) -> Row:
        """Score a result's folder; arguments and errors as those of `open_result`."""
        subject = open_result(folder, self._caches, source_prompt)
        return self.score(check_subject(subject, self.protocol))

    def score_video(self, source: Path, edited: Path, **options: object) -> Row:
        """Score any edited video; arguments and errors as those of `open_video`."""
        return self.score(check_subject(open_video(source, edited, **options), self.protocol))

    def score(self, subject: Subject) -> Row:
        """Measure a checked subject."""
        edited = subject.read()
        if edited.shape[:3] != subject.source.shape:
            raise UserError(f"{subject.video}: its frames changed while they were scored")
        if self._source is None or not self._source.is_of(subject.source):
            self._source = _SourceScores(self, subject.source)
        source = self._source
        n_frames, height, width = subject.source.shape
        ssim_all, ssim_object, ssim_background = ssim(edited, source.frames, source.masks)
        masks = source.masks
        return Row(
            method=subject.method,
            clip=subject.source.clip,
            prompt=subject.prompt,
            source_prompt=subject.source_prompt,
            folder=str(subject.folder) if subject.folder else None,
            video=str(subject.video),
            n_frames=n_frames,
            height=height,
            width=width,
            fps=subject.fps,
            protocol=self._protocol_record(height, width),
            warp_error=warp_error(edited, source.motion),
            **self._clip_scores(edited, subject, source),
            psnr=psnr(edited, source.frames),
            ssim=ssim_all,
            psnr_background=None if masks is None else psnr(edited, source.frames, ~masks),
            ssim_background=ssim_background,
            psnr_object=None if masks is None else psnr(edited, source.frames, masks),
            ssim_object=ssim_object,
            dino_distance=self._dino_distance(edited, source),
            **subject.cost,
        )

    def _clip_scores(
        self, edited: np.ndarray, subject: Subject, source: _SourceScores
    ) -> dict[str, float | None]:
        if not self.protocol.clip_model:
            return {}
        frames, text = self.clip.embed_frames(edited), self.clip.embed_text(subject.prompt)
        direction = None
        if subject.source_prompt:
            source_text = self.clip.embed_text(subject.source_prompt)
            direction = clip_directional(frames, source.embeddings, text, source_text)
        return {
            "clip_score": clip_score(frames, text),
            "clip_frame": clip_frame_consistency(frames),
            "clip_directional": direction,
        }

    def _dino_distance(self, edited: np.ndarray, source: _SourceScores) -> float | None:
        if not self.protocol.dino_model:
            return None
        return structure_distance(self.dino(edited), source.keys)

    def _protocol_record(self, height: int, width: int) -> dict[str, object]:
        tested = f"forward-backward, alpha1 {ALPHA1}, alpha2 {ALPHA2}"
        return {
            "flow": self.protocol.flow,
            "flow_weights": self._weights_name,
            "occlusion": "ground truth" if self.protocol.flow == "truth" else tested,
            "resolution": f"{height}x{width}",
            "mask": MASK_RULE if self.protocol.masks else None,
            "clip_model": self.protocol.clip_model,
            "dino_model": self.protocol.dino_model,
            "versions": versions() | {"torchvision": str(torchvision.__version__)},
        }


class _SourceScores:
    """What the scores of all edits of one source share, computed when first asked for."""

    def __init__(self, evaluator: Evaluator, source: Source) -> None:
        self.evaluator, self.source = evaluator, source
        self.frames = source.read()

    def is_of(self, source: Source) -> bool:
        """Whether another source has the same frames; its cache may be another model's."""
        facts = [(s.path, s.shape, s.start, s.stride, s.fit) for s in (self.source, source)]
        return facts[0] == facts[1] and np.array_equal(self.frames, source.read())

    @cached_property
    def motion(self) -> Motion:
        protocol = self.evaluator.protocol
        if protocol.flow == "truth":
            return read_truth(self.source, find_truth(self.source, protocol.truth))
        return motion_by(self.evaluator.flow, self.frames)

    @cached_property
    def masks(self) -> np.ndarray | None:
        folder = self.evaluator.protocol.masks
        return None if folder is None else read_masks(self.source, find_masks(self.source, folder))

    @cached_property
    def embeddings(self) -> Tensor:
        return self.evaluator.clip.embed_frames(self.frames)

    @cached_property
    def keys(self) -> Tensor:
        return self.evaluator.dino(self.frames)


# ---------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UserError: an option is unknown, out of range, or does not go with the others.
    """
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="PATH", help="a result, or a folder of results")
    video = parser.add_argument_group("or any other program's video")
    other = [
        video.add_argument("--source", type=Path, help="the clip: video, GIF or folder of images"),
        video.add_argument("--edited", type=Path, help="the edited video, of as many frames"),
        video.add_argument("--prompt", help="what the edited video shall show"),
        video.add_argument("--method", help="what to call it (default: the edited video's name)"),
        video.add_argument("--n_frames", type=int, help="frames of both to score (default: all)"),
        video.add_argument("--start", type=int, help="first frame of the source (default: 0)"),
        video.add_argument("--H", type=int, help="height to resize both to (default: their own)"),
        video.add_argument("--W", type=int, help="width to resize both to (default: their own)"),
    ]
    add("--source_prompt", help="what the source shows, where no inversion prompt says it")
    add("--flow", default="raft", help="of the source: raft, dis or truth (default: raft)")
    add(
        "--flow_weights", type=Path, metavar="FILE", help="RAFT's, safetensors (default: the hub's)"
    )
    add("--truth", type=Path, metavar="FILE|FOLDER", help="true motion (default: beside the clip)")
    add("--masks", type=Path, metavar="FOLDER", help="of PNG, or with one of them for each clip")
    add("--clip_model", default=CLIP_MODEL, help=f"hub id, folder or none (default: {CLIP_MODEL})")
    add("--dino_model", default="none", help="a ViT: hub id, folder or none (default: none)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    for kind in FORMATS:
        add(f"--{kind}", type=Path, metavar="FILE", help="write the rows there too; -: to stdout")
    args = parser.parse_args(argv)
    _check_args(args, [action.dest for action in other])
    return args


def _check_args(args: argparse.Namespace, other: Sequence[str]) -> None:
    given = [name for name in other if getattr(args, name) is not None]
    if args.results and given:
        raise UserError(f"--{given[0]}: goes with --source, not with folders of results")
    if not args.results and (args.source is None or args.edited is None):
        missing = "--edited" if args.source else "--source"
        about = f"{missing}: is missing; " if given else ""
        raise UserError(f"{about}name results, or any video by --source, --edited and --prompt")
    for name, low in (("n_frames", 1), ("start", 0), ("H", 8), ("W", 8)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name}: expected at least {low}, got {value}")
    if (args.H is None) != (args.W is None):
        raise UserError("--H and --W: give both or neither")
    for kind in FORMATS:
        if path := getattr(args, kind):
            check_report_path(path, f"--{kind}")


def read_protocol(args: argparse.Namespace) -> Protocol:
    """The protocol that the command line asks for."""
    return Protocol(
        flow=args.flow,
        flow_weights=args.flow_weights,
        truth=args.truth,
        masks=args.masks,
        clip_model=None if args.clip_model == "none" else args.clip_model,
        dino_model=None if args.dino_model == "none" else args.dino_model,
        device=args.device,
    )


def open_subjects(args: argparse.Namespace, protocol: Protocol) -> list[Subject]:
    """Find and check all that the command line names."""
    if args.source is not None:
        subject = open_video(
            args.source,
            args.edited,
            prompt=args.prompt,
            source_prompt=args.source_prompt,
            method=args.method,
            n_frames=args.n_frames,
            start=args.start or 0,
            size=(args.H, args.W) if args.H else None,
        )
        return [check_subject(subject, protocol)]
    folders = [folder for path in args.results for folder in find_results(path)]
    # The same folder may be named twice, as itself and by one that holds it.
    folders = list({os.path.realpath(folder): folder for folder in folders}.values())
    caches: dict[Path, SourceCache] = {}
    subjects = [open_result(folder, caches, args.source_prompt) for folder in folders]
    clips = sorted({subject.source.clip for subject in subjects})
    if protocol.masks is not None and len(clips) > 1:
        flat = [clip for clip in clips if not (protocol.masks / clip).is_dir()]
        if flat:
            raise UserError(f"--masks: {protocol.masks}: holds no folder {flat[0]}/ of masks")
    return [check_subject(subject, protocol) for subject in subjects]


def score_all(subjects: Sequence[Subject], evaluator: Evaluator) -> tuple[list[Row], list[str]]:
    """Score edits of one source after another.

    Returns:
        the rows in the subjects' order, and what is wrong with those that could not be scored:
        hours of others shall not be lost to one damaged frame.
    """
    order = sorted(range(len(subjects)), key=lambda i: _source_key(subjects[i].source))
    rows: dict[int, Row] = {}
    errors = []
    for done, i in enumerate(order, start=1):
        subject = subjects[i]
        log.info("%d/%d: %s: %s", done, len(order), subject.source.clip, subject.method)
        try:
            rows[i] = evaluator.score(subject)
        except (UserError, torch.OutOfMemoryError) as error:
            log.error("%s", error)
            errors.append(str(error))
    return [rows[i] for i in sorted(rows)], errors


def _source_key(source: Source) -> tuple:
    """Brings the edits of one source together."""
    return source.clip, str(source.path), source.shape, source.start, source.stride


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the script; returns the rows."""
    setup_logging()
    args = parse_args(argv)
    protocol = read_protocol(args)
    subjects = open_subjects(args, protocol)
    rows, errors = score_all(subjects, Evaluator(protocol))
    if rows:
        write_reports(
            text_table(rows),
            [(path, show(rows)) for kind, show in FORMATS.items() if (path := getattr(args, kind))],
        )
    if errors:
        raise UserError(f"{len(errors)} of {len(subjects)} could not be scored: {errors[0]}")
    return rows


if __name__ == "__main__":
    command_line(main)
