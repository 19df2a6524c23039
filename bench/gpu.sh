#!/usr/bin/env bash
# All benchmarks on one GPU, a line or two each, for docs/benchmarks.md: bash bench/gpu.sh [PYTHON]
# The tests come first: figures of a model that computes something else would mean nothing.
# A benchmark that fails ends with the last lines it wrote, and the next one goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${1:-python}
ERRORS=$(mktemp)
trap 'rm -f "$ERRORS"' EXIT

bench() {
    echo "\$ bench/$*"
    "$PYTHON" "bench/$1" --device cuda --dtype bfloat16 "${@:2}" 2>"$ERRORS" || tail -3 "$ERRORS"
}

"$PYTHON" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"; date -u +%F
"$PYTHON" -m pytest -q tests/test_cuda.py || exit 1
LONG="--cutoff_len 2048 --synthetic_rows 96 --batch_size 4 --sides minisft best --repeats 2"
for shape in tinyllama llama3-8b; do
    for type in lora full; do
        # Eight layers of Llama-3-8B: its weights, gradients and AdamW in float32 are 130 GB.
        [ "$shape $type" = "llama3-8b full" ] && layers="--num_layers 8" || layers=""
        bench train.py --shape $shape $layers --finetuning_type $type $LONG --compile
        bench train.py --shape $shape $layers --finetuning_type $type $LONG
    done
    bench generate.py --shape $shape --repeats 3
    bench generate.py --shape $shape --repeats 3 --batch_size 1 --compile
done
bench generate.py --shape llama3-8b --repeats 3 --batch_size 1 --compile --max_length 8192
DATA=../shared/data  # real tokenizers and rows, where they are
if [ -d "$DATA" ]; then
    echo "\$ bench/score.py"
    "$PYTHON" bench/score.py --dtype bfloat16 --config_dir "$DATA/configs/TinyLlama-1.1B-Chat-v0.6" \
        --tokenizer_dir "$DATA/tokenizers/TinyLlama-1.1B-Chat-v0.6" --batch_tokens 32768 --workers 4 \
        --dataset "$DATA/instruct/cherry_alpaca.json" 2>"$ERRORS" || tail -3 "$ERRORS"
fi
