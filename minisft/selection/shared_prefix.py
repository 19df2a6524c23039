"""Rows with a common prefix: the prefix goes through the model once, not once per row.

    for group in group_by_prefix(passes):          # lists that begin with the same tokens
        ...
    hidden = hidden_states(model, tokens)          # model(tokens), up to rounding

In many templates a fixed text comes before every instruction ("Below is an instruction that ...").
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from minisft.common.devices import send
from minisft.model.cache import KeyValueCache
from minisft.model.reward import Model
from minisft.selection.passes import Pass

# Passes with the same first KEY_TOKENS tokens form a group if there are at least MIN_GROUP of them.
KEY_TOKENS, MIN_GROUP = 24, 32
# A shorter prefix is not worth a separate call.
MIN_PREFIX_TOKENS = 16


def group_by_prefix(passes: Sequence[Pass]) -> list[list[Pass]]:
    """Groups of passes that begin with the same tokens; last, the passes without a large group."""
    groups: dict[bytes, list[Pass]] = defaultdict(list)
    for item in passes:
        groups[item.ids[:KEY_TOKENS].tobytes()].append(item)
    large = [group for group in groups.values() if len(group) >= MIN_GROUP]
    rest = [item for group in groups.values() if len(group) < MIN_GROUP for item in group]
    return [*large, rest]


def hidden_states(model: Model, tokens: Tensor) -> Tensor:
    """Hidden states (B, T, D) on the model's device of tokens (B, T), in the faster way.

    tokens: on the CPU, which needs the length of the prefix without waiting for a GPU.
    """
    is_equal = (tokens == tokens[:1]).all(0)  # (T,)
    prefix_length = int(is_equal.int().cumprod(0).sum())
    prefix_length = min(prefix_length, tokens.shape[1] - 1)
    tokens = send(tokens, next(model.parameters()).device)
    if len(tokens) == 1 or prefix_length < MIN_PREFIX_TOKENS:
        return model(tokens)
    return _after_shared_prefix(model, tokens, prefix_length)


def _after_shared_prefix(model: Model, tokens: Tensor, prefix_length: int) -> Tensor:
    """Run the prefix once, then the rest of every row with the prefix in its cache."""
    cache = KeyValueCache(model.config)
    prefix = model(tokens[:1, :prefix_length], cache=cache)  # (1, prefix_length, D)
    cache.select(tokens.new_zeros(len(tokens)))
    rest = model(tokens[:, prefix_length:], cache=cache)
    return torch.cat([prefix.expand(len(tokens), -1, -1), rest], 1)
