"""Attention in a pack: rows are concatenated, and a token sees only its own row.

Three functions compute the same numbers:

    attend with packed_mask    all rows at once. Plain, but most of the work is for pairs of tokens
                               that the mask hides.
    attend_by_row              one row after another: best on a CPU
    attend_by_kernel           torch's kernel for rows of different lengths: best on a GPU

The letters of the shapes are explained in decoder.py; T is the length of the pack.
"""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minisft.common.devices import send
from minisft.model.attention import Attend, attend, causal_mask


def packed_attention(
    lengths: list[int], window: int | None, x: Tensor, head_dim: int, layers_are_compiled: bool
) -> Attend:
    """The attention of a pack of rows with these lengths.

    window: the number of keys that a query sees; None: all. x (1, T, D): the embedded tokens, for
    their device and type. head_dim: the width of a head.
    """
    if has_kernel(x, head_dim):
        bounds = send(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), x.device)
        arguments = {"kernel": varlen_kernel(), "bounds": bounds, "longest": max(lengths)}
        return partial(attend_by_kernel, **arguments, window=window)
    if layers_are_compiled:
        # A list of lengths would become part of the compiled code; a mask does not. It is added as
        # numbers, because torch would convert a mask of booleans again in every layer.
        mask = packed_mask(lengths, window, x.device)
        return partial(attend, mask=torch.where(mask, 0.0, -torch.inf))
    masks = [
        None
        if window is None or length <= window
        else causal_mask(length, length, x.device, window)
        for length in lengths
    ]
    return partial(attend_by_row, lengths=lengths, masks=masks)


def packed_positions(lengths: list[int], device: torch.device) -> Tensor:
    """(T,): the position of each token in its row."""
    return send(torch.cat([torch.arange(length) for length in lengths]), device)


def packed_mask(lengths: list[int], window: int | None, device: torch.device) -> Tensor:
    """(T, T), True where query and key are in the same row and `causal_mask` is True."""
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    row = send(row, device)  # (T,)
    return causal_mask(len(row), len(row), device, window) & (row == row[:, None])


def attend_by_row(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], masks: list[Tensor | None]
) -> Tensor:
    """(1, H, T, d) from q (1, H, T, d), k and v (1, K, T, d).

    masks: one for each row, None where the causal mask is enough.
    """
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), masks, strict=True)
    return torch.cat([attend(*row) for row in rows], dim=2)


def attend_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Callable[..., Any],
    bounds: Tensor,
    longest: int,
    window: int | None,
) -> Tensor:
    """attend_by_row in half precision on a GPU, for all rows at once.

    bounds: (N + 1,) int32, where the N rows begin, and T. longest: the length of the longest row.
    """
    q, k, v = (tensor[0].transpose(0, 1).to(v.dtype) for tensor in (q, k, v))  # (T, H or K, d)
    num_before = -1 if window is None else window - 1  # keys before a query that it sees; -1: all
    y = kernel(q, k, v, bounds, bounds, longest, longest, window_size=(num_before, 0))
    return y.transpose(0, 1)[None]


def has_kernel(x: Tensor, head_dim: int) -> bool:
    """True if attend_by_kernel works on the device, with the type of x and with such heads."""
    is_half = torch.is_autocast_enabled("cuda") or x.dtype != torch.float32
    fits = head_dim % 8 == 0 and head_dim <= 256
    return x.is_cuda and is_half and fits and torch.cuda.get_device_capability(x.device) >= (8, 0)


def varlen_kernel() -> Callable[..., Any]:
    """torch's varlen_attn, for fewer key heads than query heads."""
    # Imported here because it imports torch's compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    # torch before 2.12 accepts fewer key heads without this argument.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return partial(varlen_attn, enable_gqa=True)
    return varlen_attn
