"""Small functions on sequences that several folders need."""

from collections.abc import Sequence
from typing import Any


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """The length of the longest common prefix of two sequences."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of rows, shortest row first, in batches of at most `batch_size`.

    Rows of similar length share a batch, so little is padded.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def true_spans(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, end) of every run of True: with the flags of supervised tokens, of every answer."""
    spans, start = [], None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            spans.append((start, index))
            start = None
    return spans
