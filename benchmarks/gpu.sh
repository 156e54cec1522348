#!/usr/bin/env bash
# Builds peer on a machine with a GPU, tests it and measures it. It downloads nothing.
#
#   benchmarks/gpu.sh OUT [PHASE...]
#
# Needs CUDA 13 with nvcc, torch 2.11 or newer, cmake, ninja, rich, hypothesis, and pytest with xdist.
# It writes each result to the folder OUT as soon as it exists: log.txt (all output), phases.csv,
# rows.csv (the benchmark), kernels.csv (a training step by kernel), counters.csv, card.txt, and at
# the end summary.txt. A later call with the same OUT adds to them.
#
#   build     the library, for the GPUs of this machine, into build/gpu
#   agree     a first look: results equal the CPU's
#   tests     tests/cuda except large sizes and torch.compile
#   scale     large sizes
#   bench     the targets of the benchmark in bfloat16, beside eager and dense layers
#   profile   one training step with sparse gradients and one with the fused update, by kernel
#   counters  hardware counters of the five longest kernels of these steps
#   sanitize  compute-sanitizer on a few tests: memcheck, racecheck, synccheck, initcheck
#   compiled  torch.compile: tests, and the benchmark beside compiled layers and in float32; minutes
#
# Without a PHASE it runs all but the last. It stops after PEER_GPU_SECONDS, by default 480.
# With PEER_REHEARSE=1 it runs at tiny sizes on a device that is emulated on the CPU.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -eq 0 ]; then
  sed -n '2,/^set/{/^#/p}' "$0" | cut -c3-
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
every="build agree tests scale bench profile counters sanitize compiled"
phases=${*:-${every% compiled}}
for name in $phases; do
  [[ " $every " == *" $name "* ]] || { echo "no phase $name; there are: $every" >&2; exit 2; }
done
deadline=${PEER_GPU_SECONDS:-480}
patience=1
jobs=$(($(nproc) < 8 ? $(nproc) : 8))

build=$root/build/gpu
run=(python3)
pytest=(python3 -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root")
bench=(-m peer_bench --device cuda --csv "$out/rows.csv")
steps=("$root/benchmarks/gpu/steps.py")
tests=$root/tests/cuda
if [ "${PEER_REHEARSE:-}" = 1 ]; then
  deadline=${PEER_GPU_SECONDS:-3600}
  patience=5
  build=$root/build/emulated
  configure=(-DPEER_EMULATE_CUDA=ON)
  run=(python3 -m emulated_cuda)
  pytest+=(-p emulated_cuda)
  layer=(--tokens 16 --dim 32 --num-experts 1024 --heads 2 --k 4)
  bench+=("${layer[@]}" --dim-key 16 --rounds 1 --min-time 0 --bandwidth-mib 1)
  steps+=("${layer[@]}")
  export PYTHONPATH=$root/tests/emulated_cuda:${PYTHONPATH:-} PATH=$PATH:$root/tests/emulated_cuda/bin
else
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
  configure=(-DPEER_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$capability")
fi
site=$build/site
export PYTHONPATH=$site:$root/benchmarks:${PYTHONPATH:-} PYTHONUNBUFFERED=1

failed=0
record() { # PHASE STATUS SECONDS
  [ -s "$out/phases.csv" ] || echo "phase,status,seconds" > "$out/phases.csv"
  echo "$1,$2,$3" >> "$out/phases.csv"
  printf '%-14s %s, %d s\n' "$1" "$2" "$3"
}

# Runs a command within a time limit, and within the time that is left.
phase() { # PHASE SECONDS COMMAND...
  local name=$1 limit=$2 from=$SECONDS status
  shift 2
  limit=$((limit * patience))
  limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
  if ((limit < 5)); then
    record "$name" "no time left" 0
    failed=1
    return 1
  fi
  printf '\n==== %s\n' "$name" >> "$out/log.txt"
  timeout -k 5 "$limit" "$@" >> "$out/log.txt" 2>&1
  status=$?
  case $status in
    0) record "$name" ok $((SECONDS - from)) ;;
    124 | 137) record "$name" "cut off" $((SECONDS - from)) ;;
    *) record "$name" "failed" $((SECONDS - from)) ;;
  esac
  ((status == 0)) || failed=1
  return $status
}

wants() { [[ " $phases " == *" $1 "* ]]; }

trap 'python3 "$root/benchmarks/gpu/summary.py" "$out" | tee "$out/summary.txt"' EXIT
trap 'exit 1' INT TERM

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU"
  python3 -c 'import torch; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")'
  nvcc --version | tail -1
  echo "$(nproc) processors"
  echo "peer $(git -C "$root" describe --always --dirty 2> /dev/null || tail -1 "$root/peer/_version.py")"
} > "$out/card.txt" 2>&1

if wants build; then
  phase build 300 bash -c '
    root=$1 build=$2; shift 2
    cmake -S "$root" -B "$build" -G Ninja -DPEER_PYTHON="$(command -v python3)" "$@" &&
      cmake --build "$build" && rm -rf "$build/site" && mkdir "$build/site" &&
      cp -r "$root/peer" "$build/site/peer" &&
      cmake --install "$build" --prefix "$build/site/peer"' \
    build "$root" "$build" "${configure[@]}" || exit 1
elif [ ! -e "$site/peer/lib/libpeer.so" ]; then
  echo "nothing is built in $build; the first phase is build" >&2
  exit 2
fi
cd "$site" || exit 2 # python3 -m looks here first, and finds the package that was built, not its sources
wants agree && phase agree 60 "${pytest[@]}" -x "$tests/test_agreement.py" \
  -k "exact_scores or every_activation or same_bits"
wants tests && phase tests 150 "${pytest[@]}" -n "$jobs" "$tests" -k "not compile" \
  --ignore "$tests/test_scale.py"
wants scale && phase scale 60 "${pytest[@]}" "$tests/test_scale.py"
wants bench && phase bench 200 "${run[@]}" "${bench[@]}" --preset cuda-targets
wants profile && phase profile 60 "${run[@]}" "${steps[@]}" --out "$out"
if wants counters; then
  if command -v ncu > /dev/null && [ -s "$out/kernels.csv" ]; then
    longest=$(python3 "${steps[0]}" --largest 5 "$out/kernels.csv")
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum
    metrics+=,smsp__inst_executed.sum,sm__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
    for kind in sparse fused; do
      phase counters 60 ncu --clock-control none --csv --log-file "$out/counters-$kind.csv" \
        --kernel-name "regex:^($longest)$" --launch-count 12 --metrics "$metrics" \
        "${run[@]}" "${steps[@]}" --once "$kind"
    done
  else
    record counters "not run: needs ncu and kernels.csv" 0
  fi
fi
if wants sanitize; then
  if command -v compute-sanitizer > /dev/null; then
    # Without Torch's cache of memory, the sanitizer sees where every tensor ends. The tools run side
    # by side.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 phase sanitize 120 bash -c '
      for tool in memcheck racecheck synccheck initcheck; do
        (compute-sanitizer --tool $tool --error-exitcode 1 "$@" 2>&1 | sed "s/^/$tool: /"
          exit "${PIPESTATUS[0]}") &
        pids+=($!)
      done
      status=0
      for pid in "${pids[@]}"; do wait "$pid" || status=1; done
      exit $status' sanitize "${pytest[@]}" -x "$tests/test_agreement.py" \
      -k "(exact_scores and 7-6-4 and shared) or (every_activation and gelu_tanh)"
  else
    record sanitize "not run: needs compute-sanitizer" 0
  fi
fi
if wants compiled; then
  phase compiled-tests 120 "${pytest[@]}" "$tests" -k compile
  phase compiled 400 "${run[@]}" "${bench[@]}" --preset cuda-compiled
fi
exit $failed
