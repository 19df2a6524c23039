"""Rows become token ids and what of them is learned; texts become blocks.

examples, report = encode_rows(rows, template, cutoff_len=1024)
examples[0].ids, examples[0].supervised
"""

from dataclasses import dataclass, field

import numpy as np

from minisft.common.errors import UserError
from minisft.data import dataset
from minisft.text.tokenizer import check_vocabulary


@dataclass
class Example:
    """One row: token ids (T,) int32 and whether each is to be learned (T,) bool.

    lengths: of the texts in it that are not to see each other; None for a single one. Answers to
    compare, each behind its prompt, are such texts, the best first.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list | None = None

    def texts(self):
        """Its texts as Examples of their own."""
        ends = np.cumsum(self.lengths or [len(self.ids)])[:-1]
        return [
            Example(*one)
            for one in zip(np.split(self.ids, ends), np.split(self.supervised, ends), strict=True)
        ]


@dataclass
class EncodeReport:
    """How many rows were encoded, cut to the length limit, left with nothing to learn, broken."""

    num_rows: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    num_long: int = 0  # left out because they would have to be cut
    num_same: int = 0  # left out because their answers do not differ
    broken: list = field(default_factory=list)  # a message each

    def add(self, other):
        """Count what `other` counted too."""
        self.num_rows += other.num_rows
        self.num_cut += other.num_cut
        self.num_dropped += other.num_dropped
        self.num_long += other.num_long
        self.num_same += other.num_same
        self.broken += other.broken

    def __bool__(self):
        """Whether anything happened to any row."""
        return bool(self.num_cut or self.num_long or self.num_same or self.broken)

    def __str__(self):
        """A line for people."""
        said = []
        if self.num_cut:
            said.append(
                f"{self.num_cut} of {self.num_rows} rows cut to the length limit, "
                f"{self.num_dropped} dropped because no answer was left"
            )
        if self.num_long:
            said.append(
                f"{self.num_long} of {self.num_rows} rows left out: longer than the length limit"
            )
        if self.num_same:
            said.append(
                f"{self.num_same} of {self.num_rows} rows left out: their answers are the "
                "same, so none is to be preferred"
            )
        if self.broken:
            said.append(f"{len(self.broken)} broken rows left out, the first: {self.broken[0]}")
        return "; ".join(said)


def encode_rows(rows, template, cutoff_len, vocab_size=None):
    """Conversations -> (list of Example, EncodeReport). A cut answer ends without EOS.

    UserError where the template or a vocabulary of `vocab_size` cannot take a row.
    """
    examples, report = [], EncodeReport()
    for row in rows:
        ids, supervised = encode_row(row, template, vocab_size)
        report.num_rows += 1
        report.num_cut += len(ids) > cutoff_len
        example = Example(ids[:cutoff_len], supervised[:cutoff_len])
        if example.supervised[1:].any():
            examples.append(example)
        else:
            report.num_dropped += 1
    return examples, report


def encode_row(row, template, vocab_size=None):
    """A conversation -> (ids (T,) int32, supervised (T,) bool); UserError as from `encode_rows`."""
    try:
        ids, supervised = template.encode(row.messages, row.tools)
        check_vocabulary(ids, vocab_size)
    except UserError as error:
        raise UserError(f"{row.source}, row {row.index + 1}: {error}") from error
    return np.asarray(ids, np.int32), np.asarray(supervised, bool)


def encode_rankings(rows, template, cutoff_len, vocab_size=None, whole=False):
    """Rows with several answers -> (list of Example with a text for each, EncodeReport).

    Supervised is what follows the messages that all conversations of a row begin with. A row is
    dropped where the limit leaves nothing of an answer. whole: also where it cuts one, since what
    is then at the end is not what there was to judge. An answer that comes again, within the limit,
    counts once, at its best place; where no other is left there is nothing to learn.
    """
    examples, report = [], EncodeReport()
    for row in rows:
        conversations = [row.messages, *row.rejected]
        common = _common(conversations)
        try:
            texts = [
                _answer_alone(template, messages, row.tools, common) for messages in conversations
            ]
            check_vocabulary([max(text.ids) for text in texts], vocab_size)
        except UserError as error:
            raise UserError(f"{row.source}, row {row.index + 1}: {error}") from error
        is_cut = any(len(text.ids) > cutoff_len for text in texts)
        report.num_rows += 1
        if is_cut and whole:
            report.num_long += 1
            continue
        report.num_cut += is_cut
        if not all(text.supervised[1:cutoff_len].any() for text in texts):
            report.num_dropped += 1
            continue
        texts = unique_texts(
            [Example(text.ids[:cutoff_len], text.supervised[:cutoff_len]) for text in texts]
        )
        if len(texts) == 1:
            report.num_same += 1
            continue
        examples.append(
            Example(
                np.concatenate([text.ids for text in texts]),
                np.concatenate([text.supervised for text in texts]),
                [len(text.ids) for text in texts],
            )
        )
    return examples, report


def unique_texts(texts):
    """The Examples without those of the same tokens as one before them."""
    found = {}
    for text in texts:
        found.setdefault(text.ids.tobytes(), text)
    return list(found.values())


def _common(conversations):
    """How many messages all conversations begin with, of each at least the last one left."""
    count, most = 0, min(map(len, conversations)) - 1
    while count < most and all(one[count] == conversations[0][count] for one in conversations):
        count += 1
    return count


def _answer_alone(template, messages, tools, start):
    """The Example of a conversation in which the answers before message `start` are not learned."""
    ids, supervised = (np.asarray(one) for one in template.encode(messages, tools))
    answers = sum(message["role"] == "assistant" for message in messages[:start])
    begins = np.flatnonzero(np.diff(supervised, prepend=False) & supervised)
    supervised[: begins[answers]] = False  # a run for every answer
    return Example(ids.astype(np.int32), supervised)


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


def read_and_encode(rows, encode, numbers=None):
    """Read the rows of these numbers (all of them) and encode them -> (Examples, EncodeReport)."""
    broken = []
    examples, report = encode(dataset.read(rows, broken, numbers))
    report.broken += broken
    return examples, report
