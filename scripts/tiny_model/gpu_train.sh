#!/usr/bin/env sh
# Train the small model on a GPU and measure it. Run it again to resume after an interruption.
# In $OUT: tiny.tar in pieces of 15 MiB (cat $OUT/tiny.tar.* | tar -x -C models/tiny), the
# figures, and the sample sheets. To try it all in a few minutes on a CPU:
#   BUDGET=smoke WORK=latents/smoke CHECK="--quick --clips 1 --pictures 4" sh scripts/tiny_model/gpu_train.sh
set -eu
PY=${PY:-python}
OUT=${OUT:-tokenflow-results/gpu_train}
WORK=${WORK:-latents/tiny-training}
BUDGET=${BUDGET:-gpu}
START=${START:-}  # models/tiny to start from its weights, with BUDGET=gpu_finetune
CHECK=${CHECK:---clips 20 --pictures 200}

mkdir -p "$OUT"
"$PY" -m scripts.tiny_model.train all --budget "$BUDGET" --model "$WORK/model" --work "$WORK" \
  ${START:+--start "$START"}
rm -f "$OUT"/tiny.tar*
tar -C "$WORK/model" -cf "$WORK/tiny.tar" .
split -b 15m "$WORK/tiny.tar" "$OUT/tiny.tar."
tar -C "$WORK" -czf "$OUT/sheets.tar.gz" $(cd "$WORK" && find . -name 'sheet_*' -o -name log.csv)
# shellcheck disable=SC2086
"$PY" -m scripts.tiny_model.check $CHECK --model "$WORK/model" --work "$WORK/check" --json "$OUT/check.json"
