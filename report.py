"""Makes a page to look at results: source, reconstruction and every edit, playing in step.

python report.py tokenflow-results --metrics rows.json
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from util import ArgumentParser, command_line, setup_logging

log = logging.getLogger("tokenflow")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="folders that hold results")
    add("--metrics", nargs="+", type=Path, action="extend", default=[], metavar="ROWS",
        help="what evaluate.py --json wrote")  # fmt: skip
    add("--out", type=Path, default=Path("report"), help="the folder to write (default: report)")
    add("--title", default="TokenFlow results", help="the page's title")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    setup_logging()
    args = parse_args(argv)
    from tokenflow.figures.report_page import (  # slow to import
        PAGE,
        check_out,
        group_results,
        readable_results,
        rows_by_folder,
        write_report,
    )

    rows = rows_by_folder(args.metrics)
    results = readable_results(args.results)
    unmatched = len(rows.keys() - {os.path.realpath(result.folder) for result in results})
    if unmatched:
        log.warning("--metrics: %d of %d rows are of other results", unmatched, len(rows))
    groups = group_results(results)
    out = Path(os.path.realpath(args.out))
    check_out(out, groups)
    write_report(groups, rows, out, args.title)
    print(f"report: {args.out / PAGE} ({len(results)} results of {len(groups)} clips)")


if __name__ == "__main__":
    command_line(main)
