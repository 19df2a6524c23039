"""The state of a training run, handed from step to step.

`fine_tune` in train.py fills a Run; resume.py saves and restores it.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisft.common import processes
from minisft.common.reserved_space import ReservedSpace
from minisft.common.words import counted
from minisft.data import batching
from minisft.data.encoding import Example
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig
from minisft.model.reward import Model
from minisft.text.tokenizer import Tokenizer
from minisft.training.metrics import Progress
from minisft.training.objective import Objective
from minisft.training.options import scheduler_settings
from minisft.training.schedules import build_rate


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run: their rows, their number, when to evaluate and save."""

    num_rows: int  # in an epoch
    rows_per_step: int  # over all micro-batches and ranks
    steps_per_epoch: int  # the last of them may have fewer rows
    total_steps: int
    warmup_steps: int
    eval_steps: int | None  # steps between evaluations; None: only at the end
    save_steps: int  # steps between checkpoints
    learning_rate: Callable[[int], float]  # step, counted from 0 -> rate


def count_rows_per_step(options: Namespace, num_processes: int) -> int:
    """Rows of an optimizer step, over all micro-batches and ranks."""
    micro_batch = options.per_device_train_batch_size * num_processes
    return micro_batch * options.gradient_accumulation_steps


def build_schedule(
    options: Namespace,
    num_rows: int,
    rows_per_step: int,
    say: Callable[[str], object] = lambda line: None,
) -> Schedule:
    """The Schedule of a run over `num_rows` rows an epoch. say: prints a note on the warm-up."""
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    total_steps = options.max_steps or math.ceil(steps_per_epoch * options.num_train_epochs)
    warmup_steps = options.warmup_steps
    if warmup_steps is None:
        # The first step of a warm-up has rate 0. A run of one step would learn nothing.
        warmup_steps = min(math.ceil(total_steps * options.warmup_ratio), total_steps - 1)
    elif warmup_steps >= total_steps:
        say(
            f"--warmup_steps {warmup_steps}: the run has {counted(total_steps, 'step')}, so the "
            "learning rate stays below its peak. Give fewer, or --warmup_ratio, a share of the run."
        )
    eval_steps, save_steps = (
        steps_per_epoch if steps == "epoch" else steps
        for steps in (options.eval_steps, options.save_steps)
    )
    learning_rate = build_rate(
        options.lr_scheduler_type,
        options.learning_rate,
        total_steps,
        warmup_steps,
        scheduler_settings(options),
    )
    return Schedule(
        num_rows,
        rows_per_step,
        steps_per_epoch,
        total_steps,
        warmup_steps,
        eval_steps,
        save_steps,
        learning_rate,
    )


@dataclass
class Precision:
    """Mixed precision: matrix products in a half type, parameters and sums in float32."""

    autocast: torch.autocast
    # float16 has no numbers below 6e-8. The loss is scaled up so that its gradients do not vanish.
    scaler: torch.amp.GradScaler


def build_precision(options: Namespace, dtype: torch.dtype, device: torch.device) -> Precision:
    """dtype: type of the matrix products. A sharded model (FSDP) converts its weights by itself."""
    needs_autocast = dtype != torch.float32 and options.parallel != "fsdp"
    return Precision(
        torch.autocast(device.type, dtype, enabled=needs_autocast),
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


@dataclass
class Best:
    """The evaluation with the lowest loss."""

    step: int | None = None
    loss: float = math.inf
    evaluations_since: int = 0


@dataclass
class Run:
    """Everything that training needs from one step to the next."""

    options: Namespace
    model: Model
    lora_config: LoraConfig | None  # None in full fine-tuning
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    progress: Progress
    wrapped: nn.Module  # the model, or the DDP module around it
    best: Best = field(default_factory=Best)
    num_bytes: int = 0  # size of the training rows; a change is noticed on resume
    tokenizer: Tokenizer | None = None  # with its new tokens, for the checkpoints
    # Disk space for the result and a checkpoint; taken when training begins.
    reserve: ReservedSpace = field(default_factory=lambda: ReservedSpace(Path(), 0))

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.model.model.embed_tokens.weight.device

    def collate(self, examples: Sequence[Example]) -> Any:
        """A batch of examples, as the objective needs it."""
        # With dynamic rotary scaling, padding would change the angles of the shorter rows.
        is_stretched = self.model.config.has_dynamic_rope and isinstance(self.model, CausalLM)
        if self.options.packing or (is_stretched and self.options.stage != "dpo"):
            return batching.pack(examples, self.device)
        if self.options.compile:  # few different shapes, so that few are compiled
            return self.objective.collate(examples, self.device, batching.COMPILED_PAD_MULTIPLE)
        return self.objective.collate(examples, self.device)


def wrap_model(model: Model, options: Namespace) -> nn.Module:
    """Set up how the model computes: checkpointed, compiled, with DDP to average gradients."""
    model.model.gradient_checkpointing = options.gradient_checkpointing
    if options.compile:
        model.model.compile_layers()
    return model if options.parallel == "fsdp" else processes.wrap_ddp(model)
