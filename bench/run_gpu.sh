#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes, offline, from a bare checkout: builds, tests, sanitizes and measures.
#
#   bench/run_gpu.sh OUTDIR
#
# OUTDIR gets gpu.json and a log of each stage, log-STAGE.txt; a line for each says how it went. Exit status 1 if any failed.
#   STAGES="build tests graph sanitize bench"  which of them, in this order
#   WHEELS=DIR     wheels of what is missing, such as hypnettorch; installed aside, for this run only
#   LIMIT=525      seconds for all of it
#   COMMIT=NAME    what is measured, where the checkout has no .git
#   DEVICE=cpu     tries the script out where there is no GPU: no CUDA code, no tests, tiny shapes
set -u

prepare() {
  export DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 MAX_JOBS=${MAX_JOBS:-$(nproc)}
  export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TMP
  export COMMIT=${COMMIT:-$(commit)}
  TMP=$(mktemp -d)
  trap 'rm -rf "$TMP"' EXIT
  [ -n "${WHEELS:-}" ] || return 0
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$TMP/site" "$WHEELS"/*.whl || exit 1
  PYTHONPATH=$PYTHONPATH:$TMP/site
}

commit() {
  local name
  name=$(git rev-parse --short=12 HEAD 2>/dev/null) || { echo unknown; return; }
  [ -z "$(git status --porcelain -uno)" ] && echo "$name" || echo "$name+"
}

build() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${capability:-9.0}} FASTHYPER_BUILD=cuda
  [ "$DEVICE" = cuda ] || FASTHYPER_BUILD=cpu
  python3 setup.py -q build_ext --inplace || return 1
  python3 -c 'import fasthyper, os, sys
serves = fasthyper.backends()[os.environ["DEVICE"]]
print(serves)
sys.exit(serves.startswith(("reference", "none")))'
}

# warnings are errors where versions are pinned; here they are those of the machine
run_pytest() {
  local workers=()
  python3 -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
  python3 -m pytest -W default -p no:benchmark -p no:cacheprovider --hypothesis-profile=few -rf --tb=short "${workers[@]}" -m gpu "$@"
}

tests() {
  # shellcheck disable=SC2046
  run_pytest $(grep -lE 'implementation|IMPLEMENTATIONS|mark\.gpu' tests/test_*.py | grep -v test_graph)
}

graph() {
  [ -e tests/test_graph.py ] || { echo "no tests/test_graph.py"; return 0; }
  run_pytest tests/test_graph.py
}

# A process for each tool and file, all at once; each tensor is a block of its own, so that an access beyond it shows. Time
# that is up ends the tests as Ctrl-C does, which a background job would ignore: what was found until then is reported.
sanitize() {
  local name tool failed=0 status jobs=() seconds=$(($1 - 15))
  for tool in "memcheck --report-api-errors no" racecheck; do
    for name in output_drift hypernet_drift target_drift pair_drift generate wide_generate hyper_linear adam candidate_step; do
      jobs+=("${tool%% *}-$name")
      sanitize_file "$tool" "$name" $seconds >"$TMP/${jobs[-1]}" 2>&1 &
    done
  done
  wait
  for name in "${jobs[@]}"; do
    status=$(cat "$TMP/$name.status")
    echo "== $name: status $status (9: found something, 1: a test failed, 2, 124, 137: cut short)"
    [ "$status" = 0 ] && tail -n 4 "$TMP/$name" || tail -n 200 "$TMP/$name" | cut -c 1-300
    case $status in 0 | 2 | 124 | 137) ;; *) failed=1 ;; esac
    ! grep -qE 'SUMMARY: [1-9][0-9]* (error|hazard)|^=+ +(ERROR: |Invalid |Misaligned |Error: Race)' "$TMP/$name" || failed=1
  done
  echo "$(cat "$TMP"/*.status | grep -cx 0) of ${#jobs[@]} processes ended without a finding," \
    "$(cat "$TMP"/*.status | grep -cxE '2|124|137') were cut short"
  return $failed
}

sanitize_file() {
  local tool=$1 name=$2 seconds=$3 job
  # shellcheck disable=SC2086
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 8 "$seconds" compute-sanitizer --tool $tool --error-exitcode 9 \
    python3 -c 'import pytest, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main())' -v --tb=short -W default -p no:benchmark -p no:cacheprovider --hypothesis-profile=few -m gpu \
    -k "not f64" "tests/test_$name.py" &
  job=$!
  wait $job
  echo $? >"$TMP/${tool%% *}-$name.status"
  kill -KILL -- -$job 2>/dev/null # what outlives the sanitizer would take the GPU from what comes next
}

bench() {
  local quick=()
  [ "$DEVICE" = cuda ] || quick=(--quick)
  python3 bench/gpu.py "$OUT/gpu.json" --device "$DEVICE" --seconds $(($1 - 30)) --commit "$COMMIT" "${quick[@]}"
}

if [ $# -eq 3 ] && [ "$1" = --stage ]; then # what this script starts itself
  "$2" "$3"
  exit
fi
if [ $# -ne 1 ]; then
  sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1" && OUT=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 1
export OUT
prepare
declare -A MOST=([build]=180 [tests]=170 [graph]=45 [sanitize]=80 [bench]=330)
failures=0
for stage in ${STAGES:-build tests graph sanitize bench}; do
  [ -n "${MOST[$stage]:-}" ] || { echo "unknown stage $stage; choose from ${!MOST[*]}"; exit 2; }
  began=$SECONDS left=$((${LIMIT:-525} - SECONDS))
  seconds=$((left < ${MOST[$stage]} ? left : ${MOST[$stage]}))
  log=$OUT/log-$stage.txt status=124
  [ $seconds -gt 35 ] && { timeout -k 10 $seconds bash "bench/run_gpu.sh" --stage $stage $seconds >"$log" 2>&1; status=$?; }
  case $status in 0) verdict=ok ;; 124 | 137) verdict="out of time" ;; *) verdict="FAILED ($status)" ;; esac
  [ $status -eq 0 ] || failures=$((failures + 1))
  echo "$stage: $verdict, $((SECONDS - began)) s: $(tail -n 1 "$log" 2>/dev/null | cut -c 1-200)"
done
find "$OUT" -name 'log-*.txt' -size +15M -exec truncate -s 15M {} +
exit $((failures > 0))
