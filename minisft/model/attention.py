"""Attention of rows that stand below each other in a batch, and the masks for it.

    y = attend(q, k, v, mask)       # softmax(q k^T / sqrt(d) + mask) v

The letters of the shapes are explained in decoder.py. T queries meet S keys: the keys of the cache,
then their own. A mask is True where a query may see a key. None stands for the causal mask: a
query sees the keys up to its own position.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.model.fast_paths import attend_with_one_query

# (q, k, v) -> y: what a layer calls.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, d) from q (B, H, T, d), k and v (B, K, S, d); H / K query heads share a key head.

    mask: broadcastable to (B, H, T, S). Without it T and S are equal.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """(T, S), True where key j is not after query i, and less than `window` before it.

    The queries are the last T of the S positions.
    """
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return mask if window is None else mask.triu(S - T - window + 1)


def attention_by_layer_type(
    T: int, S: int, mask: Tensor | None, window: int | None, device: torch.device
) -> dict[str, Attend]:
    """The attention function of each layer type for T queries and S keys.

    mask: of the padding, with the causal mask in it; None where there is no padding. window: how
    many keys a query of a sliding-attention layer sees.
    """
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, device)
    near = mask
    if window is not None and S > window:
        near = causal_mask(T, S, device, window)
        if mask is not None:
            near = near & mask
    function = attend_with_one_query if T == 1 else attend
    return {
        "full_attention": partial(function, mask=mask),
        "sliding_attention": partial(function, mask=near),
    }
