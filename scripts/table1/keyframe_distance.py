"""Where edits flicker: the warp error of consecutive frames by their distance to fixed keyframes.

    python -m scripts.table1.keyframe_distance tokenflow-results/table1 --flow truth --out plot.png

The distance of a pair of frames is from its middle to the nearest of the keyframes that
`keyframes: fixed` takes, in frames: 0.5 for a pair that holds one. The paper draws keyframes at
random so that no frame is always far from one. Of each clip a method's pairs of one distance count
as one; means and 95 % bootstrap intervals are over clips.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tokenflow.evaluation import metrics
from tokenflow.evaluation.evaluator import Evaluator, open_results
from tokenflow.evaluation.options import Protocol
from tokenflow.evaluation.score_table import aligned, interval
from tokenflow.figures import drawing
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.schema import add_arguments, from_arguments
from tokenflow.storage.yaml_files import load_yaml
from tokenflow_utils import fixed_keyframes
from util import ArgumentParser, UserError, command_line, setup_logging

STYLES = ("o-", "s--", "^:", "d-.")
METHODS = ("PnP, fixed keyframes", "PnP, TokenFlow")
Found = dict[str, dict[float, dict[str, float]]]  # method, distance, clip: mean warp error


def pair_distances(n_frames: int, keyframe_interval: int) -> np.ndarray:
    """(n - 1,): from the middle of each pair of frames to the nearest fixed keyframe."""
    keyframes = fixed_keyframes(n_frames, keyframe_interval).numpy()
    middles = np.arange(n_frames - 1) + 0.5
    return np.abs(middles[:, None] - keyframes).min(axis=1)


def measure(results: Sequence[Path], methods: Sequence[str], protocol: Protocol) -> Found:
    """The errors of all results of some methods, in folders of results.

    Raises:
        UserError: there are none, or one cannot be measured.
    """
    protocol = protocol.model_copy(update={"clip_model": None})
    subjects, _ = open_results(results, protocol)
    evaluator, values = Evaluator(protocol), {}
    for subject in subjects:
        row = subject.row
        if row.method not in methods:
            continue
        config = load_yaml(Path(row.folder) / "config.yaml")
        motion = evaluator.scores_of(subject.source).motion
        errors = metrics.pair_errors(subject.read(), motion)
        distances = pair_distances(row.n_frames, config["keyframe_interval"])
        for distance, error in zip(distances.tolist(), errors, strict=True):
            if not np.isnan(error):
                key = row.method, distance, row.clip
                values.setdefault(key, []).append(float(error))
    if not values:
        raise UserError(f"no result of {' or '.join(methods)} in these folders")
    found: Found = {method: {} for method in methods}
    for (method, distance, clip), own in sorted(values.items(), key=lambda item: item[0][1]):
        found[method].setdefault(distance, {})[clip] = float(np.mean(own))
    return {method: by_distance for method, by_distance in found.items() if by_distance}


def table(found: Mapping[str, Mapping[float, Mapping[str, float]]]) -> str:
    """A line for each distance: clips, and each method's mean with its interval."""
    distances = sorted({d for by_distance in found.values() for d in by_distance})
    lines = [["distance", "clips", *(f"{method}, warp error x1e-3" for method in found)]]
    for distance in distances:
        clips = {clip for by in found.values() for clip in by.get(distance, ())}
        cells = []
        for by_distance in found.values():
            values = list(by_distance.get(distance, {}).values())
            mean, low, high = interval(values) if values else (np.nan,) * 3
            cells.append(f"{mean:.2f} ({low:.2f}, {high:.2f})")
        lines.append([f"{distance:g}", str(len(clips)), *cells])
    return aligned(lines)


def plot(found: Mapping[str, Mapping[float, Mapping[str, float]]]) -> Figure:
    """The means over clips by distance, with their intervals."""
    figure = Figure((6, 4), dpi=drawing.DPI, layout="constrained")
    axis = figure.subplots()
    for (method, by_distance), style in zip(found.items(), itertools.cycle(STYLES), strict=False):
        means, lows, highs = np.transpose([interval([*v.values()]) for v in by_distance.values()])
        reach = means - lows, highs - means
        axis.errorbar(list(by_distance), means, reach, fmt=style, capsize=3, label=method)
    axis.set_xlabel("frames to the nearest fixed keyframe")
    axis.set_ylabel("warp error x1e-3")
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="folders of results")
    add("--methods", nargs="+", default=METHODS, metavar="NAME",
        help=f"as evaluate.py names them (default: {'; '.join(METHODS)})")  # fmt: skip
    add("--out", type=Path, required=True, help="PNG file for the plot")
    add("--json", type=Path, metavar="FILE", help="write method, distance and clip's errors there")
    add_arguments(parser, Protocol)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Found:
    """Runs the script; returns the errors by method, distance and clip."""
    setup_logging()
    args = parse_args(argv)
    check_report_path(args.out, "--out")
    if args.json is not None:
        check_report_path(args.json, "--json")
    found = measure(args.results, args.methods, from_arguments(Protocol, args))
    drawing.save_figure(args.out, plot(found))
    reports = [(args.json, json.dumps(found, indent=1) + "\n")] if args.json else []
    write_reports(table(found), reports)
    return found


if __name__ == "__main__":
    command_line(main)
