"""The learning rate over the steps of a run: warm-up, then a curve.

    rate(step) = peak * step / warmup_steps         during warm-up
    rate(step) = peak * curve(progress)             after it; progress goes from 0 to 1

    rate = build_rate("cosine", peak=1e-4, total_steps=1000, warmup_steps=30)
    rate(30)                                        # 1e-4

Names, curves and settings (--lr_scheduler_kwargs) are those of transformers.get_scheduler.

The tour explains it: docs/tour/08_step.md.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

# The curves: progress -> share of the peak.


def constant(progress: float) -> float:
    """Always the peak."""
    return 1.0


def linear(progress: float) -> float:
    """A straight line down to zero."""
    return max(0.0, 1.0 - progress)


def cosine(progress: float, num_cycles: float = 0.5) -> float:
    """Down to zero along half a wave of the cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * 2.0 * num_cycles * progress))


def cosine_with_restarts(progress: float, num_cycles: int = 1) -> float:
    """Down to zero along the cosine, `num_cycles` times, each time from the peak."""
    return cosine(num_cycles * progress % 1.0) if progress < 1.0 else 0.0


def cosine_with_min_lr(progress: float, min_lr_rate: float, num_cycles: float = 0.5) -> float:
    """Down to the share `min_lr_rate` of the peak along the cosine."""
    return min_lr_rate + (1.0 - min_lr_rate) * cosine(progress, num_cycles)


def polynomial(progress: float, lr_end_rate: float = 0.0, power: float = 1.0) -> float:
    """Down to the share `lr_end_rate` of the peak; power 1 is a straight line."""
    return lr_end_rate + (1.0 - lr_end_rate) * linear(progress) ** power


def one_minus_sqrt(progress: float) -> float:
    """Down to zero, fast at first."""
    return 1.0 - math.sqrt(progress)


# The schedules: step -> share of the peak.


def warmup_then(
    step: int, total_steps: int, warmup_steps: int, curve: Callable[[float], float]
) -> float:
    """Linear warm-up from zero, then the curve."""
    if step < warmup_steps:
        return step / warmup_steps
    return curve((step - warmup_steps) / max(1, total_steps - warmup_steps))


def inverse_sqrt(
    step: int, total_steps: int, warmup_steps: int, timescale: float | None = None
) -> float:
    """Warm-up, then the inverse square root of the step; a large timescale makes it flat."""
    if step < warmup_steps:
        return step / warmup_steps
    timescale = timescale or warmup_steps or 10_000
    return math.sqrt(timescale / (timescale + step - warmup_steps))


def warmup_stable_decay(
    step: int,
    total_steps: int,
    warmup_steps: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """Up, level, and down in the last `num_decay_steps`; `min_lr_ratio` is the share at both ends.

    warmup_type, decay_type: names in RAMPS.
    """
    if num_stable_steps is None:
        num_stable_steps = total_steps - warmup_steps - num_decay_steps
    decay_step = step - warmup_steps - num_stable_steps
    if step < warmup_steps:
        share = RAMPS[warmup_type](1.0 - step / warmup_steps)
    elif decay_step < 0:
        share = 1.0
    elif decay_step >= num_decay_steps:
        share = 0.0
    elif decay_type == "cosine":
        share = cosine(decay_step / num_decay_steps, num_cycles)
    else:
        share = RAMPS[decay_type](decay_step / num_decay_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * share


RAMPS = {"linear": linear, "cosine": cosine, "1-sqrt": one_minus_sqrt}
CURVES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "constant_with_warmup": constant,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine_with_min_lr,
    "polynomial": polynomial,
}


def build_rate(
    name: str,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Callable[[int], float]:
    """The function from a step, counted from 0, to its learning rate.

    name: one of schedule_settings.SETTINGS. "constant" has no warm-up. settings: checked.
    """
    settings = dict(settings or {})
    for rate in ("min_lr", "lr_end"):
        if rate in settings:
            settings[f"{rate}_rate"] = settings.pop(rate) / peak
    if name == "inverse_sqrt":
        share = partial(inverse_sqrt, **settings)
    elif name == "warmup_stable_decay":
        share = partial(warmup_stable_decay, **settings)
    else:
        share = partial(warmup_then, curve=partial(CURVES[name], **settings))
    warmup_steps = 0 if name == "constant" else warmup_steps
    return lambda step: peak * share(step, total_steps, warmup_steps)
