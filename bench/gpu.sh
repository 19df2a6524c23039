#!/usr/bin/env bash
# All benchmarks on one GPU, a line or two each, for docs/benchmarks.md: bash bench/gpu.sh [PYTHON]
# The tests come first: figures of a model that computes something else would mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${1:-python}
GPU="--device cuda --dtype bfloat16"
"$PYTHON" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"; date -u +%F
"$PYTHON" -m pytest -q tests/test_cuda.py || exit 1
for shape in tinyllama llama3-8b; do
    for type in lora full; do
        [ "$shape $type" = "llama3-8b full" ] && layers="--num_layers 8" || layers=""
        "$PYTHON" bench/train.py $GPU --shape $shape $layers --finetuning_type $type \
            --cutoff_len 2048 --synthetic_rows 96 --batch_size 4 --sides minisft best \
            --compile --repeats 1 2>/dev/null
    done
    "$PYTHON" bench/train.py $GPU --shape $shape --cutoff_len 2048 --synthetic_rows 96 \
        --batch_size 4 --sides minisft best --repeats 1 2>/dev/null
    "$PYTHON" bench/generate.py $GPU --shape $shape --repeats 3 2>/dev/null
done
