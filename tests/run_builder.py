"""Options and a Run for tests that start in the middle of train.py.

options = training_options(finetuning_type="full")
run = new_run(options, model, num_rows=100)
train.train(run, batches)
"""

from pathlib import Path

import torch
from conftest import as_flags

from minisft.common import processes
from minisft.training.metrics import Progress
from minisft.training.objective import NextToken
from minisft.training.optimizer import build_optimizer
from minisft.training.options import parse_options
from minisft.training.run import (
    Run,
    build_precision,
    build_schedule,
    count_rows_per_step,
    wrap_model,
)


def training_options(*words, model_name_or_path="-", dataset="-", output_dir="-", **flags):
    """The options of train.py for tests that need no files."""
    flags.setdefault("learning_rate", 1e-4)  # no model decides
    files = as_flags(model_name_or_path=model_name_or_path, dataset=dataset, output_dir=output_dir)
    return parse_options([*files, *words, *as_flags(**flags)])


def new_run(
    options, model, lora_config=None, num_rows=1, objective=None, dtype=torch.float32, device="cpu"
):
    """A new run on `num_rows` rows, as `main` of train.py fills it."""
    device = torch.device(device)
    rows_per_step = count_rows_per_step(options, processes.world_size())
    schedule = build_schedule(options, num_rows, rows_per_step)
    path = Path(options.output_dir) / "metrics.jsonl"
    return Run(
        options,
        model,
        lora_config,
        objective or NextToken(model),
        build_optimizer(model, options),
        schedule,
        build_precision(options, dtype, device),
        Progress(schedule.total_steps, path, device),
        wrap_model(model, options),
    )
