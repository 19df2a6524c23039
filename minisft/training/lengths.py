"""How long the rows of a run are and how they fall into batches, before there is a model.

    data = look_at_data(options, ModelConfig.load(model_dir), model_dir, num_processes=8)
    print(data.num_tokens, data.padding, data.largest)

Lengths are counted by the tokenizer, or estimated from the bytes of the rows where there is none;
the batches are those that training would make.
"""

from dataclasses import dataclass

import numpy as np

from minisft.common.errors import UserError
from minisft.data import batching
from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Example, read_and_encode
from minisft.data.sources import find_sources
from minisft.text.template import get_template
from minisft.text.tokenizer import FILES, Tokenizer
from minisft.training.data import load_data

# So many rows are encoded, the lengths of others estimated from their size; of larger data sets a
# part is dealt out into batches, which is enough to know the padding.
ENCODED_ROWS, DEALT_ROWS = 5_000, 100_000
SMALL_VOCABULARY = 100  # no model has a smaller one
BYTES_PER_TOKEN = 4  # of text in UTF-8, English or Chinese, within a third for most tokenizers


@dataclass
class Data:
    """What is known of the rows. Totals are of one epoch; None where there are no rows.

    largest: (tokens with padding, supervised tokens) of the largest micro-batch of any process.
    num_texts: the answers of all rows where these are compared, else the rows. padding: share of
    what is computed. origin: in words, where the lengths are from.
    """

    origin: str
    largest: tuple
    num_examples: int | None = None
    num_tokens: int | None = None
    num_texts: int | None = None
    padding: float = 0.0


def look_at_data(options, config, model_dir, num_processes):
    """The Data of a run."""
    plain_text, ranking = options.stage == "pt", options.stage in ("rm", "dpo")
    limit = min(options.block_size if plain_text else options.cutoff_len, config.context_length)
    batch_size = options.per_device_train_batch_size
    num_texts = batch_size * (2 if ranking else 1)
    longest = (num_texts * padded(limit, options), num_texts * limit)
    try:
        find_sources(options.dataset or options.train_dir, options.dataset_dir, plain_text, ranking)
    except UserError as error:
        each = "answer of two" if ranking else "row"
        return Data(
            f"assumed, {limit:,} tokens in every {each}, as the rows are not here ({error})",
            longest,
        )
    if any((model_dir / name).is_file() for name in FILES[:2]):
        tokenizer, origin = Tokenizer.load(model_dir), "counted by the tokenizer"
        template = (
            None
            if plain_text
            else get_template(options.template, tokenizer, options.default_system)
        )
    else:
        tokenizer = template = BytesAsTokens()
        origin = f"estimated, a token for {BYTES_PER_TOKEN} bytes, as there is no tokenizer"
    batches, _ = load_data(options, tokenizer, template, config, print)
    if plain_text:
        return Data(
            origin,
            longest,
            batches.num_examples,
            batches.num_examples * limit,
            batches.num_examples,
        )
    examples, note = stand_ins(batches, limit)
    return dealt_out(examples, origin + note, batches, options, num_processes)


class BytesAsTokens:
    """Stands for tokenizer and template where there is none: ids of the right number, about.

    They differ where texts do, lest rows are taken to have the same answers.
    """

    bos_token_id = eos_token_id = None
    add_bos_token = False

    def encode(self, text, tools=None):
        """As Tokenizer.encode for str, as Template.encode for messages."""
        if isinstance(text, str):
            content = text.encode("utf-8", "replace")
            return [
                sum(content[start : start + BYTES_PER_TOKEN]) % SMALL_VOCABULARY
                for start in range(0, len(content), BYTES_PER_TOKEN)
            ]
        ids, supervised = [], []
        for message in text:
            new = self.encode(f"{message.get('content') or ''}{message.get('input') or ''}") or [0]
            ids += new
            supervised += [message["role"] == "assistant"] * len(new)
        return ids, supervised


def stand_ins(batches, limit):
    """(rows without content, as Examples whose ids and supervised are ranges; a note).

    Of many rows a part, spread over all. Lengths are encoded, or estimated from a row's bytes.
    """
    sizes = batches.rows.sizes()
    part = spread(len(sizes), DEALT_ROWS)
    chosen = part[spread(len(part), ENCODED_ROWS)]
    found = {row: read_and_encode(batches.rows, batches.encode, [row])[0] for row in chosen}
    known = [example for examples in found.values() for example in examples]
    if not known:
        raise UserError("no row has anything to learn")
    num_tokens = sum(len(one.ids) for one in known)
    per_byte = num_tokens / sizes[chosen].sum()
    share = sum(int(one.supervised.sum()) for one in known) / num_tokens
    made = [
        Example(range(len(one.ids)), range(int(one.supervised.sum())), one.lengths) for one in known
    ]
    by_size, others = sorted(filter(found.get, chosen), key=sizes.item), np.setdiff1d(part, chosen)
    places = np.searchsorted(sizes[by_size], sizes[others]).clip(max=len(by_size) - 1)
    for row, place in zip(others, places, strict=True):
        (like,) = found[by_size[place]]  # its answers share the row as those of one of its size
        ratio = sizes[row] * per_byte / len(like.ids)
        lengths = [
            min(limit, max(2, round(length * ratio))) for length in like.lengths or [len(like.ids)]
        ]
        made.append(
            Example(
                range(sum(lengths)), range(round(sum(lengths) * share)), like.lengths and lengths
            )
        )
    note = f"; {len(chosen):,} of {len(sizes):,} rows, the others by their size"
    return made, note if len(chosen) < len(sizes) else ""


def spread(count, most):
    """At most so many numbers below `count`, at equal distances."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def dealt_out(examples, origin, batches, options, num_processes):
    """The Data of rows of these lengths, dealt out by batching.py as in training."""
    dealer = batching.Batches(
        examples,
        lambda rows: (rows, EncodeReport()),
        options.seed,
        total_bytes=batches.example_bytes * len(examples),
    )
    batch_size = options.per_device_train_batch_size
    rows_per_step = batch_size * options.gradient_accumulation_steps * num_processes
    computed, largest = 0, (0, 0)
    for rows in dealer.steps(rows_per_step, 0, dealer.steps_per_epoch(rows_per_step)):
        for rank in range(num_processes):
            for some in batching.micro_batches(rows, batch_size, rank, num_processes):
                size = shape_of(some, options), sum(len(one.supervised) for one in some)
                computed, largest = computed + size[0], max(largest, size)
    num_tokens = sum(len(one.ids) for one in examples)
    num_texts = sum(len(one.lengths or [one]) for one in examples)
    whole = batches.num_examples / len(spread(batches.num_examples, DEALT_ROWS))
    return Data(
        origin,
        largest,
        batches.num_examples,
        round(num_tokens * whole),
        round(num_texts * whole),
        1 - num_tokens / computed,
    )


def shape_of(rows, options):
    """Tokens of a micro-batch, with what it is padded by."""
    texts = [length for one in rows for length in one.lengths or [len(one.ids)]] or [1]
    return sum(texts) if options.packing else len(texts) * padded(max(texts), options)


def padded(length, options):
    """The length of a row in a batch of which it is the longest."""
    if options.packing:
        return length
    multiple = batching.COMPILED_PAD_MULTIPLE if options.compile else batching.PAD_MULTIPLE
    return -(-length // multiple) * multiple
