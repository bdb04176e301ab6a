#!/usr/bin/env sh
# The demo: one short clip, inverted once and edited by each technique. Run by `make demo`.
# What is there already is kept; `make clean` removes it.
set -eu
PY=${PY:-python}

if [ ! -f models/tiny/model_index.json ]; then
    echo "== models/tiny: a small model with random weights: it edits like noise, not like SD"
    "$PY" scripts/make_tiny_model.py models/tiny --controlnet
fi
if [ ! -f data/demo.mp4 ]; then
    echo "== data/demo.mp4: a synthetic clip"
    "$PY" scripts/make_sample_clip.py data/demo.mp4 --frames 16 --size 128
fi

echo "== inversion"
line=$("$PY" preprocess.py --data_path data/demo.mp4 --sd_version tiny --n_frames 16 \
    --H 128 --W 128 --steps 100 --save_steps 20 --inversion_prompt "a yellow star over a wall")
echo "$line"
set -- "source=data/demo.mp4" "inversion=${line#cache: }/inverted.mp4"
for technique in pnp sdedit controlnet; do
    echo "== edit by $technique"
    line=$("$PY" "run_tokenflow_$technique.py" --config "configs/demo_$technique.yaml")
    echo "$line"
    set -- "$@" "$technique=${line#result: }/edited.mp4"
done
echo "== a picture of it all"
"$PY" scripts/strip.py tokenflow-results/demo.png --size 80 "$@"
