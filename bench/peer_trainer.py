"""Two epochs of fine-tuning with transformers' Trainer, the peer of bench/train.py.

    result = train_with_trainer(options, model, rows)
    result["seconds"], result["tokens"]        # of each epoch

transformers and peft are imported in the functions: bench/gpu.py also measures where they are not
installed.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.limits import peak_memory, wait

EncodedRow = tuple[list[int], list[bool]]  # token ids, and True for supervised tokens
# "seconds", "tokens" and "padding" of each epoch; "peak" of the process.
Result = dict[str, Any]


class PaddingCollator:
    """Pads the rows of a batch on the right, to a multiple of 8, and counts tokens and padding."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.padding: list[int] = []

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The inputs of the model."""
        lengths = [len(row["input_ids"]) for row in batch]
        width = -(-max(lengths) // 8) * 8
        self.tokens.append(sum(lengths))
        self.padding.append(width * len(batch) - sum(lengths))

        def padded(name: str, value: int) -> torch.Tensor:
            """A column of the rows, filled up with a value."""
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch])

        mask = [[1] * length + [0] * (width - length) for length in lengths]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }


def trainer_rows(rows: Sequence[EncodedRow]) -> list[dict[str, Any]]:
    """The rows in transformers' form, whose labels are -100 where a token is not supervised."""
    return [
        {
            "input_ids": ids,
            "length": len(ids),
            "labels": [
                token if is_target else -100
                for token, is_target in zip(ids, supervised, strict=True)
            ],
        }
        for ids, supervised in rows
    ]


def steps_per_epoch(options: Namespace, num_rows: int) -> int:
    """The optimizer steps of an epoch."""
    return -(-num_rows // options.batch_size)


def trainer_arguments(options: Namespace, num_rows: int) -> Any:
    """transformers' TrainingArguments for a side."""
    from transformers import TrainingArguments

    is_best = options.side == "best"
    return TrainingArguments(
        options.folder + "/trainer",
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=2,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        report_to=[],
        bf16=is_best and options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        logging_steps=steps_per_epoch(options, num_rows),
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=options.gradient_checkpointing,
        torch_compile=options.compile and is_best,
        train_sampling_strategy="group_by_length" if is_best else "random",
    )


def train_with_trainer(options: Namespace, model: Any, rows: Sequence[EncodedRow]) -> Result:
    """Train two epochs of the rows with transformers' Trainer. model: transformers' own."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback

    device = torch.device(options.device)
    model.config.use_cache = False
    if options.finetuning_type == "lora":
        config = PeftConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear")
        model = get_peft_model(model, config)
        if options.gradient_checkpointing:
            model.enable_input_require_grads()
    times: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each epoch begins and ends."""

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            """Note the time."""
            wait(device)
            times.append(time.perf_counter())

        on_train_end = on_epoch_begin

    collator, dataset = PaddingCollator(), trainer_rows(rows)
    trainer = Trainer(
        model,
        trainer_arguments(options, len(rows)),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[Clock()],
    )
    trainer.train()
    num_steps = 2 * steps_per_epoch(options, len(rows))
    tokens, padding = (
        np.reshape(counts[:num_steps], (2, -1)).sum(1).tolist()
        for counts in (collator.tokens, collator.padding)
    )
    return {
        "seconds": np.diff(times).tolist(),
        "tokens": tokens,
        "padding": padding,
        "peak": peak_memory(device),
    }
