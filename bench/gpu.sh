#!/usr/bin/env bash
# Everything that only a CUDA machine can prove, part by part: the build of the CUDA kernels, tests of all compiled kernels,
# compute-sanitizer, determinism, benchmarks.
#
#   bench/gpu.sh                        all parts
#   bench/gpu.sh sanitizer attention    some of them
#   bench/gpu.sh --list                 their names
#
#   OUT=bench/results  where JSON lines and gpu.log go        PYTHON=python3     the interpreter that has torch
#   LIMIT=580          seconds that a part may take           TOTAL=0            seconds for all parts, 0 for any; those left are skipped
#   PYTEST_ARGS=, BENCH_ARGS=, DENOISER_ARGS=, END_TO_END_ARGS=, RANKS_ARGS=  further arguments
#   BENCH_COMMIT=      the commit, where the tree has no history
#
# A part that fails or takes too long does not stop the others; the exit status says so at the end. No setting of the GPU is changed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

TESTS=(tests_ops tests_kernels tests_csrc tests_graphs ctest fuzz)
SANITIZER=(memcheck racecheck initcheck synccheck)
BENCH=(broadcast_residual project_residual attention short_attention quantize dequantize)
ALL=(build "${TESTS[@]}" determinism "${SANITIZER[@]}" "${BENCH[@]}" denoiser end_to_end memory ranks tables)

OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-580}
TOTAL=${TOTAL:-0}

# Names of parts and groups, one a line, as parts in the order given.
expand() {
  local name
  for name in "$@"; do
    case $name in
      all) printf '%s\n' "${ALL[@]}" ;;
      tests) printf '%s\n' "${TESTS[@]}" ;;
      sanitizer) printf '%s\n' "${SANITIZER[@]}" ;;
      bench) printf '%s\n' "${BENCH[@]}" ;;
      *)
        if [[ " ${ALL[*]} " != *" $name "* ]]; then
          echo "part '$name' is unknown; all, tests, sanitizer, bench, ${ALL[*]} are known: name one" >&2
          return 2
        fi
        echo "$name"
        ;;
    esac
  done
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit
fi
if [[ ${1:-} == --list ]]; then
  shift
  expand "${@:-all}"
  exit
fi
chosen=$(expand "${@:-all}") || exit

compute_sanitizer() {
  local path
  for path in "$(command -v compute-sanitizer)" /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer; do
    if [[ -x $path ]]; then
      echo "$path"
      return
    fi
  done
  return 1
}

# One process each, so that a broken device context ends with its part. Exit status 77: the part cannot be done here.
part() {
  local sanitizer json="$OUT/$1-$slug.jsonl"
  case $1 in
    build)
      if ! command -v nvcc > /dev/null && [[ ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
        echo "nvcc is neither on PATH nor in CUDA_HOME: the CUDA kernels were not compiled"
        return 77
      fi
      PAB_BUILD_CUDA=1 limited "$PYTHON" setup.py --quiet build_ext --inplace
      ;;
    ctest)
      if ! compgen -G 'build/cmake-*/CTestTestfile.cmake' > /dev/null; then
        echo "the CUDA kernels are not compiled: their device tests were not run"
        return 77
      fi
      limited ctest --test-dir "$(dirname "$(ls -t build/cmake-*/CTestTestfile.cmake | head -n 1)")" --output-on-failure
      ;;
    tests_csrc)
      # shellcheck disable=SC2086
      limited "$PYTHON" -m pytest tests/csrc -q ${PYTEST_ARGS:-}
      ;;
    fuzz)
      # shellcheck disable=SC2086
      PAB_FUZZ_CALLS=10000 limited "$PYTHON" -m pytest tests/ops -q -k fuzz ${PYTEST_ARGS:-}
      ;;
    tests_ops)
      local parallel=()
      "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 8)
      # shellcheck disable=SC2086  # further arguments are words
      limited "$PYTHON" -m pytest tests/ops -q "${parallel[@]}" ${PYTEST_ARGS:-}
      ;;
    tests_graphs)
      if ! "$PYTHON" -c 'import diffusers' 2> /dev/null; then
        echo "diffusers is not installed: CUDA graphs and host memory were not tested with its models"
        return 77
      fi
      # shellcheck disable=SC2086
      limited "$PYTHON" -m pytest tests/broadcast/graphs/test_cuda_graphs_gpu.py tests/broadcast/test_offload_gpu.py -q ${PYTEST_ARGS:-}
      ;;
    tests_kernels)
      # shellcheck disable=SC2086
      limited "$PYTHON" -m pytest tests/kernels -q ${PYTEST_ARGS:-}
      ;;
    determinism)
      rm -f "$json"
      limited "$PYTHON" -m bench.sanitize --device cuda --repeats 20 --dtype bfloat16,float16,float32 --json "$json" || return
      limited "$PYTHON" -m bench.sanitize --device cuda --repeats 20 --geometry open-sora-480p-2s,cogvideox-5b --json "$json"
      ;;
    memcheck | racecheck | initcheck | synccheck)
      if ! sanitizer=$(compute_sanitizer); then
        echo "compute-sanitizer is neither on PATH nor in /usr/local/cuda*: $1 was not done"
        return 77
      fi
      local options=(--tool "$1" --error-exitcode 99 --print-limit 20) poison=()
      [[ $1 == initcheck ]] && poison=(--no-poison)
      # Every allocation is torch's own, not a piece of a cached block, so that its bounds are those that are checked.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$sanitizer" "${options[@]}" "$PYTHON" -m bench.sanitize --device cuda --repeats 1 "${poison[@]}"
      ;;
    denoiser)
      if ! "$PYTHON" -c 'import diffusers' 2> /dev/null; then
        echo "diffusers is not installed: the denoiser was not measured"
        return 77
      fi
      rm -f "$json" "${json%.jsonl}-graphs.jsonl"
      # shellcheck disable=SC2086
      limited "$PYTHON" -m bench.denoiser --device cuda --dtype bfloat16 --json "$json" ${DENOISER_ARGS:-} || return
      # shellcheck disable=SC2086
      limited "$PYTHON" -m bench.denoiser --device cuda --dtype bfloat16 --cuda-graphs --json "${json%.jsonl}-graphs.jsonl" ${DENOISER_ARGS:-}
      ;;
    end_to_end)
      if ! "$PYTHON" -c 'import diffusers' 2> /dev/null; then
        echo "diffusers is not installed: no denoising run was measured"
        return 77
      fi
      rm -f "$json"
      # shellcheck disable=SC2086
      limited "$PYTHON" -m bench.end_to_end --device cuda --size 51x480x854 --repeats 2 --out "$json" ${END_TO_END_ARGS:-}
      ;;
    memory)
      if ! "$PYTHON" -c 'import diffusers' 2> /dev/null; then
        echo "diffusers is not installed: slots of fewer bits were not measured"
        return 77
      fi
      rm -f "$json"
      limited "$PYTHON" -m bench.memory --device cuda --parts slots,bus --clips 16 --out "$json"
      ;;
    ranks)
      local gpus
      gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
      if ((gpus < 2)); then
        echo "there is one GPU: runs on several ranks were not measured"
        return 77
      fi
      rm -f "$json"
      # shellcheck disable=SC2086
      limited "$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus" -m bench.ranks --out "$json" ${RANKS_ARGS:-}
      ;;
    tables)
      local files=() op
      for op in "${BENCH[@]}"; do
        [[ -s $OUT/$op-$slug.jsonl ]] && files+=("$OUT/$op-$slug.jsonl")
      done
      if [[ ${#files[@]} == 0 ]]; then
        echo "nothing was measured"
        return 77
      fi
      limited "$PYTHON" -m bench.table "${files[@]}"
      ;;
    *)
      rm -f "$json"
      # shellcheck disable=SC2086
      limited "$PYTHON" -m bench --op "$1" --device cuda --seconds $((limit * 3 / 4)) --json "$json" ${BENCH_ARGS:-}
      ;;
  esac
}

limited() { timeout --kill-after=20 "$limit" "$@"; }

mkdir -p "$OUT" || exit
log=$OUT/gpu.log
: > "$log" || exit
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [[ -z $gpu ]]; then
  echo "no CUDA device: '$PYTHON' has no torch, or its torch sees none" | tee -a "$log" >&2
  exit 1
fi
slug=$(tr '[:upper:] ' '[:lower:]-' <<< "$gpu" | tr -cd 'a-z0-9-')
echo "$gpu; log: $log"

results=()
failed=0
while read -r name; do
  left=$((TOTAL == 0 ? LIMIT + 10 : TOTAL - SECONDS))
  limit=$((left < LIMIT ? left : LIMIT))
  began=$SECONDS
  echo "== $name" | tee -a "$log"
  if ((left < 10)); then
    status=skipped what="the $TOTAL s were up"
  else
    before=$(wc -l < "$log")
    part "$name" < /dev/null >> "$log" 2>&1
    code=$?
    what=$(tail -n "+$((before + 1))" "$log" | grep -v '^ *$' | tail -n 1 | tr '\t' ' ' | cut -c 1-100)
    case $code in
      0) status=passed ;;
      77) status=missing ;;
      124 | 137) status="time's up" ;;
      *) status="failed ($code)" ;;
    esac
  fi
  [[ $status == passed || $status == missing ]] || failed=1
  results+=("$name"$'\t'"$status"$'\t'"$((SECONDS - began))"$'\t'"$what")
  [[ $name == tables && $status == passed ]] && tail -n "+$((before + 1))" "$log"
done <<< "$chosen"

printf '%s\n' "${results[@]}" | "$PYTHON" -m bench.parts "$OUT/gpu-$slug.jsonl" || failed=1
echo
printf '%-20s %-12s %6s  %s\n' part ended seconds "last line"
while IFS=$'\t' read -r name status seconds what; do
  printf '%-20s %-12s %6s  %s\n' "$name" "$status" "$seconds" "$what"
done < <(printf '%s\n' "${results[@]}")
exit "$failed"
