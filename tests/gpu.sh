#!/usr/bin/env bash
# All tests that need a GPU, those that may share one at the same time; logs in the given folder, or in a new one.
#   tests/gpu.sh [LOGS]        needs pytest-xdist and some 70 GB of GPU memory; the last three parts need two GPUs
set -uo pipefail
cd "$(dirname "$0")/.."
logs=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$logs"
echo "logs in $logs"
rm -f "$logs"/failed.*

run() { # NAME, arguments of pytest
  python3 -m pytest -m gpu -p no:cacheprovider --durations=10 "${@:2}" > "$logs/$1.log" 2>&1 || touch "$logs/failed.$1"
  echo "== $1, $((SECONDS - start)) s: $(tail -n 1 "$logs/$1.log")"
  grep -E '^(FAILED|ERROR)' "$logs/$1.log"
}

start=$SECONDS
last=$(($(nvidia-smi -L | wc -l) - 1)) # the second GPU, if there is one
engine() {
  run engine tests/test_gpu.py -n 3 --dist loadgroup -k "not sized and not any_gpu"
}
others() {
  # Alone on its GPU: these measure the memory that is in use, or use it up.
  run memory tests/test_gpu.py tests/test_gpu_faults.py -k "sized or test_gpu_faults"
  run kernels tests/test_kernels.py -n 5
  run deterministic tests/test_gpu_deterministic.py -n 3 --dist load
}
if [ "$last" -ge 1 ]; then
  CUDA_VISIBLE_DEVICES=0 engine &
  CUDA_VISIBLE_DEVICES=$last others &
  wait
else
  engine
  others
fi
run any_gpu tests/test_gpu.py -k "any_gpu"
run ranks tests/test_gpu_tensor_parallel.py tests/test_gpu_all_reduce.py tests/test_tensor_parallel_requests.py \
  -n 4 --dist load -k "not lost"
run lost tests/test_gpu_tensor_parallel.py tests/test_gpu_all_reduce.py -k "lost"
! ls "$logs"/failed.* 2> /dev/null
