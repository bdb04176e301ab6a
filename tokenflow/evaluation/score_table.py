"""The rows that evaluate.py makes, and their tables: plain text, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, NamedTuple

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
    warp_error: Annotated[float | None, Column("warp error", "x1e-3", 2, "low")] = None
    warp_error_object: Annotated[float | None, Column("warp error object", "x1e-3", 2, "low")] = (
        None
    )
    warp_error_background: Annotated[
        float | None, Column("warp error background", "x1e-3", 2, "low")
    ] = None
    clip_score: Annotated[float | None, Column("CLIP score", "", 3, "high")] = None
    clip_frame: Annotated[float | None, Column("CLIP frame", "", 3, "high")] = None
    clip_directional: Annotated[float | None, Column("CLIP direction", "", 3, "high")] = None
    psnr: Annotated[float | None, Column("PSNR", "dB", 2, "")] = None
    ssim: Annotated[float | None, Column("SSIM", "", 3, "")] = None
    psnr_background: Annotated[float | None, Column("PSNR background", "dB", 2, "high")] = None
    ssim_background: Annotated[float | None, Column("SSIM background", "", 3, "high")] = None
    psnr_object: Annotated[float | None, Column("PSNR object", "dB", 2, "")] = None
    ssim_object: Annotated[float | None, Column("SSIM object", "", 3, "")] = None
    sharpness: Annotated[float | None, Column("sharpness", "", 4, "")] = None
    sharpness_object: Annotated[float | None, Column("sharpness object", "", 4, "")] = None
    sharpness_background: Annotated[float | None, Column("sharpness background", "", 4, "")] = None
    dino_distance: Annotated[float | None, Column("DINO distance", "", 4, "low")] = None
    seconds: dict[str, float | None] | None = None
    seconds_per_frame: Annotated[float | None, Column("edit", "s/frame", 2, "low")] = None
    inversion_seconds_per_frame: Annotated[
        float | None, Column("inversion", "s/frame", 2, "low")
    ] = None
    peak_memory_bytes: Annotated[int | None, Column("peak memory", "GiB", 2, "low", 2**30)] = None


COLUMNS = {name: column for name, field in Row.model_fields.items()
           for column in field.metadata if isinstance(column, Column)}  # fmt: skip
RESAMPLES = 10_000  # of the clips, for an interval
TEXTS = ("method", "clip", "prompt")  # headings of columns that hold no numbers


class Summary(NamedTuple):
    """The means of one method's rows."""

    method: str
    rows: int  # how many there are
    clips: int  # of how many clips
    means: dict[str, float | None]  # of each measure over the rows that have it, if any has
    counts: dict[str, int]  # how many rows have it


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """The means over each method's rows, in the order in which the methods first appear."""
    summaries = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        values = {name: [v for row in own if (v := getattr(row, name)) is not None]
                  for name in COLUMNS}  # fmt: skip
        means = {name: float(np.mean(v)) if v else None for name, v in values.items()}
        counts = {name: len(v) for name, v in values.items()}
        summaries.append(Summary(method, len(own), len({row.clip for row in own}), means, counts))
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
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of values, and the bounds of its 95 % bootstrap interval (percentiles)."""
    values = np.asarray(values, float)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def shown_interval(column: Column, values: Sequence[float]) -> str:
    """The mean of differences with its interval, as text; "-" if there are none."""
    if not values:
        return "-"
    scaled = (value / column.scale for value in interval(values))
    mean, low, high = (f"{value:+.{column.digits}f}" for value in scaled)
    return f"{mean} ({low}, {high})"


def by_clip(rows: Sequence[Row], method: str, measure: str) -> dict[str, float]:
    """A measure of a method's edits of each clip, the mean over its prompts.

    Edits of one clip are no independent samples. Rows that lack the measure are left out.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.method == method and (value := getattr(row, measure)) is not None:
            values.setdefault(row.clip, []).append(value)
    return {clip: float(np.mean(own)) for clip, own in values.items()}


def paired_difference(rows: Sequence[Row], one: str, other: str, measure: str) -> str:
    """How a method's measure differs from another's on the clips that both have, in a line.

    The two are apart where the interval of the mean difference does not hold 0.
    """
    a, b = (by_clip(rows, method, measure) for method in (one, other))
    differences = [a[clip] - b[clip] for clip in a if clip in b]
    if len(differences) < 2:
        return f"{one} - {other}: of {len(differences)} clips, so no interval"
    _, low, high = interval(differences)
    smaller = sum(difference < 0 for difference in differences)
    return (
        f"{one} - {other}: {COLUMNS[measure].label} "
        f"{shown_interval(COLUMNS[measure], differences)}, smaller on {smaller} of "
        f"{len(differences)} clips: {'apart' if low > 0 or high < 0 else 'not apart'}"
    )


def order_verdict(means: Mapping[str, float], order: Sequence[str]) -> tuple[bool, str]:
    """Whether methods' mean errors are in the order of the paper's Table 1, and a line on it."""
    found = sorted(order, key=means.__getitem__)
    holds = found == list(order)
    verdict = "holds" if holds else f"does not hold, but {' < '.join(found)}"
    return holds, f"The paper's order, {' < '.join(order)}: {verdict}"


def _protocol_line(row: Row) -> str:
    p = row.protocol
    weights = f", {p['flow_weights']}" if p["flow_weights"] else ""
    return (
        f"flow {p['flow']}{weights}; occlusion {p['occlusion']}; {p['resolution']} (HxW), "
        f"{row.n_frames} frames; masks: {p['mask'] or 'none'}; CLIP {p['clip_model'] or 'none'}; "
        f"DINO {p['dino_model'] or 'none'}; {_versions(row)}"
    )


# ---------------------------------------------------------------------------------------------
# For programs


def rows_as_json(rows: Sequence[Row]) -> str:
    """A list of the rows; null where not measured."""
    return json.dumps([row.model_dump() for row in rows], indent=2, allow_nan=False) + "\n"


def rows_as_csv(rows: Sequence[Row]) -> str:
    """The rows; each stage's seconds and each part of the protocol in a column of its own."""
    lines = []
    for row in rows:
        protocol = {**row.protocol, "versions": _versions(row)}
        line = row.model_dump(exclude={"protocol", "seconds"})
        line |= {f"protocol_{key}": value for key, value in protocol.items()}
        lines.append(line | {f"seconds_{stage}": s for stage, s in (row.seconds or {}).items()})
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, dict.fromkeys(name for line in lines for name in line))
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


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
