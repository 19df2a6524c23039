"""Checks of sampling values, prompts and logits, which raise UserError."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from minisft.common.errors import UserError
from minisft.model.cache import KeyValueCache

# For each field of Sampling: is the value in range, and the range in words.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 1, "at least 1"),
    "temperature": (lambda value: 0 <= value < math.inf, "0 (greedy) or more"),
    "top_k": (lambda value: value >= 0, "0 (off) or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1 (off)"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "above 0 (1: off)"),
}


def check_sampling(values: dict[str, Any]) -> None:
    """Raise UserError if a field of Sampling is out of its range."""
    for name, (is_in_range, range_in_words) in RANGES.items():
        if not is_in_range(values[name]):
            raise UserError(f"--{name} must be {range_in_words}, not {values[name]}")


def check_prompts(prompts: Sequence[Sequence[int]], num_cached: int, vocab_size: int) -> None:
    """Raise UserError if a prompt is empty or has an id outside the vocabulary."""
    for number, ids in enumerate(prompts):
        if len(ids) <= num_cached:
            raise UserError(f"prompt {number} is empty. Generation continues at least one token.")
        if max(ids) >= vocab_size:
            raise UserError(
                f"prompt {number}: token {max(ids)} is outside the model's vocabulary of "
                f"{vocab_size}. Does the tokenizer belong to this model?"
            )


def check_logits(logits: Tensor, cache: KeyValueCache) -> None:
    """Raise UserError if the model computes infinities or NaN, and empty the cache."""
    if not logits.isfinite().all():
        cache.truncate(0)
        raise UserError(
            "the model's logits are not finite. Its weights are damaged, or too large for this "
            "number type. Try --dtype float32."
        )
