"""The settings of each learning-rate schedule: --lr_scheduler_kwargs.

    check_settings("cosine_with_min_lr", {"min_lr_rate": 0.1})

schedules.py has the curves.
"""

import math
from collections.abc import Mapping
from typing import Any

from minisft.common.errors import UserError
from minisft.training.schedules import RAMPS

# The settings of each schedule. min_lr and lr_end are rates, the others that end in _rate or _ratio
# are shares of the peak.
SETTINGS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """UserError unless the schedule `name` has these settings."""
    known = SETTINGS[name]
    for key, value in settings.items():
        place = f'--lr_scheduler_kwargs: "{key}"'
        if key not in known:
            hint = f"It has {', '.join(known)}." if known else "It has none."
            raise UserError(f"{place} is not a setting of the schedule {name}. {hint}")
        if key in ("warmup_type", "decay_type"):
            if value not in RAMPS:
                raise UserError(f"{place} must be one of {', '.join(RAMPS)}, not {value!r}")
        elif (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            raise UserError(f"{place} must be a number of at least 0, not {value!r}")
    if name == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & set(settings)) != 1:
        raise UserError(
            "--lr_scheduler_type cosine_with_min_lr needs a lowest rate: --lr_scheduler_kwargs "
            '\'{"min_lr_rate": 0.1}\', or "min_lr"; not both'
        )
    if name == "warmup_stable_decay" and "num_decay_steps" not in settings:
        raise UserError(
            "--lr_scheduler_type warmup_stable_decay needs --lr_scheduler_kwargs "
            "'{\"num_decay_steps\": N}'"
        )
