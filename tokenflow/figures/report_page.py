"""Builds the page of results: source, reconstruction and every edit, playing in step."""

from __future__ import annotations

import html
import json
import logging
import math
import os
import re
import reprlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

from tokenflow.cache.source_cache import SourceCache
from tokenflow.editing.results import PLACES, RESULT_FILES, Result, find_results, read_result
from tokenflow.evaluation.score_table import COLUMNS, Row, read_rows
from tokenflow.storage.video import read_clip, save_video
from tokenflow.storage.work_dir import atomic_dir
from util import UserError, check_writable, slug

log = logging.getLogger("tokenflow")

PAGE = "report.html"
MEDIA = "media/[0-9][0-9][0-9][0-9]-*"  # files of `add_video`
PAGE_PARTS = Path(__file__).resolve().parent / "page"
GENERATOR = '<meta name="generator" content="tokenflow report.py">'
LINKED = (*RESULT_FILES, "side_by_side.mp4", "frames")
POSTER_SIDE = 640
NEAR = 3  # a link may climb so many folders from the report; farther files are only named


class Group(NamedTuple):
    """The results of one clip, and the caches that they were made from, where these still are."""

    name: str
    results: list[Result]
    caches: dict[str, SourceCache]  # by the real paths of their folders


def readable_results(roots: Sequence[Path]) -> list[Result]:
    """Read all finished results in or below some folders, ordered by their folders' paths.

    Warns of those that are unfinished or cannot be read.

    Raises:
        UserError: a root is not a folder, or no result can be read.
    """
    finished, unfinished = find_results(roots)
    results = []
    for folder in sorted(map(Path.resolve, finished)):
        try:
            read_clip(folder / "edited.mp4", 1)  # refuses what is no video
            result = read_result(folder)
            if not result.n_frames:
                raise UserError(f"{folder}: neither run.yaml nor frames/ tells how many frames")
            results.append(result)
        except (UserError, OSError) as error:
            log.warning("left out: %s", error)
    if not results:
        raise UserError(f"{', '.join(map(str, roots))}: no result that can be read")
    if left_out := len(unfinished) + len(finished) - len(results):
        log.warning("left out %d unfinished or unreadable results", left_out)
    return results


def rows_by_folder(paths: Sequence[Path]) -> dict[str, Row]:
    """Read what evaluate.py --json wrote: rows by the real path of their result's folder.

    A row's `folder` is taken from the current folder or, if it is not there, from the file's own.
    Of several rows of a result the last counts, as a whole: rows may differ in protocol. Rows of
    other programs' videos have no folder and are left out.
    """
    rows = {}
    for path in paths:
        for row in read_rows(path):
            if row.folder:
                place = Path(row.folder) if os.path.exists(row.folder) else path.parent / row.folder
                rows[os.path.realpath(place)] = row
    return rows


def group_results(results: Iterable[Result]) -> list[Group]:
    """Put together the results of the same frames of the same source, in the clips' order."""
    groups: dict[tuple, Group] = {}
    for result in results:
        key, caches = (result.folder.parent.name, plain(result.run.get("cache"))), {}
        try:
            cache = result.cache(check_files=False)
            m, caches = cache.manifest, {os.path.realpath(cache.folder): cache}
            key = (m.clip, m.source_sha256, m.frame_start, m.frame_stride)
        except UserError as error:
            log.warning("%s", error)
        group = groups.setdefault(key, Group(key[0], [], {}))
        group.results.append(result)
        group.caches.update(caches)
    return [groups[key] for key in sorted(groups, key=str)]


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which those configs differ that have them, but for places and the prompt.

    A key that only one technique knows (SDEdit's `start`) is no difference to the others.
    """
    values: dict[str, set[str]] = {}
    for config in configs:
        for key, value in config.items():
            values.setdefault(plain(key), set()).add(plain(value))
    return [key for key in values if len(values[key]) > 1 and key not in (*PLACES, "prompt")]


# ---------------------------------------------------------------- media


def add_video(
    media: Path, video: Path | tuple[np.ndarray, Fraction], name: str, n_frames: int
) -> dict[str, Any]:
    """Add a video and its poster to a report's folder of media; returns what the page says of it.

    Args:
        video: a file, hard-linked where the file system allows it, else copied; or frames,
            (n, H, W, 3) uint8, and their rate.
    """
    number = len(list(media.iterdir())) // 2 + 1
    path = media / f"{number:04d}-{slug(name)}.mp4"
    poster = path.with_suffix(".jpg")
    if not isinstance(video, Path):
        save_video(path, *video)
    else:
        try:
            os.link(os.path.realpath(video), path)
        except OSError:
            shutil.copyfile(video, path)
    first = read_clip(path, 1, own_size=True)
    height, width = first.native_size
    image = Image.fromarray(first.frames[0])
    image.thumbnail((POSTER_SIDE, POSTER_SIDE))
    image.save(poster, quality=92)
    src, poster = (f"{media.name}/{file.name}" for file in (path, poster))
    return {"src": src, "poster": poster, "fps": float(first.fps), "frames": n_frames,
            "width": width, "height": height}  # fmt: skip


def source_frames(group: Group) -> tuple[np.ndarray, Fraction] | None:
    """A clip's source, as many frames as its edits have: (n, H, W, 3) uint8, and their rate.

    It comes from the cache, or else from the left half of a result's side_by_side.mp4.
    """
    longest = max(result.n_frames for result in group.results)
    for cache in group.caches.values():
        try:
            return cache.frames(min(longest, cache.manifest.n_frames)), cache.fps
        except UserError as error:
            log.warning("%s", error)
    both_files = (result.folder / "side_by_side.mp4" for result in group.results)
    for path in filter(Path.is_file, both_files):
        try:
            both = read_clip(path, None, own_size=True)
            return both.frames[:, :, : both.native_size[1] // 4 * 2], both.fps
        except UserError as error:
            log.warning("%s", error)
    return None


# ---------------------------------------------------------------- the page


def write_report(groups: Sequence[Group], rows: Mapping[str, Row], out: Path, title: str) -> None:
    """Write the report's folder, an absolute path, which replaces an older one when it is whole.

    Files that a user added to the older one stay.
    """
    with atomic_dir(out, own=(MEDIA,)) as partial:
        media = partial / "media"
        media.mkdir()
        work = tqdm(groups, desc="report", unit="clip")
        clips = [clip_data(group, rows, media, out) for group in work]
        text = render_page(page_data(clips, rows, title))
        (partial / PAGE).write_text(text, encoding="utf-8", errors="replace")


def page_data(
    clips: Sequence[Mapping[str, Any]], rows: Mapping[str, Row], title: str
) -> dict[str, Any]:
    """All that the page shows, as plain JSON values."""
    edits = [edit for clip in clips for edit in clip["edits"]]
    measured = {key for edit in edits for key in edit["metrics"]}
    protocols = [edit["protocol"] for edit in edits if edit["protocol"]]
    return {
        "title": title,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "metrics": [
            {**asdict(column), "key": key, "label": column.label[0].upper() + column.label[1:]}
            for key, column in COLUMNS.items()
            if key in measured
        ],
        "protocol": protocols[0] if protocols else [],
        "protocols_differ": any(protocol != protocols[0] for protocol in protocols),
        "clips": list(clips),
    }


def clip_data(group: Group, rows: Mapping[str, Row], media: Path, out: Path) -> dict[str, Any]:
    """What the page shows of a clip; adds its videos to the folder of media."""
    name, results = group.name, group.results
    references, notes, caches = [], [], group.caches.values()
    if source := source_frames(group):
        video = add_video(media, source, f"{name}-source", len(source[0]))
        references.append({"label": "Source", "video": video, "facts": []})
    else:
        notes.append("The source is missing: its cache is no longer there.")
    for cache in caches:
        path, m = cache.folder / "inverted.mp4", cache.manifest
        if path.is_file():
            label = "Reconstruction" + (f" ({m.sd_version})" if len(caches) > 1 else "")
            psnr = {"PSNR": m.psnr, "PSNR of the VAE alone": m.vae_psnr}
            facts = [(name, f"{db:.2f} dB") for name, db in psnr.items() if math.isfinite(db)]
            video = add_video(media, path, f"{name}-reconstruction", m.n_frames)
            references.append({"label": label, "video": video, "facts": facts})
    computed = all(cache.manifest.reconstruction == "full" for cache in caches)
    if source and computed and len(references) < 2:
        notes.append("The reconstruction is missing: its cache is no longer there.")

    differing = differing_settings([result.config for result in results])
    prompts = list(dict.fromkeys(result.prompt or "" for result in results))
    edits = [
        edit_data(result, rows.get(os.path.realpath(result.folder)), differing, media, out)
        for result in results
    ]
    edits.sort(key=lambda edit: (edit["label"], edit["prompt"]))
    add_hints(edits)
    source_prompts = dict.fromkeys(cache.manifest.inversion_prompt for cache in caches)
    return {
        "name": name,
        "data_path": plain(results[0].config.get("data_path", "")),
        "source_prompts": [prompt for prompt in source_prompts if prompt],
        "prompt": prompts[0] if len(prompts) == 1 else None,
        "notes": notes,
        "references": references,
        "edits": edits,
    }


def edit_data(
    result: Result, row: Row | None, differing: Sequence[str], media: Path, out: Path
) -> dict[str, Any]:
    """What the page shows of a result; adds its video to the folder of media."""
    settings = [(plain(key), plain(value)) for key, value in result.config.items()]
    name = f"{result.folder.parent.name}-{result.prompt or ''}"
    return {
        "label": row.method if row else result.method,
        "video": add_video(media, result.folder / "edited.mp4", name, result.n_frames),
        "prompt": result.prompt or "",
        "differing": [(key, value) for key, value in settings if key in differing],
        "metrics": metrics_of(result, row),
        "settings": settings,
        "run": flat(result.run),
        "protocol": flat(row.protocol if row else {}),
        "path": str(result.folder),
        "files": [
            {"name": name, "href": relative_link(result.folder / name, out)}
            for name in LINKED
            if (result.folder / name).exists()
        ],
    }


def add_hints(edits: Sequence[dict[str, Any]]) -> None:
    """Give edits of one clip that share label and prompt a `hint`: the settings they differ in."""
    for edit in edits:
        twins = [e for e in edits if (e["label"], e["prompt"]) == (edit["label"], edit["prompt"])]
        keys = differing_settings([dict(twin["settings"]) for twin in twins])
        edit["hint"] = ", ".join(f"{key} {value}" for key, value in edit["settings"] if key in keys)


def metrics_of(result: Result, row: Row | None) -> dict[str, float]:
    """A result's measures by key: its row's, else what run.yaml says of its cost."""
    known = {
        "peak_memory_bytes": result.run.get("peak_memory_bytes"),
        "seconds_per_frame": result.seconds_per_frame,
    }
    known |= row.model_dump(exclude_none=True) if row else {}
    return {key: known[key] for key in COLUMNS if known.get(key) is not None}


def plain(value: Any) -> str:
    """A value of YAML or JSON as text, as YAML writes it; what is nested is cut short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value) if isinstance(value, (str, int, float)) else reprlib.repr(value)


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A mapping's keys and values as text, one level of nesting spelled `outer.inner`."""
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and not prefix:
            pairs += flat(value, f"{plain(key)}.")
        else:
            pairs.append((f"{prefix}{plain(key)}", plain(value)))
    return pairs


def relative_link(path: Path, out: Path) -> str | None:
    """The percent-encoded path from a report to a file near it; None if it is not near.

    Near is what has a folder in common with the report, other than the root, at most NEAR folders
    up: report and results of one project, which are moved together.
    """
    relative = Path(os.path.relpath(os.path.realpath(path), out))
    if relative.parts.count(os.pardir) > min(NEAR, len(out.parts) - 2):
        return None
    return quote(os.fsencode(relative.as_posix()))


def render_page(data: Mapping[str, Any]) -> str:
    """Put data, style and script into the page; nothing in the data can end its element."""
    parts = {
        "title": html.escape(data["title"]),
        "generator": GENERATOR,
        "style": (PAGE_PARTS / "page.css").read_text(encoding="utf-8"),
        "script": (PAGE_PARTS / "page.js").read_text(encoding="utf-8"),
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    template = (PAGE_PARTS / "page.html").read_text(encoding="utf-8")
    # One pass: what is put in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


# ---------------------------------------------------------------- the output folder


def check_out(out: Path, groups: Sequence[Group]) -> None:
    """Refuse an output folder that is none of ours, or is mixed up with what the page shows.

    Raises:
        UserError: says why.
    """
    if not out.name:
        raise UserError(f"--out: {out}: expected the name of a folder")
    check_writable(out.parent, "--out")
    shown = [place for group in groups for place in (*group.results, *group.caches.values())]
    for folder in (Path(os.path.realpath(place.folder)) for place in shown):
        if out.is_relative_to(folder):
            raise UserError(f"--out: {out}: lies inside of {folder}, which the report shows")
        if folder.is_relative_to(out):
            raise UserError(f"--out: {out}: holds {folder}, which the report shows")
    is_empty = out.is_dir() and not any(out.iterdir())
    page = out / PAGE
    is_report = page.is_file() and GENERATOR.encode() in page.read_bytes()[:4096]
    if os.path.lexists(out) and not is_empty and not is_report:
        raise UserError(f"--out: {out}: exists and is not a report; name another folder")
