#!/bin/sh
# Inverts and edits the clips of a list or of a DAVIS tree (all options: sh scripts/run_davis.sh --help):
#
#     sh scripts/run_davis.sh configs/davis.yaml                   # one job on each GPU at a time
#     PROCESSES=4 sh scripts/run_davis.sh configs/davis.yaml       # four jobs at a time
#
# Stopped at any time, the same command resumes. PYTHON names another interpreter.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m scripts.batch.batch ${PROCESSES:+--jobs "$PROCESSES"} "$@"
