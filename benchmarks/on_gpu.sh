#!/usr/bin/env bash
# Build, test and benchmark on a GPU machine without network that has torch >= 2.10, nvcc and, better, triton, transformers,
# peft, pytest and pytest-benchmark.
#
#   benchmarks/on_gpu.sh [build] [test] [sanitize] [bench]      all four without an argument
#
# Leaves logs and JSON in $OUT (default benchmarks/results), the installation in $SITE (default build/site). Every part is
# stopped after 540 s. One part that fails does not stop the others; the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/benchmarks/results}
SITE=${SITE:-$PWD/build/site}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The installed package is what is tested: "-m pytest" would put the source tree before it.
PYTEST=("$PYTHON" -P -m pytest -p no:cacheprovider -o timeout=0)
failed=()

part() { # name, command...
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  timeout 540 "$@" 2>&1 | tee "$OUT/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || failed+=("$name")
}

build() {
  rm -rf "$SITE"
  FASTPROMPT_CUDA=1 part build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -v --target "$SITE" .
  part info "$PYTHON" -P -c "import fastprompt.info; fastprompt.info.describe()"
  part gpu nvidia-smi
}

tests() { # the operators on the GPU, and on its CPU
  local triton=(tests/ops/test_*_triton.py)
  part test "${PYTEST[@]}" tests/ops "${triton[@]/#/--ignore=}" --junitxml="$OUT/test.xml"
  part test_triton "${PYTEST[@]}" "${triton[@]}" --junitxml="$OUT/test_triton.xml" # apart: it compiles its kernels
}

sanitize() {
  # Without the caching allocator every tensor has memory of its own, so that a step beyond one is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitize compute-sanitizer --tool memcheck --error-exitcode 1 \
    --target-processes all "${PYTEST[@]}" tests/ops/test_pack_prompt.py -m gpu \
    -k "native and (test_every_dtype or test_non_contiguous)"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitize_triton compute-sanitizer --tool memcheck --error-exitcode 1 \
    --target-processes all "${PYTEST[@]}" tests/ops/test_prefix_attention_triton.py -k test_every_subset_of_requires_grad
  local tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "sanitize_cuda_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all "${PYTEST[@]}" tests/ops/test_prefix_attention_cuda.py -m gpu \
      -k "test_layouts_and_scales or test_next_to_nothing or test_every_subset_of_requires_grad"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "sanitize_alignment_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all "${PYTEST[@]}" tests/ops/test_alignment.py -m gpu -k "native and test_shapes and infonce"
  done
}

bench() { # in parts, each below the limit; what was measured is kept even if a part is stopped
  local cases
  for cases in step attention/B8- attention/B1- attention/B32- alignment/cosine alignment/infonce pooling packing; do
    local name=bench-${cases//\//-}
    part "$name" "$PYTHON" -P -m fastprompt.cli bench "$cases" --device cuda --budget 1 --out "$OUT/$name"
  done
}

[ $# -gt 0 ] || set -- build test sanitize bench
for name in "$@"; do
  case $name in
    build | sanitize | bench) "$name" ;;
    test) tests ;;
    *) echo "unknown part: $name (build, test, sanitize, bench)" >&2 && exit 2 ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
