"""AdamW, and the learning rate over the steps of a run.

optimizer = build_optimizer(model, options)
rate = learning_rate_at(step, total_steps=1000, peak=1e-4, schedule="cosine", warmup_steps=30)
set_learning_rate(optimizer, rate)
"""

import math
from argparse import Namespace

import torch
from torch import nn


def build_optimizer(model: nn.Module, options: Namespace) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) on the trainable parameters; norms and biases have no decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,  # one kernel for all parameters instead of a few for each
    )


def learning_rate_at(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    end: float = 0.0,
) -> float:
    """Learning rate of a step, counted from 0: linear warm-up from zero, then the schedule.

    The curves are those of the transformers schedulers with the same names, except that
    "constant" warms up too. end: final rate of the polynomial (of degree one).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    if schedule == "polynomial":
        return (peak - end) * max(0.0, 1.0 - progress) + end
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
