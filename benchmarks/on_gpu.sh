#!/usr/bin/env bash
# Nine minutes of a GPU, all phases or those named; see "On a GPU" in benchmarks/README.md.
#
#   benchmarks/on_gpu.sh [info] [smoke] [tests] [attention] [steps] [tiles] [sanitize]
#
# Environment: DEVICE (cuda; cpu rehearses), OUT (folder of the results; benchmarks/results/gpu, a rehearsal's build/on_gpu),
# PROGRESS (records that need not be taken again; benchmarks/results/gpu/results.jsonl), LIMIT (seconds in all; 540, a
# rehearsal's 300), PYTHON (python3).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m benchmarks.gpu.driver "$@"
