"""Attention as such: of rows that are padded, and of rows that stand one after another in a pack.

    y = attend_causally(q, k, v, mask=None)        # (B, H, T, d), queries see keys up to their own

The letters of the shapes are those of model.py.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F


def attend_causally(q, k, v, mask):
    """(B, H, T, d) of q (B, H, T, d) and k, v (B, K, S, d); without a mask, queries see the keys up
    to their own."""
    B, H, T, d = q.shape
    if T == 1:  # It sees all keys: the heads that share keys can stand where time does.
        y = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, d), k, v, attn_mask=mask)
        return y.view(B, H, 1, d)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def attend_in_rows(q, k, v, lengths, masks):
    """The same for rows of a pack (1, H, T, d), each by itself."""
    rows = zip(*(one.split(lengths, dim=2) for one in (q, k, v)), masks, strict=True)
    return torch.cat([attend_causally(*row) for row in rows], dim=2)


def attend_in_rows_at_once(q, k, v, kernel, bounds, longest, window):
    """The same on a GPU in half precision, by the flash kernel for rows of any lengths.

    kernel: of `kernel_for_rows`. bounds: (N + 1,) int32, where the rows begin and end. window: how
    many keys before its own a query sees, -1 for all.
    """
    q, k, v = (one[0].transpose(0, 1).to(v.dtype) for one in (q, k, v))  # (T, H or K, d)
    y = kernel(q, k, v, bounds, bounds, longest, longest, window_size=(window, 0))
    return y.transpose(0, 1)[None]


def has_kernel_for_rows(x):
    """Whether attend_in_rows_at_once can be computed where and as x is."""
    return x.is_cuda and (torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32)


def kernel_for_rows():
    """torch's varlen_attn, for keys of fewer heads than queries too."""
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 it takes fewer heads without being told.
    is_told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if is_told else varlen_attn
