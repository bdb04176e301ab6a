"""FiVE-Bench (Li et al., ICCV 2025): edits its clips, for its own scorer and for ours.

    python -m scripts.table1.five_bench edit data/FiVE
    python -m scripts.table1.five_bench score data/FiVE --csv tokenflow-results/five_bench/scores

The folder is the benchmark's: edit_prompt/edit1_FiVE.json ... edit6_FiVE.json, and for each clip
images/<clip>/ and bmasks/<clip>/. `edit` inverts each clip once, with the first of its source
prompts, edits it as configs/five_bench.yaml says (a batch: finished work is skipped), and copies
the frames to <output_path>/TokenFlow/<clip>/<edit>/img_ode, where the benchmark's scorer looks
for them (its root_tgt_video_folder is output_path). `score` measures them by the definitions of
that scorer and writes its CSV files; LPIPS, NIQE, motion fidelity and FiVE-Acc are the scorer's.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field
from transformers import CLIPTokenizer

from scripts.batch.clip_list import Batch, ClipList, read_batch
from scripts.batch.engine import FAILED, Outcome, run_jobs
from tokenflow.cache.options import default
from tokenflow.diffusion.checkpoints import checkpoint_folder
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import resolve_device
from tokenflow.evaluation import five_bench, metrics
from tokenflow.evaluation.score_table import aligned
from tokenflow.storage.images import folder_images, load_frames, read_masks
from tokenflow.storage.reports import write_report
from tokenflow.storage.schema import Model, parse
from tokenflow.storage.video import read_clip
from tokenflow.storage.work_dir import atomic_dir
from tokenflow.storage.yaml_files import load_yaml
from util import (
    ArgumentParser,
    MissingFileError,
    PartialFailure,
    UserError,
    at_least,
    check_writable,
    command_line,
    setup_logging,
)

log = logging.getLogger("tokenflow")

LIST = Path("configs/five_bench.yaml")
KINDS = tuple("123456")  # of edits, each with a file of prompts
METHOD, FRAMES = "TokenFlow", "img_ode"  # folders where the scorer looks for frames
SCORER_METHOD = f"1_{METHOD}"  # the method's name in its files
_FOLDER = r"[^/\\\x00]*[^/\\\x00.][^/\\\x00]*"  # one that is within its folder


class Entry(Model, extra="ignore"):
    """An edit, as a file of prompts describes it."""

    video_name: str = Field(pattern=f"^{_FOLDER}$")
    save_dir: str = Field(pattern=f"^{_FOLDER}$")
    editing_type_id: int | str
    source_prompt: str
    target_prompt: str
    negative_prompt: str = ""


class Edit(NamedTuple):
    """An edit, and the kind and number that it has in its file."""

    kind: str
    number: int
    folder: str  # of its frames, within that of its clip
    entry: Entry


def read_edits(data: Path, kinds: Sequence[str]) -> list[Edit]:
    """All edits of some kinds, in the order of the files; prompts without their [brackets].

    Raises:
        UserError: a file is missing or is not as the benchmark's are.
    """
    edits = []
    for kind in kinds:
        path = data / "edit_prompt" / f"edit{kind}_FiVE.json"
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file; expected the benchmark's data folder")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(found, list):
            raise UserError(f"{path}: expected a list of edits")
        for number, keys in enumerate(found):
            where = f"{path}: number {number + 1}"
            entry = parse(Entry, keys, where)
            plain = {
                key: re.sub(r"[\[\]]", "", getattr(entry, key))
                for key in ("source_prompt", "target_prompt")
            }
            folder = scorer_folder(entry, where)
            edits.append(Edit(kind, number, folder, entry.model_copy(update=plain)))
    return edits


def scorer_folder(entry: Entry, where: str) -> str:
    """Where the benchmark's scorer looks for an edit: not in save_dir, but in one as long.

    Args:
        entry: with the brackets of its prompts.
        where: names it, for errors.
    """
    folder = f"{entry.editing_type_id}_{entry.target_prompt[: len(entry.save_dir) - 2]}"
    if not re.fullmatch(_FOLDER, folder):
        raise UserError(f"{where}: target_prompt: {folder!r} cannot be a folder's name")
    return folder


# ------------------------------------------------------------------------------------------ edits


def cut_prompts(path: Path, edits: Sequence[Edit]) -> list[Edit]:
    """The edits with only the words of each prompt that the list's text encoder reads at once.

    Args:
        path: a list of clips, as for `read_list`.
    """
    given = parse(ClipList, load_yaml(path), str(path))
    settings = given.settings | given.pnp
    version = str(settings.get("sd_version", default("sd_version")))
    if version not in MODELS:
        raise UserError(f"{path}: settings: sd_version: expected one of {', '.join(MODELS)}")
    checkpoint = checkpoint_folder(settings.get("model_key") or MODELS[version])
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
    names = ("source_prompt", "target_prompt", "negative_prompt")

    def cut(text: str) -> str:
        words = text.split()
        while len(tokenizer(" ".join(words), verbose=False).input_ids) > tokenizer.model_max_length:
            words.pop()
        return " ".join(words)

    return [
        edit._replace(
            entry=edit.entry.model_copy(
                update={name: cut(getattr(edit.entry, name)) for name in names}
            )
        )
        for edit in edits
    ]


def read_list(path: Path, data: Path, edits: Sequence[Edit]) -> Batch:
    """The jobs of these edits.

    Args:
        path: the settings: a list of clips (configs/davis.yaml) without clips.
        data: the benchmark's folder.
    """
    clips: dict[str, dict] = {}
    own: dict[tuple[str, str], dict[str, str]] = {}
    for edit in edits:
        entry = edit.entry
        name, prompt = entry.video_name, entry.target_prompt
        first = {"inversion_prompt": entry.source_prompt, "prompts": []}
        clip = clips.setdefault(name, {"data_path": str(data / "images" / name), **first})
        negative = {"negative_prompt": entry.negative_prompt}
        if (name, prompt) not in own:
            clip["prompts"].append(prompt)
        elif own[name, prompt] != negative:
            raise UserError(
                f"{name}: {prompt!r:.60}: edits of kind {edit.kind} and of another have different "
                "negative prompts; make them apart, with --kinds and another output_path"
            )
        own[name, prompt] = negative
    batch = read_batch(path, {"clips": list(clips.values()), "techniques": ["pnp"]})
    jobs = [
        replace(job, work=job.work | own[job.clip, job.work["prompt"]]) if job.variant else job
        for job in batch.jobs
    ]
    return replace(batch, jobs=jobs)


def lay_out(
    batch: Batch, edits: Sequence[Edit], outcomes: Mapping[str, Outcome]
) -> tuple[int, list[str]]:
    """Copies the frames of all results to where the benchmark's scorer looks for them.

    Returns:
        how many edits were laid out, and why others were not.
    """
    ends = {(j.clip, j.work["prompt"]): outcomes[j.key] for j in batch.jobs if j.variant}
    done, failed = 0, []
    for edit in edits:
        outcome = ends[edit.entry.video_name, edit.entry.target_prompt]
        if outcome.state == FAILED:
            failed.append(f"{edit.entry.video_name}: {edit.folder}: {outcome.reason}")
            continue
        with atomic_dir(frames_of(batch.output_path, edit)) as partial:
            shutil.copytree(Path(outcome.folder) / "frames", partial, dirs_exist_ok=True)
        done += 1
    return done, failed


def frames_of(results: Path, edit: Edit) -> Path:
    """The folder of an edit's frames, where the benchmark's scorer looks for them."""
    return results / METHOD / edit.entry.video_name / edit.folder / FRAMES


# ----------------------------------------------------------------------------------------- scores


class Models(NamedTuple):
    """The models of the measures; without one, its measures are left out."""

    clip: metrics.ClipEmbedder | None
    dino: metrics.DinoKeys | None


def load_models(clip: str, dino: str, device: str) -> Models:
    """The CLIP and DINO models of hub ids or folders; "none" for none."""
    where = resolve_device(device)
    embedder = keys = None
    if clip != "none":
        embedder = metrics.ClipEmbedder(metrics.model_folder(clip, "clip_model"), where)
    if dino != "none":
        keys = metrics.DinoKeys(metrics.model_folder(dino, "dino_model"), where)
        five_bench.prepare_dino(keys)
    return Models(embedder, keys)


def score_edit(
    data: Path, frames: Path, entry: Entry, stride: int, models: Models
) -> dict[str, float | None]:
    """The measures of an edit, of every stride-th of its frames.

    Args:
        data: the benchmark's folder.
        frames: of the edit; resized to the source's size, if they have another.

    Raises:
        UserError: frames or masks are missing or damaged.
    """
    images, masks = (data / part / entry.video_name for part in ("images", "bmasks"))
    count = len(list(frames.glob("*.png")))
    if not count:
        raise MissingFileError(f"{frames}: no frames; run `edit` first")
    source = read_clip(images, count, own_size=True)
    size = source.native_size
    files = folder_images(images)
    numbers = slice(0, min(count, len(source.frames)), stride)
    edited = load_frames(frames, numbers.stop, size)[numbers]
    inside = read_masks([masks / file.name for file in files[numbers]], size, "stretch")
    prompts = entry.source_prompt, entry.target_prompt
    return five_bench.measures(edited, source.frames[numbers], inside, *prompts, *models)


def scores_as_csv(rows: Mapping[int, Mapping[str, float | None]]) -> str:
    """The rows of a file of prompts, by their numbers, as the benchmark's scorer writes them."""
    names = [name for name in five_bench.SCALES if any(name in row for row in rows.values())]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_id", *(f"{SCORER_METHOD}|{name}" for name in names)])
    for number, row in rows.items():
        values = [row.get(name) for name in names]
        writer.writerow([number, *("nan" if value is None else value for value in values)])
    return text.getvalue()


def means_table(rows: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    """The means of each kind of edit, and the means of these, by the scorer's factors."""
    together = [row for of_kind in rows.values() for row in of_kind]
    names = [name for name in five_bench.SCALES if any(name in row for row in together)]
    means = {}
    for kind, some in rows.items():
        values = {n: [row[n] for row in some if row.get(n) is not None] for n in names}
        means[kind] = {n: np.mean(v) * five_bench.SCALES[n] for n, v in values.items() if v}
    of_kinds = {n: [mean[n] for mean in means.values() if n in mean] for n in names}
    means["all"] = {n: np.mean(v) for n, v in of_kinds.items() if v}  # as the scorer does
    lines = [["edits", "number", *names]]
    for kind, mean in means.items():
        cells = [f"{mean[name]:.4f}" if name in mean else "-" for name in names]
        lines.append([kind, str(len(rows.get(kind, together))), *cells])
    return aligned(lines)


# ------------------------------------------------------------------------------------- the script


def run_edits(args: argparse.Namespace) -> None:
    """Makes and lays out the edits."""
    edits = cut_prompts(args.list, read_edits(args.data, args.kinds))
    batch = read_list(args.list, args.data, edits)
    check_writable(batch.output_path, "output_path")
    outcomes = run_jobs(batch.jobs, batch.output_path / "batch", args.jobs)
    done, failed = lay_out(batch, edits, outcomes)
    print(f"{done} of {len(edits)} edits: {batch.output_path / METHOD}")
    for reason in failed:
        log.error("%s", reason)
    if failed:
        kind = PartialFailure if done else UserError
        raise kind(f"{len(failed)} of {len(edits)} edits failed: {failed[0]}")


def run_scores(args: argparse.Namespace) -> None:
    """Scores the edits that are laid out."""
    given = parse(ClipList, load_yaml(args.list), str(args.list))
    results = args.results or Path(given.output_path)
    check_writable(args.csv, "--csv")
    edits = read_edits(args.data, args.kinds)
    models = load_models(args.clip_model, args.dino_model, args.device)
    rows: dict[str, dict[int, dict]] = {}
    errors = []
    for edit in edits:
        try:
            frames = frames_of(results, edit)
            scores = score_edit(args.data, frames, edit.entry, args.frame_stride, models)
            rows.setdefault(edit.kind, {})[edit.number] = scores
        except UserError as error:
            log.error("%s", error)
            errors.append(str(error))
    if not rows:
        raise UserError(f"no edit could be scored: {errors[0]}")
    name = f"evaluation_result_frame_stride{args.frame_stride}.csv"
    for kind, of_kind in rows.items():
        write_report(args.csv / f"edit{kind}_FiVE_{name}", scores_as_csv(of_kind))
    print(means_table({kind: list(of_kind.values()) for kind, of_kind in rows.items()}))
    if errors:
        raise PartialFailure(f"{len(errors)} of {len(edits)} could not be scored: {errors[0]}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    edit = commands.add_parser("edit", help="make the edits")
    score = commands.add_parser("score", help="measure them")
    for command, run in ((edit, run_edits), (score, run_scores)):
        add = command.add_argument
        command.set_defaults(run=run)
        add("data", type=Path, help="the benchmark's folder")
        add("--list", type=Path, default=LIST, help=f"settings (default: {LIST})")
        add("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND",
            help="of edits: some of 1 to 6 (default: all)")  # fmt: skip
    edit.add_argument("--jobs", type=at_least(1), metavar="N",
                      help="jobs at a time (default: one on each GPU)")  # fmt: skip
    add = score.add_argument
    add("--results", type=Path, help="the folder of TokenFlow/ (default: the list's output_path)")
    add("--csv", type=Path, default=Path("outputs"), help="folder of the files (default: outputs)")
    add(
        "--frame_stride",
        type=at_least(1),
        default=8,
        help="score every so many frames (default: 8)",
    )
    add("--clip_model", default=five_bench.CLIP_MODEL, help="hub id, folder or none")
    add("--dino_model", default=five_bench.DINO_MODEL, help="hub id, folder or none")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        PartialFailure: some edits failed, or could not be scored; the others are done.
    """
    setup_logging()
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
