"""Rows become examples: token ids, and which of them the model should learn.

    examples, report = encode_rows(rows, template, cutoff_len=1024)
    examples[0].ids, examples[0].supervised                     # (T,) and (T,)

The chat template turns a conversation into ids and marks the answers, with the token that ends
each. A row longer than `cutoff_len` is truncated; a truncated answer has no end, so the model does
not learn to stop there. A row with no answer left is dropped and counted.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minisft.common.errors import UserError
from minisft.data.dataset import Row, Rows, read
from minisft.data.encode_report import EncodeReport
from minisft.text.template import Template
from minisft.text.tokenizer import check_vocabulary


@dataclass
class Example:
    """What the model gets of one row.

    ids: token ids (T,) int32. supervised: (T,) bool, True for the tokens to learn.
    lengths: where `ids` holds several texts, one after another, their lengths: the answers of a
    preference row, best first, each behind its prompt; or the packed texts of a pre-training block.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list[int] | None = None

    def texts(self) -> list["Example"]:
        """Each text as an Example of its own."""
        ends = np.cumsum(self.lengths or [len(self.ids)])[:-1]
        parts = zip(np.split(self.ids, ends), np.split(self.supervised, ends), strict=True)
        return [Example(ids, supervised) for ids, supervised in parts]


# Rows -> examples. Worker processes get it, so it must be picklable.
Encode = Callable[[Sequence[Row]], tuple[list[Example], EncodeReport]]


def encode_rows(
    rows: Iterable[Row], template: Template, cutoff_len: int, vocab_size: int | None = None
) -> tuple[list[Example], EncodeReport]:
    """Encode conversations, at most `cutoff_len` tokens of each."""
    examples, report = [], EncodeReport()
    for row in rows:
        full = encode_row(row, template, vocab_size)
        example = Example(full.ids[:cutoff_len], full.supervised[:cutoff_len])
        report.num_rows += 1
        report.num_truncated += len(full.ids) > cutoff_len
        # The first token is never a target: nothing comes before it.
        if example.supervised[1:].any():
            examples.append(example)
        else:
            report.num_dropped += 1
    return examples, report


def encode_row(row: Row, template: Template, vocab_size: int | None = None) -> Example:
    """Encode one conversation, all of it.

    Raises UserError, naming file and row, if the template cannot express the conversation or the
    model has no embedding for an id.
    """
    try:
        ids, supervised = template.encode(row.messages, row.tools)
        check_vocabulary(ids, vocab_size)
    except UserError as error:
        raise UserError(f"{row.source}, row {row.index + 1}: {error}") from error
    return Example(np.asarray(ids, np.int32), np.asarray(supervised, bool))


def read_and_encode(
    rows: Rows | Sequence[Example], encode: Encode, numbers: Iterable[int] | None = None
) -> tuple[list[Example], EncodeReport]:
    """Read the rows of these numbers (by default all) from their files and encode them."""
    broken: list[str] = []
    examples, report = encode(read(rows, broken, numbers))
    report.broken += broken
    return examples, report
