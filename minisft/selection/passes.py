"""Shared by both scorers: the plan of a row, its passes through the model, batches, the score."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisft.common.sequences import true_spans
from minisft.data.batching import PAD_MULTIPLE
from minisft.text.chat_template import ChatTemplate

TOO_LONG = "longer than cutoff_len"  # the beginning of a reason


@dataclass(eq=False)
class Pass:
    """One sequence to run through the model.

    ids: (T,) int32. is_answer: (T,) bool, the tokens whose loss counts. prompt_length and
    embedded_length: the perplexity is of this many tokens from the first, and the embedding of this
    many; 0 for none.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    prompt_length: int = 0
    embedded_length: int = 0


@dataclass(eq=False)
class Plan:
    """The passes that row `index` of `num_tokens` needs. reason: why the row gets no score."""

    index: int
    num_answer_tokens: int = 0
    reason: str | None = None
    num_tokens: int = 0
    num_conditioned: int = 1  # the first passes: each answer after its prompt
    passes: list[Pass] = field(default_factory=list)


@dataclass
class Score:
    """The result of a row. record: its line in the file of scores. embedding: (D,) float32."""

    index: int
    record: dict[str, Any]
    embedding: np.ndarray | None = None
    perplexity: float = math.inf  # that of the prompt


def answer_spans(
    template: ChatTemplate, ids: np.ndarray, supervised: np.ndarray
) -> list[tuple[int, int]]:
    """(start, end) of every answer of a conversation, without the token that ends the turn."""
    end_tokens = template.tokens.ids.values()
    spans = true_spans(supervised.tolist())
    return [(start, end - (int(ids[end - 1]) in end_tokens)) for start, end in spans]


def num_tokens(spans: Sequence[tuple[int, int]]) -> int:
    """The tokens in all spans."""
    return sum(end - start for start, end in spans)


def too_long(ids: np.ndarray, cutoff_len: int) -> str | None:
    """The reason why a row is too long to score; None if it is short enough."""
    if len(ids) <= cutoff_len:
        return None
    return f"{TOO_LONG}: {len(ids)} tokens, the limit is {cutoff_len}"


def make_batches(passes: Sequence[Pass], batch_tokens: int) -> Iterator[list[Pass]]:
    """Batches of similar length, each of at most `batch_tokens` tokens, padding included.

    A longer pass gets a batch for itself.
    """
    batch: list[Pass] = []
    for item in sorted(passes, key=lambda item: len(item.ids)):
        width = -(-len(item.ids) // PAD_MULTIPLE) * PAD_MULTIPLE
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def rounded(value: float) -> float:
    """The value with 8 significant digits, about the precision of float32."""
    return float(f"{value:.8g}")
