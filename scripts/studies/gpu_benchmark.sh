#!/usr/bin/env sh
# Measure speed and memory on a GPU, part by part: sh scripts/studies/gpu_benchmark.sh [PART ...]
# Parts: tests precision stages backends compare inversion scaling wide profile (default: all).
# In $OUT: each part's table (*.txt), figures (*.json) and log (*.log); the tables are printed at
# the end. A part that fails, such as a backend that is not installed, is reported there and does
# not stop the others.
# To try it all in a few minutes on a CPU:
#   DEVICE=cpu DTYPES=float32 MODEL=tiny-random FRAMES=4 SIZE=64 WIDE=48x64 STEPS=4 PLAIN=8 \
#   SCALING="2 4" SCALING_STEPS=2 REPEATS=1 BACKENDS="native _native_math" \
#   TESTS=tests/ops/test_profiling.py OUT=latents/gpu-try WORK=latents/gpu-try sh scripts/studies/gpu_benchmark.sh
set -u
PY=${PY:-python}
OUT=${OUT:-tokenflow-results/gpu_benchmark}
WORK=${WORK:-latents/benchmark}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-sd21-random}
SMALL=${SMALL:-tiny}               # of the precision part: a trained model
FRAMES=${FRAMES:-40}
SIZE=${SIZE:-512}
WIDE=${WIDE:-384x672}
STEPS=${STEPS:-50}
REPEATS=${REPEATS:-3}
DTYPES=${DTYPES:-"float16 bfloat16"}
BACKENDS=${BACKENDS:-"native _native_flash _native_efficient _native_cudnn xformers flash sage"}
PAIRS=${PAIRS:-"cached,live live,three_branch tokenflow,per_frame tokenflow,extended_attention compiled,tokenflow"}
FAST=${FAST:-fast}                 # compared with plain$PLAIN in the inversion part
PLAIN=${PLAIN:-500}
SCALING=${SCALING:-"8 16 40 80 120 200"}
SCALING_STEPS=${SCALING_STEPS:-10} # memory does not depend on them, and time is proportional
MEMORY_LIMIT=${MEMORY_LIMIT:-12}   # GiB that the runs of the scaling part may take of the GPU
TESTS=${TESTS:-tests}
PARTS=${*:-tests precision stages backends compare inversion scaling wide profile}

mkdir -p "$OUT"
rm -f "$OUT"/[0-9][0-9][0-9]-*.txt
count=100  # of the tables, which are printed in their order

keep() {  # keep NAME COMMAND...: its table in a file, its log in another
    name=$1
    shift
    count=$((count + 1))
    file="$OUT/$count-$name"
    echo "== $name: $*" | tee "$file.txt"
    "$@" >>"$file.txt" 2>"$file.log" || {
        echo "FAILED: $(tr '\r' '\n' <"$file.log" | tail -n 1)" | tee -a "$file.txt"
    }
}

bench() {  # bench NAME OPTIONS...
    name=$1
    shift
    keep "$name" "$PY" benchmark.py --model "$MODEL" --device "$DEVICE" --work "$WORK" \
        --frames "$FRAMES" --size "$SIZE" --steps "$STEPS" --repeats "$REPEATS" \
        --json "$OUT/$name.json" "$@"
}

for part in $PARTS; do
    case $part in
        tests) # shellcheck disable=SC2086
            keep tests "$PY" -m pytest -q $TESTS ;;
        precision)
            for dtype in $DTYPES; do
                for pair in $PAIRS; do
                    bench "precision-$dtype-${pair%,*}-${pair#*,}" --model "$SMALL" --frames 8 \
                        --size "$([ "$DEVICE" = cpu ] && echo "$SIZE" || echo 256)" \
                        --dtype "$dtype" --repeats 1 --compare "${pair%,*}" "${pair#*,}"
                done
            done ;;
        stages) bench stages ;;
        backends)
            for backend in $BACKENDS; do
                [ "$backend" = native ] && continue
                bench "backend-$backend" --compare "attention:$backend" attention:native
            done ;;
        compare)
            for pair in $PAIRS; do
                bench "compare-${pair%,*}-${pair#*,}" --compare "${pair%,*}" "${pair#*,}"
            done ;;
        inversion)
            bench inversion --compare "$FAST" "plain$PLAIN" --repeats 1 --warm_up 0 ;;
        scaling) # shellcheck disable=SC2086
            # One batch size for all, or what auto chooses would be measured.
            bench scaling --steps "$SCALING_STEPS" --preprocess_options "--batch_size 8" \
                --memory_limit "$MEMORY_LIMIT" --scaling $SCALING ;;
        wide) bench wide --size "$WIDE" --repeats 1 ;;
        profile) bench profile --profile tokenflow --steps 4 ;;
        *) echo "error: $part: expected one of the parts named above" >&2; exit 2 ;;
    esac
done
echo
cut -c-180 "$OUT"/[0-9][0-9][0-9]-*.txt
