"""Rows become examples: token ids, and which of them the model should learn.

    examples, report = encode_rows(rows, template, cutoff_len=1024)
    examples[0].ids, examples[0].supervised                     # (T,) and (T,)

The chat template turns a conversation into ids and marks the answers, with the token that ends
each. A row is one example, or one per answer if the template needs that. Examples longer than
`cutoff_len` are truncated; a truncated answer has no end, so the model does not learn to stop
there. A row with no answer left is dropped and counted.

The tour explains it: docs/tour/02_template.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from minisft.common.errors import UserError
from minisft.data.dataset import Row, Rows, read
from minisft.data.encode_report import EncodeReport
from minisft.data.long_rows import beginning
from minisft.text.chat_template import ChatTemplate
from minisft.text.rendering import MAX_BEGUN
from minisft.text.tokenizer import check_vocabulary


@dataclass
class Example:
    """The tokens of one row, as the model reads them.

    ids: token ids (T,) int32. supervised: (T,) bool, True for the tokens to learn.
    lengths: where `ids` holds several texts, one after another, their lengths: the answers of a
    preference row, best first, each after its prompt; or the packed texts of a pre-training block.
    note: a remark on the prompts, for the log.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list[int] | None = None
    note: str = ""

    def texts(self) -> list["Example"]:
        """Each text as a separate Example."""
        ends = np.cumsum(self.lengths or [len(self.ids)])[:-1]
        parts = zip(np.split(self.ids, ends), np.split(self.supervised, ends), strict=True)
        return [Example(ids, supervised) for ids, supervised in parts]


GROUP = MAX_BEGUN // 2  # rows that are rendered together, while those before them are used

# Rows -> examples. Worker processes get it, so it must be picklable.
Encode = Callable[[Sequence[Row]], tuple[list[Example], EncodeReport]]


def encode_rows(
    rows: Iterable[Row],
    template: ChatTemplate,
    cutoff_len: int,
    vocab_size: int | None = None,
    mask_history: bool = False,
) -> tuple[list[Example], EncodeReport]:
    """Encode conversations, at most `cutoff_len` tokens of each example.

    mask_history: learn only the last answer.
    """
    examples, report = [], EncodeReport()
    if mask_history:
        rows = map(without_history, rows)
    for row in rendered_ahead(rows, template):
        full = encode_row(row, template, cutoff_len, vocab_size)
        cut = [Example(text.ids[:cutoff_len], text.supervised[:cutoff_len]) for text in full]
        # The first token is never a target: nothing comes before it.
        kept = [example for example in cut if example.supervised[1:].any()]
        examples += kept
        report.num_rows += 1
        longest = max([len(text.ids) for text in full], default=0)
        report.num_truncated += longest > cutoff_len
        report.long_rows += [longest] if longest > cutoff_len else []
        report.num_dropped += bool(full) and not kept
        report.num_unlearned += not full
        report.num_tools_as_text += template.facts.changes_tools(row.messages, row.tools)
        report.notes.update({text.note for text in full if text.note})
        report.num_split += len(full) > 1
        report.num_from_split += len(full) if len(full) > 1 else 0
    return examples, report


def without_history(row: Row) -> Row:
    """The row with only its last answer to learn."""
    history = [{**message, "train": False} for message in row.messages[:-1]]
    return replace(row, messages=history + row.messages[-1:])


def rendered_ahead(rows: Iterable[Row], template: ChatTemplate) -> Iterator[Row]:
    """The rows. The template renders a group of them in the background, while others are used."""
    rows, current = iter(rows), []
    while following := list(islice(rows, GROUP)):
        for row in following:
            template.begin(row.messages, row.tools)
        yield from current
        current = following
    yield from current


def encode_row(
    row: Row, template: ChatTemplate, max_length: int, vocab_size: int | None = None
) -> list[Example]:
    """Encode one conversation without truncation; no example if none of its answers is learned.

    max_length: the caller uses this many tokens, so a huge row may end after them. Raises
    UserError, naming file and row, if the template cannot express the conversation or the model has
    no embedding for an id.
    """
    try:
        messages, cut_note = beginning(row.messages, row.tools, max_length)
        texts = template.encode(messages, row.tools)
        for text in texts:
            check_vocabulary(text.ids, vocab_size)
    except UserError as error:
        raise UserError(f"{row.source}, row {row.index + 1}: {error}") from error
    return [
        Example(
            np.asarray(text.ids, np.int32),
            np.asarray(text.supervised, bool),
            note=cut_note or text.note,
        )
        for text in texts
    ]


def read_and_encode(
    rows: Rows | Sequence[Example], encode: Encode, numbers: Iterable[int] | None = None
) -> tuple[list[Example], EncodeReport]:
    """Read the rows of these numbers (by default all) from their files and encode them."""
    broken: list[str] = []
    examples, report = encode(read(rows, broken, numbers))
    report.broken += broken
    return examples, report
