#!/usr/bin/env bash
# PermutedMNIST-100 on a GPU, 5,000 steps a task, in slices: each goes on from the checkpoint in OUTDIR/run.
#
#   bench/run_gpu_longseq.sh OUTDIR [arguments of bench/longseq.py, such as --tf32 or --layout aligned]
#
#   DATA=DIR         folder with the four files of MNIST; without it scikit-learn's digits, upscaled, take their place
#   SECONDS_MAX=480  seconds for this slice
#   COMMIT=NAME      what is measured, where the checkout has no .git
#   STEPS=5000 TASKS=100 DEVICE=cuda
set -u
if [ $# -lt 1 ]; then
  sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1" && OUT=$(cd "$1" && pwd) && shift
DATA=${DATA:+$(cd "$DATA" && pwd)}
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
DEVICE=${DEVICE:-cuda}
COMMIT=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
[ "$DEVICE" != cuda ] || [ -e fasthyper/_C.abi3.so ] || STAGES=build bench/run_gpu.sh "$OUT/build" || exit 1
data=(--digits)
[ -z "$DATA" ] || data=(--data "$DATA")
python3 bench/longseq.py --out "$OUT" --steps "${STEPS:-5000}" --tasks "${TASKS:-100}" --seconds "${SECONDS_MAX:-480}" \
  --device "$DEVICE" --commit "$COMMIT" "${data[@]}" "$@" 2>&1 | tee -a "$OUT/log-longseq.txt"
exit "${PIPESTATUS[0]}"
