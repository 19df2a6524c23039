#!/usr/bin/env bash
# Make the embedded base model: write its text, train its tokenizer, pre-train it (20 minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
python examples/make_data.py --pretrain
python examples/make_tokenizer.py
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train.py --model_name_or_path examples/base \
    --train_from_scratch --finetuning_type full --stage pt --dataset examples/data/pretrain.txt \
    --block_size 128 --per_device_train_batch_size 4 --learning_rate 4e-3 --adam_beta2 0.98 \
    --weight_decay 0.05 --warmup_steps 100 --num_train_epochs 1 --dtype float32 \
    --output_dir runs/base --overwrite_output_dir
cp runs/base/model.safetensors examples/base/
