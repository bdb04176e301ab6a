"""Compare settings by the edits that they make, on held-out clips of the shapes world.

    python -m scripts.studies.edit_quality tune --json tune.json --markdown tune.md
    python -m scripts.studies.edit_quality report --rows PnP "PnP, released" --clips 10

The settings are the rows of edit_quality.yaml. Each is an edit of every clip, run as a batch
(scripts/batch) and scored as by evaluate.py: finished work is skipped. The tables have the means,
and the differences to the technique's first row, paired by clip, with bootstrap intervals.
Settings are chosen on the clips of `tune`; those of `report` are for what was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from scripts.batch.clip_list import VARIANTS, Batch, Job
from scripts.batch.engine import run_jobs
from scripts.shapes.clips import KINDS, edited_scene, length_of, scene_of, write_clips
from scripts.shapes.metrics import Judge, hue_of_object
from scripts.shapes.pictures import HELD_OUT
from scripts.shapes.world import render_clip
from scripts.table1 import table1
from tokenflow.cache.source_cache import FEATURES, MANIFEST
from tokenflow.editing.results import read_result
from tokenflow.evaluation.evaluator import Evaluator, Protocol
from tokenflow.evaluation.score_table import (
    COLUMNS,
    Column,
    Row,
    aligned,
    protocols,
    shown_interval,
)
from tokenflow.figures.drawing import picture_grid, png
from tokenflow.storage.images import load_frames
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.yaml_files import load_yaml
from util import ArgumentParser, UserError, at_least, check_writable, command_line, setup_logging

GRID = Path(__file__).with_name("edit_quality.yaml")
VAE = "VAE reconstruction"
LEAST_SHARE = 0.0015  # of a frame: an object that is hidden further has no colour
MEASURES = {name: COLUMNS[name] for name in ("warp_error", "warp_error_object",
            "warp_error_background", "clip_score", "clip_frame")} | {
    "psnr_kept": Column("PSNR kept", "dB", 1, "high"),
    "success": Column("success", "", 2, "high"),
    "sharpness_ratio_object": Column("sharpness object", "/VAE", 2, "high"),
    "sharpness_ratio_background": Column("background", "/VAE", 2, "high"),
    "start_std": Column("start std", "", 3, ""),
    "preprocess_forwards": Column("preprocess", "UNet/frame", 0, "low"),
    "edit_forwards": Column("edit", "UNet/frame", 0, "low"),
    "seconds_per_frame": COLUMNS["seconds_per_frame"],
}  # fmt: skip
COMPARED = tuple(MEASURES)[:9]


class Split(Model):
    """Clips of consecutive seeds."""

    seed: int = Field(ge=HELD_OUT)
    kinds: list[Literal[tuple(KINDS)]]


class Setting(Model):
    """An edit of every clip."""

    technique: Literal[tuple(VARIANTS)]
    # mask: "{masks}" stands for the clip's masks of its object; edits of a background have none.
    edit: dict[str, Any] = Field(default_factory=dict)
    preprocess: dict[str, Any] = Field(default_factory=dict)


class Grid(Model):
    """edit_quality.yaml."""

    splits: dict[Literal["tune", "report"], Split]
    rows: dict[str, Setting]


# ------------------------------------------------------------------------------------- the edits


def read_jobs(clips: Path, settings: Mapping[str, Setting]) -> tuple[Batch, Protocol]:
    """The jobs of these settings on a list of clips: settings that invert alike share caches."""
    groups: dict[str, list[str]] = {json.dumps({}): []}
    for name, setting in settings.items():
        groups.setdefault(json.dumps(setting.preprocess, sort_keys=True), []).append(name)
    batches = []
    for options, names in groups.items():
        variants = [
            table1.variant(name, settings[name].technique, settings[name].edit) for name in names
        ]
        own = json.loads(options)
        if not own:
            variants.append(table1.variant(VAE, "reconstruction", {}))
        place = "-".join(f"{key}_{value}" for key, value in own.items()) or "default"
        places = {
            "latents_path": str(clips.parent / "caches" / place),
            "output_path": str(clips.parent / "results"),
        }
        batch, protocol = table1.read_list(clips, variants, {**places, "preprocess": own})
        batches.append(batch)
    each = (_with_mask(job, protocol) for batch in batches for job in batch.jobs)
    jobs = [job for job in each if job is not None]
    jobs.sort(key=lambda job: batches[0].clips.index(job.clip))  # one clip after another
    return replace(batches[0], jobs=jobs), protocol


def _with_mask(job: Job, protocol: Protocol) -> Job | None:
    """The job with its clip's masks; none where the edit is of what they leave out."""
    if job.work.get("mask") != "{masks}":
        return job
    if KINDS[job.clip.partition("-")[0]][0] == "background":
        return None
    return replace(job, work=job.work | {"mask": str(Path(protocol.masks, job.clip))})


# ------------------------------------------------------------------------------------- the scores


class Scores:
    """Measures of rows that evaluate.py has none of: of what was asked for, and of the cost."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    @cached_property
    def judge(self) -> Judge:
        return Judge(Path(self.evaluator.protocol.clip_model), self.evaluator.device)

    def of(self, row: Row, vae: Row) -> dict[str, Any]:
        """A row's own measures and these; `vae` is the row of the clip's VAE reconstruction."""
        kind = row.clip.partition("-")[0]
        result = read_result(Path(row.folder))
        cache = result.cache(check_files=False)
        n, made = row.n_frames, sum(cache.manifest.image_forwards.values())
        features = cache.folder / FEATURES / MANIFEST
        if result.run["source_features"] == "cached":
            made += load_yaml(features)["image_forwards"]
        start = cache.latents(cache.manifest.timesteps[0], n)
        kept = row.psnr_object if KINDS[kind][0] == "background" else row.psnr_background
        return row.model_dump() | {
            "kind": kind,
            "psnr_kept": kept,
            "success": self.success(row.clip, load_frames(result.folder / "frames", n)),
            "sharpness_ratio_object": row.sharpness_object / vae.sharpness_object,
            "sharpness_ratio_background": row.sharpness_background / vae.sharpness_background,
            "start_std": float(start.std()),
            "preprocess_forwards": made / n,
            "edit_forwards": result.run["image_forwards"] / n,
        }

    def success(self, clip: str, frames: np.ndarray) -> float | None:
        """The share of frames (n, H, W, 3) with what was asked for, as KINDS names it.

        Colours are those of most pixels, in the object or outside; the judge names the fill.
        """
        kind, asked, masks = _truth(clip, frames.shape[1:3])
        attribute, found = KINDS[kind][0], []
        if attribute == "fill":
            found = [answer[0] == asked.objects[0].fill for answer in self.judge(frames)]
        else:
            inside = attribute == "color"
            wanted = asked.objects[0].color if inside else asked.background
            for frame, mask in zip(frames, masks[: len(frames)] == inside, strict=True):
                if mask.mean() >= LEAST_SHARE:
                    found.append(hue_of_object(frame, mask) == wanted)
        return float(np.mean(found)) if found else None


@lru_cache(maxsize=1)
def _truth(clip: str, size: tuple[int, int]) -> tuple[str, Any, np.ndarray]:
    """A clip's kind, its edited scene, and the masks (n, H, W) of its edited object."""
    kind, _, seed = clip.partition("-")
    scene = scene_of(kind, int(seed))
    masks = render_clip(scene, length_of(kind), size).masks == 1
    return kind, edited_scene(kind, scene), masks


# ------------------------------------------------------------------------------------- the tables


def means_table(scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of cells, headings first: each setting's means over its clips."""
    lines = [["method", "clips", *(column.heading for column in MEASURES.values())]]
    for name, own in _by(scores, "method").items():
        values = {key: [v for s in own if (v := s[key]) is not None] for key in MEASURES}
        shown = (c.shown(float(np.mean(values[k])) if values[k] else None)
                 for k, c in MEASURES.items())  # fmt: skip
        lines.append([name, str(len(own)), *shown])
    return lines


def differences_table(
    scores: Sequence[Mapping[str, Any]], settings: Mapping[str, Setting]
) -> list[list[str]]:
    """Differences to the technique's first setting, over the clips that both have."""
    lines = [["method", "less warp error", *(MEASURES[key].heading for key in COMPARED)]]
    found = {n: {s["clip"]: s for s in own} for n, own in _by(scores, "method").items()}
    for name, own in found.items():
        alike = [n for n in found if n in settings and name in settings
                 and settings[n].technique == settings[name].technique]  # fmt: skip
        if not alike or name == alike[0]:
            continue
        base = found[alike[0]]
        pairs = [(own[clip], base[clip]) for clip in own if clip in base]
        fewer = sum(a["warp_error"] < b["warp_error"] for a, b in pairs)
        cells = []
        for key in COMPARED:
            known = [a[key] - b[key] for a, b in pairs if None not in (a[key], b[key])]
            cells.append(shown_interval(MEASURES[key], known))
        lines.append([name, f"{fewer} of {len(pairs)}", *cells])
    return lines


def kinds_table(scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The mean warp error and success of each setting on each kind of clips."""
    kinds = _by(scores, "kind")
    heading = [f"{kind} ({len({s['clip'] for s in own})})" for kind, own in kinds.items()]
    lines = [["method", *heading]]
    for name in _by(scores, "method"):
        cells = []
        for own in kinds.values():
            errors = [s["warp_error"] for s in own if s["method"] == name]
            cells.append(MEASURES["warp_error"].shown(np.mean(errors) if errors else None))
        lines.append([name, *cells])
    return lines


def _by(scores: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for score in scores:
        found.setdefault(score[key], []).append(score)
    return found


def picture(scores: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of one clip's edits, a row each: the middle half of every second frame."""
    rows = {score["method"]: load_frames(Path(score["folder"]) / "frames") for score in scores}
    height, width = next(iter(rows.values())).shape[1:3]
    y, x = (slice(side // 4, side - side // 4) for side in (height, width))
    grid = picture_grid([list(frames[::2, y, x]) for frames in rows.values()], list(rows))
    return png(grid)


# ------------------------------------------------------------------------------------ the script


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the script; returns the scores.

    Raises:
        UserError: the input is wrong, or, after all else is done and written, rows are missing.
    """
    setup_logging()
    grid = parse(Grid, load_yaml(GRID), str(GRID))
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("split", choices=list(grid.splits), help="the clips")
    add("--rows", nargs="+", choices=list(grid.rows), default=list(grid.rows), metavar="NAME",
        help=f"some of {'; '.join(grid.rows)} (default: all)")  # fmt: skip
    add("--clips", type=at_least(1), metavar="N", help="only the first N of them")
    add("--folder", type=Path, default=Path("latents/quality"), help="for clips, caches, results")
    add("--jobs", type=at_least(1), metavar="N", help="edits at once, as scripts/table1.sh")
    add("--json", type=Path, metavar="FILE", help="write each clip's scores there")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there")
    add("--picture", type=Path, metavar="FILE", help="draw the first clip's edits there, a PNG")
    args = parser.parse_args(argv)
    for option in ("json", "markdown", "picture"):
        if path := getattr(args, option):
            check_report_path(path, f"--{option}")
    check_writable(args.folder, "--folder")
    split, folder = grid.splits[args.split], args.folder / args.split
    clips = folder / "clips.yaml"
    if not clips.exists():
        write_clips(folder, split.seed, len(split.kinds), split.kinds)
    settings = {name: grid.rows[name] for name in grid.rows if name in args.rows}
    batch, protocol = read_jobs(clips, settings)
    kept = batch.clips[: args.clips]
    batch = replace(batch, jobs=[job for job in batch.jobs if job.clip in kept])
    evaluator = Evaluator(protocol)
    log_folder = folder / "batch"
    rows = table1.score(batch, run_jobs(batch.jobs, log_folder, args.jobs), evaluator)
    vae, measure = {row.clip: row for row in rows if row.method == VAE}, Scores(evaluator)
    rows.sort(key=lambda row: [*settings, VAE].index(row.method))
    scores = [measure.of(row, vae[row.clip]) for row in rows if row.clip in vae]
    tables = [
        table for table in (means_table(scores), differences_table(scores, settings),
                            kinds_table(scores)) if len(table) > 1
    ]  # fmt: skip
    reports = [(args.json, json.dumps(scores, indent=1) + "\n")] if args.json else []
    if args.markdown:
        blocks = [aligned(table, "pipe") for table in tables] + protocols(rows)
        reports.append((args.markdown, "\n\n".join(blocks) + "\n"))
    if args.picture:
        reports.append((args.picture, picture([s for s in scores if s["clip"] == kept[0]])))
    write_reports("\n\n".join(map(aligned, tables)), reports)
    if missing := sum(job.variant is not None for job in batch.jobs) - len(scores):
        raise UserError(f"{missing} edits have no scores; see the logs in {log_folder}")
    return scores


if __name__ == "__main__":
    command_line(main)
