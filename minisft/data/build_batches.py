"""Build the Batches of a data set, and check a sample of its rows.

batches = batches_of_rows(rows, template, cutoff_len=1024, num_workers=2)
batches = batches_of_texts(texts, tokenizer, block_size=1024)
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import chain, islice

import numpy as np

from minisft.common.errors import UserError
from minisft.data.batching import Batches
from minisft.data.dataset import Rows
from minisft.data.encode_report import EncodeReport
from minisft.data.encode_texts import encode_texts
from minisft.data.encoding import Example, encode_rows, read_and_encode
from minisft.data.order import ShuffledRows, ShuffledRuns
from minisft.text.chat_template import ChatTemplate
from minisft.text.tokenizer import Tokenizer

# Neighbouring texts form runs of about this many blocks, which shuffling keeps.
RUN_BLOCKS = 4
# Encoded before training: rows, to check them; bytes of text, to estimate the number of tokens.
SAMPLE_ROWS, SAMPLE_BYTES = 128, 2**20
# Encoded before training to count the rows that nothing is learned from; of more rows, their share.
MAX_COUNTED = 20_000
# A rough estimate for any language and tokenizer.
BYTES_PER_TOKEN = 4


def batches_of_rows(
    rows: Rows,
    template: ChatTemplate,
    cutoff_len: int,
    vocab_size: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    encode: Callable[..., tuple[list[Example], EncodeReport]] = encode_rows,
) -> Batches:
    """The Batches of conversations. Its sample_report covers rows spread over the data set.

    encode: encode_rows or encode_preferences. UserError if no row of the sample has supervised
    tokens. Epochs, steps and progress count the rows that are learned: if the sample has others,
    more rows are encoded to leave them out, or above MAX_COUNTED to know their share.
    """
    encode = partial(encode, template=template, cutoff_len=cutoff_len, vocab_size=vocab_size)
    examples, report = read_and_encode(rows, encode, evenly_spread(len(rows), SAMPLE_ROWS))
    check_learnable(examples, report, "training")
    order = None
    if report.num_left_out:
        counted = evenly_spread(len(rows), MAX_COUNTED)
        learned = [number for number in counted if read_and_encode(rows, encode, [number])[0]]
        if len(counted) == len(rows):
            rows = rows.select(learned)
        else:
            num_learned = max(1, round(len(rows) * len(learned) / len(counted)))
            order = ShuffledRows(len(rows), seed, num_learned)
    batches = Batches(rows, encode, seed, num_workers, int(rows.sizes().sum()), order)
    batches.sample_report = report
    return batches


def evenly_spread(count: int, most: int) -> np.ndarray:
    """At most `most` numbers from 0 to `count` - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def batches_of_texts(
    texts: Rows,
    tokenizer: Tokenizer,
    block_size: int,
    vocab_size: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
    packing: bool = False,
) -> Batches:
    """The Batches of plain texts, cut into blocks window by window.

    The number of blocks is estimated from a sample, so a step may have a few more or fewer than
    `rows_per_step`. Every text is used. The last block of a window is shorter.
    """
    encode = partial(
        encode_texts,
        tokenizer=tokenizer,
        block_size=block_size,
        vocab_size=vocab_size,
        packing=packing,
    )
    sizes = texts.sizes()
    run_bytes = RUN_BLOCKS * BYTES_PER_TOKEN * block_size
    starts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // run_bytes, prepend=-1))
    run_sizes = np.add.reduceat(sizes, starts)
    order = ShuffledRuns(np.append(starts, len(texts)), run_sizes, 1, seed)

    sample = evenly_spread(len(starts), max(4, SAMPLE_BYTES // run_bytes))
    examples, report = read_and_encode(texts, encode, order.rows_of(sample))
    check_learnable(examples, report, "training")
    num_tokens = sum(len(example.ids) for example in examples)
    total_tokens = num_tokens * run_sizes.sum() / run_sizes[sample].sum()
    order.num_examples = max(1, math.ceil(total_tokens / block_size))
    return Batches(texts, encode, seed, num_workers, int(sizes.sum()), order)


def held_out_examples(
    batches: Batches, rows: Rows, print_line: Callable[[str], None]
) -> list[Example]:
    """The encoded rows to evaluate on, all in memory."""
    examples, report = read_and_encode(rows, batches.encode)
    if report:
        print_line(f"evaluation: {report}")
    check_learnable(examples, report, "evaluation")
    return examples


def first_examples(batches: Batches, count: int) -> list[Example]:
    """The examples of the first `count` rows with supervised tokens, in the order of the file."""
    each = (
        read_and_encode(batches.rows, batches.encode, [number])[0]
        for number in range(len(batches.rows))
    )
    return list(chain.from_iterable(islice(filter(None, each), count)))


def first_blocks(batches: Batches, count: int) -> list[Example]:
    """The first `count` blocks of plain text, in the order of the file."""
    num_texts = max(1, count)
    while True:
        texts = range(min(num_texts, len(batches.rows)))
        blocks, _ = read_and_encode(batches.rows, batches.encode, texts)
        # The last block may be shorter than it is in training.
        if len(blocks) > count or num_texts >= len(batches.rows):
            return blocks[:count]
        num_texts *= 2


def check_learnable(examples: list[Example], report: EncodeReport, purpose: str) -> None:
    """Raise UserError if there are no examples. purpose: of the rows, training or evaluation."""
    if examples:
        return
    if report.num_truncated:
        raise UserError(f"no {purpose} row has an answer left after truncation; raise --cutoff_len")
    raise UserError(f"no {purpose} row is usable{f': {report}' if report else ''}")
