"""Attention: the layer, the computation, and the masks that say which keys a query may see.

    y = attend(q, k, v, mask)       # softmax(q k^T / sqrt(d)) v, over the keys in the mask

The T queries see S keys: the keys in the cache, then the keys of the same T tokens. A mask is True
where a query may see a key. None stands for the causal mask: a query sees no key after its
position. The letters of the shapes are explained in decoder.py.

The tour explains it: docs/tour/05_model.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.basic_layers import Linear, RMSNorm
from minisft.model.cache import Cache
from minisft.model.config import ModelConfig
from minisft.model.rotary import rotate

# (q, k, v) -> y. A layer calls this function; the mask is already filled in.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, where H / K query heads share a key head (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.num_heads, self.num_key_value_heads, self.head_dim = H, K, d
        self.q_proj = Linear(D, H * d, bias=bias or config.qkv_bias)
        self.k_proj = Linear(D, K * d, bias=bias or config.qkv_bias)
        self.v_proj = Linear(D, K * d, bias=bias or config.qkv_bias)
        self.o_proj = Linear(H * d, D, bias=bias)
        self.is_rotary = bool(config.no_rope_layers[layer])
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        factors: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """(B, T, D) from x (B, T, D).

        factors: the position factors of the T tokens, here rotary cos and sin. attend: computes
        the attention from q, k and v. layer: the number of this layer in the cache.
        """
        q, k, v = self.project(x)
        if self.is_rotary:
            cos, sin = factors
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, d)
        y = attend(q, k, v)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d) from x (B, T, D)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


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


def visible_keys(
    T: int, S: int, mask: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """The mask for T queries and S keys; None where the causal mask, or a single query, needs none.

    mask: given by the caller for padded rows, else None. window: the number of keys that a query
    sees; None: all.
    """
    if window is not None and S > window:
        near = causal_mask(T, S, device, window)
        return near if mask is None else mask & near
    return causal_mask(T, S, device) if mask is None and 1 < T < S else mask
