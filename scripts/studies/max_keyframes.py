"""What a bound on joint attention costs: warp errors of PnP edits under several max_keyframes.

python -m scripts.studies.max_keyframes latents/shapes/clips.yaml --keyframe_interval 1 --bounds 6 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from tabulate import tabulate

from scripts.batch.engine import run_jobs
from scripts.table1 import table1
from tokenflow.evaluation.evaluator import Evaluator
from util import ArgumentParser, UserError, at_least, command_line, setup_logging

PNP = next(method for method in table1.METHODS if method.name == "PnP, TokenFlow")
SHOWN = {"warp_error": "warp error x1e-3", "clip_score": "CLIP score"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="a list of clips as scripts/table1.sh takes it")
    add = parser.add_argument
    add("--keyframe_interval", "--interval", type=at_least(1), default=1,
        help="frames per keyframe (default: 1)")  # fmt: skip
    add("--bounds", type=at_least(2), nargs="+", required=True, help="of max_keyframes")
    args = parser.parse_args(argv)
    setup_logging()
    settings = {"keyframe_interval": args.keyframe_interval}
    variants = [
        replace(PNP, name=str(bound), settings=PNP.settings | settings | {"max_keyframes": bound})
        for bound in (None, *args.bounds)
    ]
    batch, protocol = table1.read_list(args.clips, variants)
    evaluator = Evaluator(protocol)
    outcomes = run_jobs(batch.jobs, batch.output_path / "batch")
    scored = table1.score(batch, outcomes, evaluator)
    if missing := len(batch.clips) * len(variants) - len(scored):
        raise UserError(f"{missing} edits failed; see the logs in {batch.output_path / 'batch'}")
    rows = {b: [r for r in scored if r.method == str(b)] for b in (None, *args.bounds)}
    print(f"{len(batch.clips)} clips, {args.keyframe_interval} frames per keyframe; means")
    head = ["max_keyframes", *SHOWN.values(), "clips with less flicker than unbounded"]
    cells = []
    for bound, found in rows.items():
        pairs = zip(found, rows[None], strict=True)
        fewer = sum(row.warp_error < unbounded.warp_error for row, unbounded in pairs)
        error, score = (mean(getattr(row, key) for row in found) for key in SHOWN)
        cells.append([bound or "null", f"{error:.2f}", f"{score:.3f}", fewer])
    print(tabulate(cells, head, "plain", disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    command_line(main)
