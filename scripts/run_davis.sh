#!/bin/sh
# Inverts and edits the clips of a list or of a DAVIS tree (python -m scripts.batch.batch --help):
#
#     sh scripts/run_davis.sh configs/davis.yaml
#     PROCESSES=4 sh scripts/run_davis.sh configs/davis.yaml       # four processes, a GPU for each
#
# Stopped at any time, the same command goes on. PYTHON names another interpreter.
set -eu
python=${PYTHON:-python}
export PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}"
if [ "${PROCESSES:-1}" -le 1 ]; then
    exec "$python" -m scripts.batch.batch "$@"
fi

# The launcher's own exit status does not tell how many clips failed: the summary's does.
run=$(uname -n)-$$-$(date +%s)
"$python" -m accelerate.commands.launch --multi_gpu --num_processes "$PROCESSES" --num_machines 1 \
    --mixed_precision no --dynamo_backend no --module scripts.batch.batch --run "$run" --quiet "$@" &
launcher=$!
trap : INT # the terminal's reaches the launcher too
trap 'kill -TERM "$launcher"' TERM HUP
status=0
wait "$launcher" || status=$?
if [ "$status" -gt 128 ]; then # this script was asked to end, and asked the launcher
    wait "$launcher" || true
    echo "interrupted; the same command goes on with what is finished by now:" \
        "PROCESSES=$PROCESSES sh $0 $*" >&2
    exit "$status"
fi
summary=0
"$python" -m scripts.batch.batch --run "$run" --summary "$@" || summary=$?
if [ "$status" -ne 0 ] && [ "$summary" -eq 130 ]; then # jobs were not reached, and nobody asked
    summary=255
fi
exit "$summary"
