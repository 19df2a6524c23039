"""Rows become token ids and what of them is learned; texts become blocks.

    examples, report = encode_rows(rows, template, cutoff_len=1024)
    examples[0].ids, examples[0].supervised
"""

from dataclasses import dataclass, field

import numpy as np

from minisft import dataset
from minisft.options import UserError


@dataclass
class Example:
    """One row: token ids (T,) int32 and whether each is to be learned (T,) bool.

    lengths: of the texts in it that are not to see each other; None for a single one.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list | None = None


@dataclass
class EncodeReport:
    """How many rows were encoded, cut to the length limit, left with nothing to learn, broken."""

    num_rows: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    broken: list = field(default_factory=list)  # a message each

    def add(self, other):
        """Count what `other` counted too."""
        self.num_rows += other.num_rows
        self.num_cut += other.num_cut
        self.num_dropped += other.num_dropped
        self.broken += other.broken

    def __bool__(self):
        """Whether anything happened to any row."""
        return bool(self.num_cut or self.broken)

    def __str__(self):
        """A line for people."""
        said = []
        if self.num_cut:
            said.append(f"{self.num_cut} of {self.num_rows} rows cut to the length limit, "
                        f"{self.num_dropped} dropped because no answer was left")
        if self.broken:
            said.append(f"{len(self.broken)} broken rows left out, the first: {self.broken[0]}")
        return "; ".join(said)


def encode_rows(rows, template, cutoff_len, vocab_size=None):
    """Conversations -> (list of Example, EncodeReport). A cut answer ends without EOS.

    UserError where the template or a vocabulary of `vocab_size` cannot take a row.
    """
    examples, report = [], EncodeReport()
    for row in rows:
        try:
            ids, supervised = template.encode(row.messages, row.tools)
            check_vocabulary(ids, vocab_size)
        except UserError as error:
            raise UserError(f"{row.source}, row {row.index + 1}: {error}") from error
        report.num_rows += 1
        report.num_cut += len(ids) > cutoff_len
        example = Example(
            np.asarray(ids[:cutoff_len], np.int32), np.asarray(supervised[:cutoff_len], bool)
        )
        if example.supervised[1:].any():
            examples.append(example)
        else:
            report.num_dropped += 1
    return examples, report


def encode_texts(texts, tokenizer, block_size, vocab_size=None, packing=False):
    """Plain texts -> (list of Example of `block_size` tokens, all learned; EncodeReport).

    Texts follow one another, each between BOS (where the tokenizer adds one) and EOS, and are cut
    into blocks; the last block is shorter. packing: the blocks say where their texts end.
    """
    begin = [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces, report = [np.zeros(0, np.int32)], EncodeReport()
    for text in texts:
        report.num_rows += 1
        ids = begin + tokenizer.encode(text) + end
        check_vocabulary(ids, vocab_size)
        pieces.append(np.asarray(ids, np.int32))
    stream, ends = np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces])
    examples = []
    for start in range(0, len(stream), block_size):
        block = stream[start : start + block_size]
        inside = ends[(ends > start) & (ends < start + len(block))] - start
        lengths = np.diff([0, *np.unique(inside), len(block)]).tolist() if packing else None
        if len(block) > 1:
            examples.append(Example(block, np.ones(len(block), bool), lengths))
    return examples, report


def encoded(rows, encode, numbers=None):
    """Read the rows of these numbers (all of them) and encode them -> (Examples, EncodeReport)."""
    broken = []
    examples, report = encode(dataset.read(rows, broken, numbers))
    report.broken += broken
    return examples, report


def check_vocabulary(ids, vocab_size):
    """UserError where the model's vocabulary (None: not known) has no place for an id."""
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise UserError(f"the tokenizer gives id {max(ids)}, the model's vocabulary has "
                        f"{vocab_size}; is it the tokenizer of this checkpoint?")
