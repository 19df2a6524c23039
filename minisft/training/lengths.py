"""Lengths of the rows of a run, and sizes of its batches. No model is needed.

    data = inspect_data(options, ModelConfig.load(model_dir), model_dir, num_processes=8)
    print(data.epoch.num_tokens, data.epoch.padding, data.largest)

The tokenizer counts the tokens. Without a tokenizer they are estimated from the bytes of the rows;
without the rows, every row is assumed to be as long as the limit. Batches are made as in training.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from minisft.checkpoints.hub import resolve_adapter
from minisft.common.errors import UserError
from minisft.data import batching
from minisft.data.build_batches import BYTES_PER_TOKEN, check_learnable, evenly_spread
from minisft.data.dataset import Rows
from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Example, read_and_encode
from minisft.data.sources import MissingData, find_sources
from minisft.model.config import ModelConfig
from minisft.text.chat_template import TokenizedText
from minisft.text.tokenizer_files import has_tokenizer
from minisft.training.data import length_limit, load_data, load_template, show_samples
from minisft.training.run import count_rows_per_step
from minisft.training.vocabulary import load_vocabulary

# At most MAX_ENCODED rows are encoded; the lengths of others are estimated from these. At most
# MAX_BATCHED rows are put into batches: enough to know the padding.
MAX_ENCODED, MAX_BATCHED = 5_000, 100_000


@dataclass
class Epoch:
    """Sizes of an epoch, over all ranks."""

    num_rows: int
    num_tokens: int  # without padding
    num_texts: int  # the rows, or their answers if these are compared
    padding: float  # share of the tokens that are computed


@dataclass
class Data:
    """Sizes of the data of a run."""

    origin: str  # where the lengths come from, as text
    largest: tuple[int, int]  # (tokens with padding, supervised) of any rank's largest micro-batch
    epoch: Epoch | None = None  # None without the rows
    spread: str = ""  # how the lengths vary, as text
    report: EncodeReport = field(default_factory=EncodeReport)  # on the rows that were encoded


def inspect_data(
    options: Namespace, config: ModelConfig, model_dir: Path, num_processes: int
) -> Data:
    """The Data of a run."""
    plain_text, ranking = options.stage == "pt", options.stage in ("rm", "dpo")
    limit = length_limit(options, config)
    num_texts = options.per_device_train_batch_size * (2 if ranking else 1)
    longest = (num_texts * padded_length(limit, options), num_texts * limit)
    try:
        dataset = options.dataset or options.train_dir
        find_sources(dataset, options.dataset_dir, plain_text, ranking, offline=True)
    except MissingData as error:
        if options.show_samples:
            raise
        text = "answer of two" if ranking else "row"
        return Data(
            f"assumed, {limit:,} tokens in every {text}: the rows are not available ({error})",
            longest,
        )
    tokenizer, template, origin = find_tokenizer(options, model_dir)
    batches, _ = load_data(options, tokenizer, template, config, print)
    if options.show_samples and isinstance(tokenizer, ByteTokenizer):
        raise UserError(f"--show_samples needs a tokenizer, and {model_dir} has none")
    show_samples(options, batches, tokenizer, print)
    if plain_text:  # blocks, all of them full but the last
        num_blocks = batches.num_examples
        return Data(origin, longest, Epoch(num_blocks, num_blocks * limit, num_blocks, 0.0))
    rows, report, note = estimate_lengths(batches, limit)
    largest, epoch = measure_batches(rows, batches, options, num_processes)
    if report.same_counts(batches.sample_report):  # load_data has printed that one
        report = EncodeReport()
    return Data(origin + note, largest, epoch, spread_of_lengths(rows), report)


def find_tokenizer(options: Namespace, model_dir: Path) -> tuple[Any, Any, str]:
    """(tokenizer, template, origin of the lengths); without a tokenizer, a ByteTokenizer."""
    if has_tokenizer(model_dir):
        adapter_dir = resolve_adapter(options.adapter, offline=True) if options.adapter else None
        tokenizer, _, _ = load_vocabulary(options, model_dir, adapter_dir, say=lambda text: None)
        template = load_template(options, tokenizer, say=lambda text: None)
        return tokenizer, template, "counted by the tokenizer"
    origin = f"estimated, {BYTES_PER_TOKEN} bytes per token: there is no tokenizer"
    return ByteTokenizer(), ByteTokenizer(), origin


class ByteTokenizer:
    """Stands in for a missing tokenizer and template: about the right number of ids.

    The ids depend on the text, so that different answers of a row stay different.
    """

    bos_token_id = eos_token_id = None
    add_bos_token = False
    vocab_size = 100  # smaller than that of any model
    facts = SimpleNamespace(changes_tools=lambda messages, tools: False)

    def begin(self, messages: Any, tools: Any = None) -> None:
        """As ChatTemplate.begin; nothing is rendered here."""

    def encode(self, text: Any, tools: Any = None) -> Any:
        """As Tokenizer.encode for a str, as ChatTemplate.encode for messages."""
        if isinstance(text, str):
            content = text.encode("utf-8", "replace")
            starts = range(0, len(content), BYTES_PER_TOKEN)
            return [sum(content[i : i + BYTES_PER_TOKEN]) % self.vocab_size for i in starts]
        ids: list[int] = []
        supervised: list[bool] = []
        for message in text:
            new = self.encode(f"{message.get('content') or ''}{message.get('input') or ''}") or [0]
            ids += new
            supervised += [message["role"] == "assistant"] * len(new)
        return [TokenizedText(ids, supervised)]


def estimate_lengths(
    batches: batching.Batches, limit: int
) -> tuple[list[list[Example]], EncodeReport, str]:
    """(the examples of each row that is learned, a report, a note on how they were estimated).

    The examples have lengths but no content. Of many rows, only an evenly spread part is encoded.
    Another row is like an encoded row of about its size, longer or shorter by the ratio of their
    bytes. If nothing is learned from that row, the other is left out as well.
    """
    assert isinstance(batches.rows, Rows)
    sizes = batches.rows.sizes()
    selected = evenly_spread(len(sizes), MAX_BATCHED)
    encoded = selected[evenly_spread(len(selected), MAX_ENCODED)]
    known: dict[int, list[Example]] = {}  # the examples of a row
    report = EncodeReport()
    for row in encoded:
        known[row], report_of_row = read_and_encode(batches.rows, batches.encode, [row])
        report.add(report_of_row)
    check_learnable(list(chain.from_iterable(known.values())), report, "training")
    rows = [
        [without_content(text_lengths(text), int(text.supervised.sum())) for text in of_row]
        for of_row in known.values()
    ]
    # Both by size: an encoded row stands for the others of its rank, and scales to their sizes. The
    # rows of an array have no sizes of their own, so there each encoded row stands for its share.
    by_size = sorted(known, key=lambda row: sizes[row])
    others = np.setdiff1d(selected, encoded)
    for rank, row in enumerate(others[np.argsort(sizes[others], kind="stable")]):
        similar = by_size[rank * len(by_size) // len(others)]
        examples = []
        for example in known[similar]:
            scale = sizes[row] / sizes[similar]
            lengths = [min(limit, max(2, round(n * scale))) for n in text_lengths(example)]
            num_supervised = round(sum(lengths) * example.supervised.mean())
            examples.append(without_content(lengths, num_supervised))
        rows.append(examples)
    note = f"; {len(encoded):,} of {len(sizes):,} rows, the others estimated from these"
    return list(filter(None, rows)), report, note if len(encoded) < len(sizes) else ""


def spread_of_lengths(rows: list[list[Example]]) -> str:
    """The shortest, the usual and the longest texts, in tokens after truncation."""
    lengths = [length for of_row in rows for text in of_row for length in text_lengths(text)]
    shortest, median, most, longest = np.percentile(lengths, [0, 50, 95, 100]).astype(int)
    return f"{shortest:,} to {longest:,} tokens; median {median:,}, 95 % have at most {most:,}"


def text_lengths(example: Example) -> list[int]:
    """Lengths of the texts of an example, in tokens."""
    return example.lengths or [len(example.ids)]


def without_content(lengths: list[int], num_supervised: int) -> Example:
    """An Example with these numbers of tokens. Its arrays take no memory."""
    ids = np.broadcast_to(np.int32(0), sum(lengths))
    return Example(ids, np.broadcast_to(np.True_, num_supervised), lengths)


def measure_batches(
    rows: list[list[Example]], batches: batching.Batches, options: Namespace, num_processes: int
) -> tuple[tuple[int, int], Epoch]:
    """(tokens and supervised tokens of the largest micro-batch, the epoch), batched as in training.

    rows: the examples of each row; they may be a part of the rows of `batches`.
    """
    examples = list(chain.from_iterable(rows))
    dealt = batching.Batches(
        examples, already_encoded, options.seed, total_bytes=batches.example_bytes * len(examples)
    )
    rows_per_step = count_rows_per_step(options, num_processes)
    num_computed, largest = 0, (0, 0)
    for of_step in dealt.steps(rows_per_step, 0, dealt.steps_per_epoch(rows_per_step)):
        for rank in range(num_processes):
            for part in batching.micro_batches(
                of_step, options.per_device_train_batch_size, rank, num_processes
            ):
                size = batch_size(part, options)
                num_computed += size
                largest = max(largest, (size, sum(len(row.supervised) for row in part)))
    num_tokens = sum(len(example.ids) for example in examples)
    num_texts = sum(len(text_lengths(example)) for example in examples)
    factor = batches.num_examples / len(rows)
    return largest, Epoch(
        batches.num_examples,
        round(num_tokens * factor),
        round(num_texts * factor),
        padding=1 - num_tokens / num_computed,
    )


def already_encoded(rows: Any) -> tuple[list[Example], EncodeReport]:
    """The `encode` function for rows that are examples already."""
    return list(rows), EncodeReport()


def batch_size(rows: Sequence[Example], options: Namespace) -> int:
    """Tokens of a micro-batch with its padding."""
    lengths = [length for row in rows for length in text_lengths(row)] or [1]
    if options.packing:
        return sum(lengths)
    return len(lengths) * padded_length(max(lengths), options)


def padded_length(length: int, options: Namespace) -> int:
    """Length of a row in a batch in which it is the longest."""
    if options.packing:
        return length
    multiple = batching.COMPILED_PAD_MULTIPLE if options.compile else batching.PAD_MULTIPLE
    return -(-length // multiple) * multiple
