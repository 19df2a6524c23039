"""How often the CPU waits for the GPU in an optimizer step: torch counts it.

    count = waits_of_a_step(options, model, lora_config, rows)      # options: of bench/train.py

A wait leaves the GPU without work until the CPU has prepared more. The aim is 0;
tests/repository/test_gpu_waits.py looks for waits without a GPU.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch

from bench.train import EncodedRow, training_options
from bench.training_run import new_run
from minisft.data.encoding import Example
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig
from minisft.training.objective import NextToken
from train import train_step


def waits_of_a_step(
    options: Namespace, model: CausalLM, lora_config: LoraConfig | None, rows: Sequence[EncodedRow]
) -> int:
    """The waits of the second step, batches included; 0 on a CPU. The step changes the weights."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    examples = [Example(np.array(ids), np.array(supervised)) for ids, supervised in rows]
    examples = examples[: options.batch_size]
    settings, objective = training_options(options), NextToken(model)
    run = new_run(settings, model, lora_config, len(examples), dtype, device, objective)
    train_step(run, [run.collate(examples)])  # allocates memory and loads kernels
    if device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(run, [run.collate(examples)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Its first use also warns that it is a prototype.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
