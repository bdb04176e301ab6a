"""Scores edited videos: warp error, CLIP, PSNR, SSIM, structure and cost, each with its protocol.

python evaluate.py tokenflow-results --json scores.json
python evaluate.py --source clip.mp4 --edited other.mp4 --prompt "a marble sculpture of a wolf"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenflow.evaluation.options import OtherVideo, Protocol
from tokenflow.evaluation.score_table import FORMATS, Row, text_table
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.schema import add_arguments, from_arguments
from util import ArgumentParser, PartialFailure, UserError, command_line, setup_logging


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line, but for what belongs to Protocol and OtherVideo.

    Raises:
        UserError: an option is unknown, or does not go with the others.
    """
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="PATH", help="a result, or a folder of results")
    add_arguments(parser.add_argument_group("or any other program's video"), OtherVideo)
    add("--source_prompt", help="what the source shows, where no inversion prompt says it")
    add_arguments(parser, Protocol)
    for kind in FORMATS:
        add(f"--{kind}", type=Path, metavar="FILE", help="write the rows there too; -: to stdout")
    args = parser.parse_args(argv)
    given = [name for name in OtherVideo.model_fields if name in args]
    if args.results and given:
        raise UserError(f"--{given[0]}: is of a single video; leave out it or the results")
    if not args.results and not {"source", "edited"} <= set(given):
        missing = "--edited" if "source" in given else "--source"
        about = f"{missing}: is missing; " if given else ""
        raise UserError(f"{about}name results, or any video by --source, --edited and --prompt")
    for kind in FORMATS:
        if path := getattr(args, kind):
            check_report_path(path, f"--{kind}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the script; returns the rows.

    Raises:
        PartialFailure: some results could not be scored; the rows of the others are written.
    """
    setup_logging()
    args = parse_args(argv)
    protocol = from_arguments(Protocol, args)
    other = None if args.results else from_arguments(OtherVideo, args)
    from tokenflow.evaluation.evaluator import Evaluator, check_subject, open_results, score_all
    from tokenflow.evaluation.inputs import open_video  # slow to import, both

    if other is None:
        subjects, errors = open_results(args.results, protocol, args.source_prompt)
    else:
        video = open_video(other, args.source_prompt)
        subjects, errors = [check_subject(video, protocol)], []
    rows, failed = score_all(subjects, Evaluator(protocol))
    errors += failed
    if rows:
        write_reports(
            text_table(rows),
            [(path, show(rows)) for kind, show in FORMATS.items() if (path := getattr(args, kind))],
        )
    if errors:
        n = len(rows) + len(errors)
        kind = PartialFailure if rows else UserError
        raise kind(f"{len(errors)} of {n} could not be scored: {errors[0]}")
    return rows


if __name__ == "__main__":
    command_line(main)
