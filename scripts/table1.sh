#!/bin/sh
# Table 1 on clips of your own: every row's edits, their scores, and the paper's figures.
#
#     sh scripts/table1.sh CLIPS_YAML [--jobs N] [--json FILE] [--markdown FILE] ...
#
# CLIPS_YAML is explained in configs/table1_davis.yaml; scripts/shapes/clips.py writes one for the
# small model. Stopped at any time, the same command resumes. PYTHON names another interpreter.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m scripts.table1.table1 "$@"
