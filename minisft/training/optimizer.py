"""AdamW and the learning rate over time.

optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
rate = learning_rate_at(step, total_steps=1000, peak=1e-4, schedule="cosine", warmup_steps=30)
"""

import math

import torch


def build_optimizer(model, learning_rate, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8):
    """AdamW (arXiv 1711.05101) on what is trained; norms and biases are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(one.device.type in ("cpu", "cuda") for one in trained)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


def load_optimizer(optimizer, state):
    """Take over the moments in a `state_dict`; rates, decay and betas stay those of `optimizer`."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**state, "param_groups": groups})


def learning_rate_at(step, total_steps, peak, schedule="cosine", warmup_steps=0, end=0.0):
    """The rate of optimizer step `step` (from 0): linear warm-up from zero, then the schedule.

    The curves are those of transformers' schedulers of the same names, but that "constant" is its
    constant_with_warmup. `end` is where the polynomial (of degree one) arrives.
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


def set_learning_rate(optimizer, rate):
    """Use `rate` for every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
