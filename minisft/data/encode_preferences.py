"""Encode preference rows: an example holds all answers of a row, each after the prompt.

examples, report = encode_preferences(rows, template, cutoff_len=1024)
chosen, rejected = examples[0].texts()
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from minisft.common.errors import UserError
from minisft.common.sequences import common_prefix_length
from minisft.data.dataset import Row
from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Example, encode_row
from minisft.text.chat_template import ChatTemplate


def encode_preferences(
    rows: Iterable[Row],
    template: ChatTemplate,
    cutoff_len: int,
    vocab_size: int | None = None,
    drop_long: bool = False,
) -> tuple[list[Example], EncodeReport]:
    """Encode rows with several answers, best first.

    The assistant's turns after the common messages of a row are supervised. drop_long: leave out
    rows longer than `cutoff_len` instead of truncating them. A reward judges a complete
    conversation, so --stage rm needs this.
    An answer that appears twice counts once, at its best rank. A row is left out if truncation
    removes all of an answer, or if only one answer remains.
    """
    examples, report = [], EncodeReport()
    for row in rows:
        texts = _encode_answers(row, template, cutoff_len, vocab_size)
        report.notes.update({text.note for text in texts if text.note})
        longest = max(len(text.ids) for text in texts)
        is_long = longest > cutoff_len
        report.long_rows += [longest] if is_long else []
        report.num_rows += 1
        report.num_tools_as_text += template.facts.changes_tools(row.messages, row.tools)
        if is_long and drop_long:
            report.num_too_long += 1
            continue
        report.num_truncated += is_long
        texts = [Example(text.ids[:cutoff_len], text.supervised[:cutoff_len]) for text in texts]
        if not all(text.supervised[1:].any() for text in texts):
            report.num_dropped += 1
            continue
        texts = unique_texts(texts)
        if len(texts) == 1:
            report.num_equal += 1
            continue
        examples.append(
            Example(
                np.concatenate([text.ids for text in texts]),
                np.concatenate([text.supervised for text in texts]),
                [len(text.ids) for text in texts],
            )
        )
    return examples, report


def unique_texts(texts: list[Example]) -> list[Example]:
    """The texts, except repetitions of an earlier text's ids."""
    first_of = {}
    for text in texts:
        first_of.setdefault(text.ids.tobytes(), text)
    return list(first_of.values())


def _encode_answers(
    row: Row, template: ChatTemplate, max_length: int, vocab_size: int | None
) -> list[Example]:
    conversations = [row.messages, *row.rejected]
    # At least the last message of a conversation is not common.
    num_common = min(len(messages) for messages in conversations) - 1
    for messages in conversations:
        num_common = min(num_common, common_prefix_length(messages, conversations[0]))
    texts = []
    for messages in conversations:
        common = [{**message, "train": False} for message in messages[:num_common]]
        answer = replace(row, messages=common + messages[num_common:])
        examples = encode_row(answer, template, max_length, vocab_size)
        if len(examples) != 1:
            raise UserError(
                f"{row.source}, row {row.index + 1}: the template writes each of the "
                f"{len(examples)} answers after a prompt of its own; only one answer can be "
                "compared"
            )
        texts += examples
    return texts
