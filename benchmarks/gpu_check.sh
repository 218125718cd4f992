#!/bin/sh
# All that needs a GPU, in a few minutes, one line a figure: sh benchmarks/gpu_check.sh [WORKLOAD.py DATASETS]
# From the checkout, with the packages of requirements-dev.txt; PYTHON names the interpreter.
set -u
PYTHON=${PYTHON:-python}
$PYTHON -c 'import torch; print("device:", torch.cuda.get_device_name(), "torch", torch.__version__)' || exit 1
echo "tests that need a GPU:"
timeout 100 $PYTHON -m pytest -q -n 0 -m gpu tests | tail -n 3
timeout 120 $PYTHON -m benchmarks.throughput --device cuda --pixels 224 --batch 16
timeout 40 $PYTHON -m benchmarks.throughput --device cuda --pixels 224 --batch 16 --repeats 1 --only merge |
    grep '^whole merge'
timeout 40 $PYTHON -m benchmarks.memory_use --device cuda --only classifiers_tied fits | tail -n 3
if [ $# -eq 2 ]; then
    results=$(mktemp -d)
    echo "merge of $1:"
    /usr/bin/time -f "%e s in all, peak memory of the host %M KiB" timeout 170 $PYTHON merge_workloads.py \
        --workload "$1" --datasets "$2" --results "$results" --device cuda --time-budget 150s | tail -n 12
    rm -r "$results"
fi
