"""Faster ways to compute some steps of the decoder; each gives the same numbers as the plain way.

At batch size 1 on a CPU, most of the time of a token goes into reading the weights and calling
torch. Other operations are then faster than for many rows.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig

HAS_ONEDNN = torch.backends.mkldnn.is_available()
PRODUCT_TYPES = torch.float32, torch.bfloat16  # of rms_norm_by_product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., out) from x (..., in), W (out, in) and b (out,)."""
    # With small matrices, the call takes longer than the multiplication.
    is_float32 = x.dtype == weight.dtype == torch.float32
    if is_float32 and weight.numel() >= 2**18 and HAS_ONEDNN and _is_decoding_on_cpu(x):
        return linear_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for a few rows in float32: oneDNN reads W faster than MKL does.

    It takes half the time for one row, two thirds for eight; above 64 rows MKL is as fast.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the type of x."""
    is_known_type = x.dtype == weight.dtype and x.dtype in PRODUCT_TYPES
    if is_known_type and x.dim() == 3 and x.shape[1] == 1 and _is_decoding_on_cpu(x):
        return rms_norm_by_product(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rms_norm_by_product(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm for x (B, 1, D) without gradients: four operations instead of eleven.

    It computes in float32, as F.rms_norm does.
    """
    # eps + x x^T / D: the mean square as a matrix product.
    x32 = x.float()
    mean_square = torch.baddbmm(_constant(eps), x32, x32.mT, alpha=1 / x.shape[-1])  # (B, 1, 1)
    return (x32 * mean_square.rsqrt_()).mul_(weight).to(x.dtype)


def attend_with_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """attention.attend for T = 1: the query heads that share a key head become the time dimension.

    Without a mask, the query sees all keys.
    """
    B, H, _, d = q.shape
    grouped = q.view(B, k.shape[1], -1, d)  # (B, K, H/K, d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(B, H, 1, d)


def next_factors(
    compute: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]],
    config: ModelConfig,
    T: int,
    x: Tensor,
    cache: KeyValueCache | None,
) -> tuple[Tensor, Tensor]:
    """Decoder.factors of the T positions after the cache: rotary cos and sin, or those of ALiBi.

    compute(positions, dtype): the plain function. With a cache, they come from a table in it, which
    grows by doubling; dimension 2 is that of the positions. Dynamic scaling has no table, because
    all angles change with the length.
    """
    past = 0 if cache is None else cache.length
    if cache is None or config.has_dynamic_rope:
        return compute(torch.arange(past, past + T, device=x.device), x.dtype)
    if cache.factors is None or cache.factors[0].shape[2] < past + T:
        cache.factors = compute(torch.arange(max(2 * (past + T), 64), device=x.device), x.dtype)
    first, second = cache.factors
    return first[:, :, past : past + T], second[:, :, past : past + T]


def _is_decoding_on_cpu(x: Tensor) -> bool:
    """True if x (..., in) has at most 64 rows on a CPU, and needs no gradient."""
    return (
        x.numel() <= 64 * x.shape[-1]
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses its own kernels
    )


@lru_cache(maxsize=8)
def _constant(value: float) -> Tensor:
    """A scalar on the CPU; creating one takes as long as a small operation."""
    return torch.tensor(value, device="cpu")
