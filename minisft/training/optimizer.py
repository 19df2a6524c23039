"""AdamW: weight decay, and the learning rate of a step. schedules.py has the rates.

optimizer = build_optimizer(model, options)
set_learning_rate(optimizer, 1e-4)

The tour explains it: docs/tour/08_step.md.
"""

from argparse import Namespace

import torch
from torch import nn

from minisft.common.devices import has_fused_adamw
from minisft.training.build import trained_parameters
from minisft.training.low_memory_adamw import LowMemoryAdamW


def build_optimizer(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) on the trainable parameters; norms and biases have no decay."""
    trainable = trained_parameters(model)
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    settings = {
        "params": [group for group in groups if group["params"]],
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    if options.optim == "adamw_8bit" or options.pure_bf16:
        eight_bit = options.optim == "adamw_8bit"
        return LowMemoryAdamW(**settings, eight_bit=eight_bit, seed=options.seed)
    is_fused = has_fused_adamw(trainable[0].device)  # one kernel for all parameters
    return torch.optim.AdamW(**settings, fused=is_fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
