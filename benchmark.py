"""Times preprocess and edits: seconds, UNet image-forwards, FLOPs and memory of every stage.

    python benchmark.py --model tiny --frames 16 --steps 50
    python benchmark.py --model sd21-random --frames 40 --size 512 --device cuda --json out.json
    python benchmark.py --compare tokenflow per_frame --json ratio.json
    python benchmark.py --scaling 8 16 32 64 --steps 10
    python benchmark.py --profile tokenflow --steps 4
    python benchmark.py --simulate --model sd21-random --frames 8 40 --size 512 --dtype float16

Without a mode, every stage of one preprocess and one edit is timed. `--compare A B` runs two
settings in turn, so that a machine that drifts drifts for both. `--scaling` runs each number of
frames in fresh processes, so that their memory is their own. `--simulate` needs no GPU: it counts
what preprocess and edits would allocate on one, for each number of frames.

Settings of an edit: tokenflow, cached, live, three_branch (a plain loop to compare with),
compiled, per_frame, extended_attention, first_frame, released, flow, attention:BACKEND, or any
key=value of its config; joined by +. Of preprocess: fast (--steps plain steps), early_stop (of
up to three evaluations), plainN (N plain steps, reconstructed in N), itersN (N iterations).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenflow.benchmarks.options import PARTS, Options, read_setting
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.schema import add_arguments, from_arguments
from util import ArgumentParser, UserError, at_least, check_writable, command_line, setup_logging


def parse_args(argv: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    """Reads and checks the command line; returns the options, and those of the modes."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Options)
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="key of the edit's config; any number of times")  # fmt: skip
    add("--preprocess_options", type=shlex.split, default=[], metavar='"--OPTION VALUE ..."',
        help="further options of preprocess.py")  # fmt: skip
    add("--json", metavar="FILE", type=Path, help="write all figures here; -: to stdout")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--only", choices=PARTS, help="time this part alone")
    add("--compare", nargs=2, metavar=("A", "B"), help="seconds of setting A over those of B")
    add("--scaling", nargs="+", type=at_least(1), metavar="FRAMES",
        help="time and memory for each of these numbers of frames")  # fmt: skip
    add("--profile", metavar="SETTING", help="the operators of an edit's step")
    add("--simulate", action="store_true", help="GPU memory, on a simulated GPU")
    args = parser.parse_args(argv)
    numbers = getattr(args, "frames", [Options.model_fields["frames"].default])
    each = [
        from_arguments(Options, argparse.Namespace(**{**vars(args), "frames": n})) for n in numbers
    ]
    options, args.frames = each[0], [one.frames for one in each]
    if len(each) > 1 and not args.simulate:
        raise UserError("--frames: several numbers go with --simulate; expected one")
    if len({read_setting(name)[0] for name in args.compare or ()}) > 1:
        raise UserError(
            f"--compare: {' and '.join(args.compare)} are settings of an edit and of preprocess; "
            "expected two of one kind"
        )
    if args.profile and read_setting(args.profile)[0] != "edit":
        raise UserError(f"--profile: {args.profile}, expected a setting of an edit")
    check_writable(options.work, "--work")
    if args.json is not None:
        check_report_path(args.json, "--json")
    return options, args


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the script; returns the figures that --json writes."""
    setup_logging()
    options, args = parse_args(argv)
    from tokenflow.benchmarks.modes import benchmark
    from tokenflow.benchmarks.simulate import simulate
    from tokenflow.ops.profiling import versions  # slow to import, all three

    found, text = (simulate if args.simulate else benchmark)(options, args)
    words = ["python", "benchmark.py", *(sys.argv[1:] if argv is None else argv)]
    found |= {"command": shlex.join(words), "versions": versions()}
    write_reports(text, [(args.json, json.dumps(found, indent=1) + "\n")] if args.json else [])
    return found


if __name__ == "__main__":
    command_line(main)
