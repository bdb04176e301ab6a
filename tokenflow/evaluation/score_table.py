"""The rows that evaluate.py makes, and their tables: plain text, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
from tabulate import tabulate

from tokenflow.storage.schema import Model, parse
from util import MissingFileError, UserError


@dataclass(frozen=True)
class Column:
    """A measure in a table.

    Attributes:
        digits: decimals that are shown.
        better: which values are better, "low" or "high"; "" where neither is.
        scale: values are divided by it.
    """

    label: str
    unit: str
    digits: int
    better: Literal["low", "high", ""]
    scale: float = 1.0

    @property
    def heading(self) -> str:
        return f"{self.label} {self.unit}".rstrip()

    def shown(self, value: float | None) -> str:
        """The value as text, "-" if it is None."""
        return "-" if value is None else f"{value / self.scale:.{self.digits}f}"


COLUMNS = {
    "warp_error": Column("warp error", "x1e-3", 2, "low"),
    "clip_score": Column("CLIP score", "", 3, "high"),
    "clip_frame": Column("CLIP frame", "", 3, "high"),
    "clip_directional": Column("CLIP direction", "", 3, "high"),
    "psnr": Column("PSNR", "dB", 2, ""),
    "ssim": Column("SSIM", "", 3, ""),
    "psnr_background": Column("PSNR background", "dB", 2, "high"),
    "ssim_background": Column("SSIM background", "", 3, "high"),
    "psnr_object": Column("PSNR object", "dB", 2, ""),
    "ssim_object": Column("SSIM object", "", 3, ""),
    "dino_distance": Column("DINO distance", "", 4, "low"),
    "seconds_per_frame": Column("edit", "s/frame", 2, "low"),
    "inversion_seconds_per_frame": Column("inversion", "s/frame", 2, "low"),
    "peak_memory_bytes": Column("peak memory", "GiB", 2, "low", 2**30),
}
TEXTS = ("method", "clip", "prompt")  # headings of columns that hold no numbers


class Row(Model):
    """One edited video's scores, and the protocol by which they were measured; None: not measured.

    docs/evaluation.md explains every field.
    """

    method: str
    clip: str
    prompt: str | None
    source_prompt: str | None
    folder: str | None
    video: str
    n_frames: int
    height: int
    width: int
    fps: float
    protocol: dict[str, Any]
    warp_error: float | None = None
    clip_score: float | None = None
    clip_frame: float | None = None
    clip_directional: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    psnr_background: float | None = None
    ssim_background: float | None = None
    psnr_object: float | None = None
    ssim_object: float | None = None
    dino_distance: float | None = None
    seconds: dict[str, float | None] | None = None
    seconds_per_frame: float | None = None
    inversion_seconds_per_frame: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """The means of one method's rows.

    Attributes:
        rows: how many there are.
        clips: of how many clips.
        means: of each measure over the rows that have it; None where none has.
        counts: how many rows have it.
    """

    method: str
    rows: int
    clips: int
    means: dict[str, float | None]
    counts: dict[str, int]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """The means over each method's rows, in the order in which the methods first appear."""
    summaries = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        values = {name: [v for row in own if (v := getattr(row, name)) is not None]
                  for name in COLUMNS}  # fmt: skip
        summaries.append(
            Summary(
                method,
                rows=len(own),
                clips=len({row.clip for row in own}),
                means={n: float(np.mean(v)) if v else None for n, v in values.items()},
                counts={n: len(v) for n, v in values.items()},
            )
        )
    return summaries


# ---------------------------------------------------------------------------------------------
# For people


def text_table(rows: Sequence[Row]) -> str:
    """The rows and, of several clips, each method's means: columns aligned, then the protocol.

    A measure that no row has gets no column; "-" is what one row lacks.
    """
    return "\n".join([aligned(_cells(rows)), "", *protocols(rows)])


def aligned(lines: Sequence[Sequence[str]], style: str = "plain") -> str:
    """Lines of cells, headings first, as text in columns.

    Args:
        style: one of tabulate's: "plain", or "pipe" for Markdown.
    """
    align = ["left" if heading in TEXTS else "right" for heading in lines[0]]
    return tabulate(lines[1:], lines[0], style, colalign=align, disable_numparse=True)


def markdown_table(rows: Sequence[Row]) -> str:
    """`text_table` as a Markdown table with the protocol below it."""
    table = aligned([[_escaped(cell) for cell in line] for line in _cells(rows)], "pipe")
    return "\n".join([table, "", *(f"{_escaped(line)}\n" for line in protocols(rows))])


def _escaped(text: str) -> str:
    """Text that neither ends a Markdown cell nor marks anything up."""
    return "".join(f"\\{c}" if c in "\\|*_`<[" else c for c in " ".join(text.split()))


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's lines, headings first: what was edited how, and the measures that any row has."""
    names = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    # Only prompts tell one method's edits of one clip apart.
    prompts = len({(row.method, row.clip) for row in rows}) < len(rows)
    lines = [["method", "clip", *["prompt"] * prompts, *(COLUMNS[name].heading for name in names)]]
    for row in rows:
        prompt = [shorten(row.prompt or "-", 48, placeholder="...")] * prompts
        lines.append(
            [row.method, row.clip, *prompt, *(COLUMNS[n].shown(getattr(row, n)) for n in names)]
        )
    if len({row.clip for row in rows}) > 1:
        for summary in summarize(rows):
            line = [summary.method, f"mean of {summary.rows}", *[""] * prompts]
            for name in names:
                count, shown = summary.counts[name], COLUMNS[name].shown(summary.means[name])
                line.append(f"{shown} (of {count})" if 0 < count < summary.rows else shown)
            lines.append(line)
    return lines


def protocols(rows: Sequence[Row]) -> list[str]:
    """The protocol in one line; where rows differ in theirs, a line each with the rows' numbers."""
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows, start=1):
        numbers.setdefault(_protocol_line(row), []).append(i)
    if len(numbers) == 1:
        return [f"Protocol: {line}" for line in numbers]
    return [f"Protocol of rows {_ranges(own)}: {line}" for line, own in numbers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 5] as "1-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _protocol_line(row: Row) -> str:
    p = row.protocol
    parts = [
        f"flow {p['flow']}" + (f", {p['flow_weights']}" if p["flow_weights"] else ""),
        f"occlusion {p['occlusion']}",
        f"{p['resolution']} (HxW), {row.n_frames} frames",
        f"masks: {p['mask'] or 'none'}",
        f"CLIP {p['clip_model'] or 'none'}",
        f"DINO {p['dino_model'] or 'none'}",
        _versions(row),
    ]
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------
# For programs


def rows_as_json(rows: Sequence[Row]) -> str:
    """A list of the rows; null where not measured."""
    return json.dumps([row.model_dump() for row in rows], indent=2, allow_nan=False) + "\n"


def rows_as_csv(rows: Sequence[Row]) -> str:
    """The rows; each stage's seconds and each part of the protocol in a column of its own."""
    plain = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for line in plain for name in line))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(plain)
    return file.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    protocol = {**row.protocol, "versions": _versions(row)}
    values = row.model_dump(exclude={"protocol", "seconds"})
    values |= {f"protocol_{key}": value for key, value in protocol.items()}
    return values | {f"seconds_{stage}": s for stage, s in (row.seconds or {}).items()}


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in row.protocol["versions"].items())


def read_rows(path: Path) -> list[Row]:
    """Read rows as `rows_as_json` writes them.

    Raises:
        UserError: there is no such file, or it holds something else; names the row and the key.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of rows")
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, as evaluate.py --json writes it")
    return [parse(Row, row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "json": rows_as_json,
    "csv": rows_as_csv,
    "markdown": markdown_table,
}
