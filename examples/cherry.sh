#!/usr/bin/env bash
# The recipe of arXiv 2308.12032: select the few per cent of rows that teach most ("cherry data"),
# train on them, evaluate. It takes any model and data set. Without settings it takes the embedded ones
# and runs for a few minutes.
#
#   MODEL=TinyLlama/TinyLlama-1.1B-Chat-v1.0 DATASET=alpaca_data.json HELDOUT=heldout.json \
#       TEMPLATE=alpaca CLUSTERS=100 OUTPUT=runs/alpaca TRAIN="--learning_rate 2e-4" \
#       examples/cherry.sh
#
# TRAIN holds flags of train.py. The default trains a LoRA adapter;
# TRAIN="--finetuning_type full --learning_rate 2e-5" trains all weights. Run an interrupted recipe
# again, and it continues where it stopped. With another SAMPLE_RATE only the last two steps run.
# With N GPUs: PYTHON="torchrun --nproc_per_node N".
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-examples/base}
DATASET=${DATASET:-examples/data/train.json}
HELDOUT=${HELDOUT:-examples/data/heldout.json}
TEMPLATE=${TEMPLATE:-plain}
OUTPUT=${OUTPUT:-runs/cherry}
CLUSTERS=${CLUSTERS:-30} # 100 for a data set like Alpaca
PER_CLUSTER=${PER_CLUSTER:-10}
SAMPLE_RATE=${SAMPLE_RATE:-0.05}
EPOCHS=${EPOCHS:-3}
TRAIN=${TRAIN:---lora_rank 16 --learning_rate 2e-3 --adam_beta2 0.98}
PYTHON=${PYTHON:-python}

about=(--model_name_or_path "$MODEL" --template "$TEMPLATE")
rows=(--dataset "$DATASET" --skip_bad_rows)
# shellcheck disable=SC2086  # PYTHON and TRAIN are several words
run() { echo "\$ $PYTHON $*"; $PYTHON "$@"; }
train() { # folder, data, flags; skips a finished run, refuses one with other settings
    local made
    made="${about[*]} $TRAIN ${*:2} $(cksum < "$2")"
    if [ ! -e "$1.made_by" ] || [ ! -d "$1" ]; then
        run train.py "${about[@]}" $TRAIN --output_dir "$1" --resume_from_checkpoint auto \
            --dataset "${@:2}"
        echo "$made" > "$1.made_by"
    elif [ "$made" != "$(cat "$1.made_by")" ]; then
        echo "error: $1: was trained with other settings or rows. Set another OUTPUT." >&2
        exit 2
    fi
}
mkdir -p "$OUTPUT"

# 1. Embed the instructions with the model as it is.
run score.py "${about[@]}" "${rows[@]}" --mode embed --output "$OUTPUT/before.jsonl"

# 2. Choose a few rows of every kind, of medium perplexity: the pre-experience.
run select.py "${rows[@]}" --embeddings "$OUTPUT/before.embeddings.npy" --strategy cluster \
    --clusters "$CLUSTERS" --per_cluster "$PER_CLUSTER" --output "$OUTPUT/pre.json" --overwrite

# 3. Train one epoch on them, so that the model knows what an instruction is.
train "$OUTPUT/pre" "$OUTPUT/pre.json" --num_train_epochs 1

# 4. Score every row: how much does the instruction help this model to write the answer?
scored=(--model_name_or_path "$OUTPUT/pre" --template "$TEMPLATE")
if [ -e "$OUTPUT/pre/adapter_config.json" ]; then
    scored=("${about[@]}" --adapter "$OUTPUT/pre")
fi
run score.py "${scored[@]}" "${rows[@]}" --output "$OUTPUT/scores.jsonl"

# 5. Select the rows where it helps least: they teach most.
run select.py "${rows[@]}" --scores "$OUTPUT/scores.jsonl" --strategy ifd \
    --sample_rate "$SAMPLE_RATE" --output "$OUTPUT/cherry-$SAMPLE_RATE.json" --overwrite

# 6. Train the original model on them, and evaluate on held-out rows.
train "$OUTPUT/model-$SAMPLE_RATE" "$OUTPUT/cherry-$SAMPLE_RATE.json" --num_train_epochs "$EPOCHS" \
    --eval_dataset "$HELDOUT"
tail -n 1 "$OUTPUT/model-$SAMPLE_RATE/metrics.jsonl"
