"""A run of train.py on random tokens, for benchmarks that call its steps one by one.

    run, batches = prepare(folder, Setting({"vocab_size": 4000, ...}, num_rows=8, length=256))
    train_step(run, batches)

The folder holds `model`, a checkpoint. Three quarters of each row are supervised.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import flags
from minisft.common import processes
from minisft.data.batching import Batches, micro_batches
from minisft.data.encoding import Example
from minisft.model.lora import LoraConfig
from minisft.model.reward import Model
from minisft.training.build import load_trainable
from minisft.training.lengths import already_encoded
from minisft.training.metrics import Progress
from minisft.training.objective import Objective
from minisft.training.optimizer import build_optimizer
from minisft.training.options import parse_options
from minisft.training.run import (
    Run,
    build_precision,
    build_schedule,
    count_rows_per_step,
    wrap_model,
)
from train import build_objective

SUPERVISED = 0.75  # share of a row
FULL = ("--finetuning_type", "full")
CHECKPOINTING = ("--gradient_checkpointing",)


@dataclass(frozen=True)
class Setting:
    """A model, a batch, and flags of train.py."""

    config: dict[str, Any]  # fields of config.json
    num_rows: int = 8  # in a micro-batch
    length: int = 256  # tokens of a row, or of each of its two answers
    num_micro_batches: int = 1
    dtype: str = "float32"
    flags: tuple[str, ...] = ()
    num_processes: int = 1

    def options(self, folder: str | Path) -> Namespace:
        """The options of train.py."""
        words = flags(
            model_name_or_path=Path(folder) / "model",
            dataset="-",
            output_dir=folder,
            learning_rate=1e-4,
            per_device_train_batch_size=self.num_rows,
            max_steps=100,
            gradient_accumulation_steps=self.num_micro_batches,
        )
        return parse_options([*words, *self.flags])


def prepare(folder: Path, setting: Setting) -> tuple[Run, list[Any]]:
    """(a Run, as `main` of train.py fills it; this rank's micro-batches of a step)."""
    options = setting.options(folder)
    device, dtype = torch.device("cpu"), getattr(torch, setting.dtype)
    model, lora_config = load_trainable(options, folder / "model", dtype, device)
    num_texts = 2 if options.stage in ("rm", "dpo") else 1
    lengths = [setting.length] * num_texts
    supervised = np.tile(np.arange(setting.length) >= (1 - SUPERVISED) * setting.length, num_texts)
    generator, vocab_size = np.random.default_rng(0), setting.config["vocab_size"]
    rank, world_size = processes.rank(), processes.world_size()
    examples = [
        Example(generator.integers(0, vocab_size, sum(lengths)), supervised, lengths)
        for _ in range(setting.num_rows * setting.num_micro_batches * world_size)
    ]
    batches = Batches(examples, already_encoded)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    objective = build_objective(options, model, batches, None, autocast)
    run = new_run(options, model, lora_config, len(examples), dtype, device, objective)
    parts = micro_batches(examples, setting.num_rows, rank, world_size)
    return run, [run.collate(part) for part in parts]


def new_run(
    options: Namespace,
    model: Model,
    lora_config: LoraConfig | None,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    objective: Objective,
) -> Run:
    """A new Run, as `main` of train.py fills it."""
    rows_per_step = count_rows_per_step(options, processes.world_size())
    schedule = build_schedule(options, num_rows, rows_per_step)
    path = Path(options.output_dir) / "metrics.jsonl"
    return Run(
        options=options,
        model=model,
        lora_config=lora_config,
        objective=objective,
        optimizer=build_optimizer(model, options),
        schedule=schedule,
        precision=build_precision(options, dtype, device),
        progress=Progress(schedule.total_steps, path, device),
        wrapped=wrap_model(model, options),
    )
