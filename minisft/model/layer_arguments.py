"""What the decoder gives to its layers: the attention to compute, and the position factors.

    attend = choose_attention(config, x, mask, cache, lengths)          # {layer type: function}
    factors = choose_factors(config, x, positions, cache, lengths)

The plain way is `attend` with a mask, and position_factors of the positions. A pack, a single query
and a cache have faster ways to the same numbers, which are chosen here. The letters of the shapes
are explained in decoder.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.model.attention import Attend, attend, visible_keys
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.families import position_factors
from minisft.model.packed_attention import packed_attention, packed_positions


def choose_attention(
    config: ModelConfig,
    x: Tensor,
    mask: Tensor | None = None,
    cache: KeyValueCache | None = None,
    lengths: list[int] | None = None,
    layers_are_compiled: bool = False,
) -> dict[str, Attend]:
    """{layer type: the attention of its layers}.

    x (B, T, D): the embedded tokens. mask, cache, lengths: as in CausalLM.forward.
    """
    T, functions = x.shape[1], {}
    S = T if cache is None else T + cache.length
    for layer_type in set(config.layer_types):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        if lengths is not None:
            functions[layer_type] = packed_attention(
                lengths, window, x, config.head_dim, layers_are_compiled
            )
        else:
            function = attend_with_one_query if T == 1 else attend
            seen = visible_keys(T, S, mask, window, x.device)
            functions[layer_type] = partial(function, mask=seen)
    return functions


def attend_with_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """attention.attend for T = 1: the query heads that share a key head become the time dimension.

    Without a mask, the query sees all keys.
    """
    B, H, _, d = q.shape
    grouped = q.view(B, k.shape[1], -1, d)  # (B, K, H/K, d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(B, H, 1, d)


def choose_factors(
    config: ModelConfig,
    x: Tensor,
    positions: Tensor | None = None,
    cache: KeyValueCache | None = None,
    lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors of the positions: those given, those in a pack, or those after the cache."""
    if lengths is not None:
        positions = packed_positions(lengths, x.device)
    if positions is None:
        return next_factors(config, x, cache)
    if not config.has_dynamic_rope or (lengths is None and positions.dim() == 1):
        return position_factors(config, positions, x.dtype)
    # The angles of a row depend on its own length, not on that of the longest row.
    rows, dim = (positions, 0) if lengths is None else (positions.split(lengths), 2)
    factors = [position_factors(config, row, x.dtype) for row in rows]
    first, second = (torch.cat(parts, dim) for parts in zip(*factors, strict=True))
    return first, second


def next_factors(
    config: ModelConfig, x: Tensor, cache: KeyValueCache | None
) -> tuple[Tensor, Tensor]:
    """position_factors of the T positions after the cache.

    With a cache, they come from a table in it, which grows by doubling; dimension 2 is that of the
    positions. Dynamic scaling has no table, because all angles change with the length.
    """
    past, T = 0 if cache is None else cache.length, x.shape[1]
    if cache is None or config.has_dynamic_rope:
        return position_factors(config, torch.arange(past, past + T, device=x.device), x.dtype)
    if cache.factors is None or cache.factors[0].shape[2] < past + T:
        positions = torch.arange(max(2 * (past + T), 64), device=x.device)
        cache.factors = position_factors(config, positions, x.dtype)
    first, second = cache.factors
    return first[:, :, past : past + T], second[:, :, past : past + T]
