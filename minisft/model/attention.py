"""Attention, and the masks that say which keys a query may see.

    y = attend(q, k, v, mask)       # softmax(q k^T / sqrt(d)) v, over the keys in the mask

The T queries see S keys: the keys in the cache, then the keys of the same T tokens. A mask is True
where a query may see a key. None stands for the causal mask: a query sees no key after its
position. The letters of the shapes are explained in decoder.py.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.model.fast_paths import attend_with_one_query

# (q, k, v) -> y. A layer calls this function; the mask is already filled in.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, d) from q (B, H, T, d), k and v (B, K, S, d); H / K query heads share a key head.

    mask: broadcastable to (B, H, T, S). Without it T and S are equal.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """(T, S), True where key j is not after query i, and less than `window` positions before it.

    The queries are the last T of the S positions.
    """
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return mask if window is None else mask.triu(S - T - window + 1)


def attention_with_mask(
    T: int, S: int, mask: Tensor | None, window: int | None, device: torch.device
) -> Attend:
    """The attention of T queries to S keys.

    mask: given by the caller for padded rows, else None. window: the number of keys that a query
    sees; None: all.
    """
    if window is not None and S > window:
        near = causal_mask(T, S, device, window)
        mask = near if mask is None else mask & near
    elif mask is None and 1 < T < S:
        mask = causal_mask(T, S, device)
    return partial(attend_with_one_query if T == 1 else attend, mask=mask)
