"""Encoded rows become batches: grouped by length, padded to their own longest row, or packed.

    batches = batches_of_rows(rows, template, cutoff_len=1024, seed=0, num_workers=2)
    for examples in batches.steps(rows_per_step=32, start=0, stop=1000):
        tokens, supervised, _ = collate(examples)

The rows of an epoch are shuffled by number and dealt out in windows of a hundred steps or so. A
worker process reads and encodes a window ahead of training, sorts it by length and cuts it into
steps, which then are shuffled. So whatever the size of the data, a window is all that is held, and
a step is found again from its number. What a step holds depends on the data, the seed and
`rows_per_step`; never on workers, processes or micro-batches.
"""

import math
import multiprocessing
import os
import signal
import threading
from functools import partial
from itertools import chain, islice

import numpy as np
import torch

from minisft.common.errors import UserError
from minisft.data.encoding import EncodeReport, encode_rows, encode_texts, read_and_encode

# Lengths are rounded up to a multiple: fewer shapes to prepare kernels for, aligned rows.
PAD_MULTIPLE = 8
COMPILED_PAD_MULTIPLE = 128  # few different shapes for compiled layers
# A window has at most so many steps, and fewer where their rows would be larger than this.
WINDOW_STEPS, WINDOW_BYTES = 128, 2 * 2**20
# Texts stay together, in the order of the file, in runs of about so many blocks.
RUN_BLOCKS = 4
# What is encoded before training: rows to see that they can be learned from, bytes of text to
# estimate how many tokens all of it is.
SAMPLE_ROWS, SAMPLE_BYTES = 128, 2**20


def _check_learnable(examples, report):
    if examples:
        return
    if 0 < report.num_same == report.num_rows:
        raise UserError(f"nothing to learn: {report}")
    raise UserError(
        "nothing to learn is left of the rows within the length limit; raise --cutoff_len"
    )


def batches_of_rows(
    rows, template, cutoff_len, vocab_size=None, seed=0, num_workers=0, encode=encode_rows
):
    """The Batches of conversations; UserError if rows from all over have nothing to learn.

    encode: of encoding.py, what makes Examples of rows: `encode_rows` or `encode_rankings`.
    """
    encode = partial(encode, template=template, cutoff_len=cutoff_len, vocab_size=vocab_size)
    sample = np.unique(np.linspace(0, len(rows) - 1, SAMPLE_ROWS).astype(int))
    examples, report = read_and_encode(rows, encode, sample)
    _check_learnable(examples, report)
    return Batches(
        rows, encode, seed, num_workers, total_bytes=int(rows.sizes().sum()), sampled=report
    )


def batches_of_texts(
    texts, tokenizer, block_size, vocab_size=None, seed=0, num_workers=0, packing=False
):
    """The Batches of plain texts, cut into blocks a window at a time.

    How many blocks long texts come to is estimated from a sample; a step may then have a few
    more or less than `rows_per_step`, and none is left out. Every window ends in a shorter block.
    """
    encode = partial(
        encode_texts,
        tokenizer=tokenizer,
        block_size=block_size,
        vocab_size=vocab_size,
        packing=packing,
    )
    sizes, run_bytes = texts.sizes(), RUN_BLOCKS * 4 * block_size  # a token is about 4 bytes
    starts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // run_bytes, prepend=-1))
    runs, run_sizes = np.append(starts, len(texts)), np.add.reduceat(sizes, starts)
    count = max(4, SAMPLE_BYTES // run_bytes)
    sample = np.unique(np.linspace(0, len(starts) - 1, count).astype(int))
    examples, report = read_and_encode(texts, encode, _numbers_in(runs, sample))
    _check_learnable(examples, report)
    num_tokens = sum(len(example.ids) for example in examples)
    total_tokens = num_tokens * run_sizes.sum() / run_sizes[sample].sum()
    return Batches(
        texts,
        encode,
        seed,
        num_workers,
        total_bytes=int(sizes.sum()),
        num_examples=max(1, math.ceil(total_tokens / block_size)),
        runs=runs,
        run_sizes=run_sizes,
    )


class Batches:
    """The optimizer steps of all epochs, any of them found by its number.

    rows: a sequence. encode: list of its items -> (list of Example, EncodeReport); both are handed
    to worker processes. num_examples: how many Examples an epoch has about; the rows, if not given.
    runs: bounds of the rows that stay together and in order, with their sizes; each alone if None.
    sampled: the EncodeReport of rows from all over.
    """

    def __init__(
        self,
        rows,
        encode,
        seed=0,
        num_workers=0,
        total_bytes=0,
        num_examples=None,
        runs=None,
        run_sizes=None,
        sampled=None,
    ):
        self.rows, self.encode, self.seed, self.num_workers = rows, encode, seed, num_workers
        self.num_examples = num_examples or len(rows)
        self.example_bytes = total_bytes / self.num_examples
        self.runs, self.run_sizes = runs, run_sizes
        self.report, self.sampled = EncodeReport(), sampled or EncodeReport()

    def steps_per_epoch(self, rows_per_step):
        """Every row once; the last step of an epoch may have fewer."""
        return math.ceil(self.num_examples / rows_per_step)

    def first(self, count):
        """The first `count` Examples, of rows that leave something to learn, to be looked at."""
        each = (read_and_encode(self.rows, self.encode, [row])[0] for row in range(len(self.rows)))
        return list(islice(chain.from_iterable(each), count))

    def held_out(self, rows, say):
        """The Examples of rows to evaluate on, encoded like these and held in memory."""
        examples, report = read_and_encode(rows, self.encode)
        if report:
            say(f"evaluation: {report}")
        _check_learnable(examples, report)
        return examples

    def steps(self, rows_per_step, start, stop):
        """Yield the Examples (a list) of the optimizer steps `start` to `stop` - 1 of the run.

        Steps are counted through all epochs. Only the window that `start` is in is read again.
        Rows without anything to learn are left out; where that takes all, a list is empty.
        """
        tasks = self._windows(rows_per_step, start, stop)
        reader = _WindowReader(self.rows, self.encode)
        for first, window in ahead(reader, tasks, self.num_workers):
            if isinstance(window, UserError):
                raise window
            steps, report = window
            self.report.add(report)
            yield from steps[max(0, start - first) : stop - first]

    def take_report(self):
        """The EncodeReport of the windows used since this was last asked."""
        report, self.report = self.report, EncodeReport()
        return report

    def _windows(self, rows_per_step, start, stop):
        """Yield (number of its first step, row numbers, number of steps, seed) of each window."""
        per_epoch = self.steps_per_epoch(rows_per_step)
        fitting = WINDOW_BYTES // max(1, round(rows_per_step * self.example_bytes))
        per_window = min(WINDOW_STEPS, max(1, fitting))
        while start < stop:
            epoch, step = divmod(start, per_epoch)
            rows_between = self._shuffled(epoch)
            for first in range(step - step % per_window, per_epoch, per_window):
                if epoch * per_epoch + first >= stop:
                    return
                last = min(first + per_window, per_epoch)
                numbers = rows_between(first * rows_per_step, last * rows_per_step)
                yield epoch * per_epoch + first, numbers, last - first, [self.seed, epoch, first]
            start = (epoch + 1) * per_epoch

    def _shuffled(self, epoch):
        """A function: two positions among the Examples of an epoch -> numbers of the rows there."""
        generator = np.random.default_rng([self.seed, epoch])
        if self.runs is None:
            count = len(self.rows)
            order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.int64)
            generator.shuffle(order)
            return lambda start, end: order[start:end]
        order = generator.permutation(len(self.run_sizes))
        ends = np.cumsum(self.run_sizes[order])
        middles = (ends - self.run_sizes[order] / 2) * (self.num_examples / ends[-1])

        def rows_between(start, end):
            """The rows of the runs whose middles lie there."""
            first, last = np.searchsorted(middles, [start, end])
            return _numbers_in(self.runs, order[first:last])

        return rows_between


class _WindowReader:
    """What a worker does: read and encode the rows of a window, and cut it into steps."""

    def __init__(self, rows, encode):
        self.rows, self.encode = rows, encode

    def __getitem__(self, task):
        first, numbers, num_steps, seed = task
        try:
            examples, report = read_and_encode(self.rows, self.encode, numbers)
        except UserError as error:
            return first, UserError(str(error))  # raised where it is read, without a traceback
        return first, (_cut(examples, num_steps, np.random.default_rng(seed)), report)


def _cut(examples, num_steps, generator):
    """Examples -> a list of steps, lists of Examples of similar length, in random order.

    Steps differ by one Example at most. Those of one padded length are shuffled, so that other
    rows meet in every epoch.
    """
    padded = -(-np.array([len(example.ids) for example in examples], int) // PAD_MULTIPLE)
    order = generator.permutation(len(examples))
    steps = np.array_split(order[np.argsort(padded[order], kind="stable")], num_steps)
    return [[examples[row] for row in steps[step]] for step in generator.permutation(num_steps)]


def _numbers_in(runs, chosen):
    """The numbers of the rows that are in these runs."""
    return np.concatenate([np.arange(0), *(np.arange(runs[run], runs[run + 1]) for run in chosen)])


def ahead(reader, tasks, num_workers):
    """Yield `reader[task]` of all tasks in order; with workers, before it is asked for."""
    if num_workers == 0:
        yield from map(reader.__getitem__, tasks)
        return
    from torch.utils.data import DataLoader

    # With a generator of its own, lest the loader draws from the one that dropout uses.
    yield from DataLoader(
        reader,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=1,
        collate_fn=_unchanged,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


def _unchanged(window):
    return window


def _begin_worker(number):
    """A worker ends with the process that trains: neither before it nor after it."""
    for name in (signal.SIGINT, signal.SIGTERM):  # which it deals with itself
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # The loader looks for its parent too, but not while a window waits to be taken, nor for one
    # that was gone before the worker began.
    multiprocessing.parent_process().join()
    os._exit(1)


def micro_batches(step_rows, batch_size, rank=0, world_size=1):
    """Split a step's rows into this process's micro-batches, as many on every process.

    Processes take turns along the sorted rows, so that their batches are equally long. A batch may
    be empty where the rows do not go round.
    """
    stride = batch_size * world_size
    return [
        step_rows[start : start + stride][rank::world_size]
        for start in range(0, max(1, len(step_rows)), stride)
    ]


def collate(examples, device="cpu", pad_multiple=PAD_MULTIPLE):
    """Examples -> tokens (B, T) int64 and supervised (B, T) bool, padded on the right; None.

    Padding is never supervised, and a row's own tokens never see it; its id is of no importance.
    T is a multiple of `pad_multiple`. No examples give one row of padding.
    """
    longest = max([len(one.ids) for one in examples], default=1)
    width = -(-longest // pad_multiple) * pad_multiple
    tokens = torch.zeros(max(1, len(examples)), width, dtype=torch.int64)
    supervised = torch.zeros_like(tokens, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.from_numpy(example.ids)
        supervised[row, : len(example.ids)] = torch.from_numpy(example.supervised)
    return tokens.to(device, non_blocking=True), supervised.to(device, non_blocking=True), None


def pack(examples, device="cpu"):
    """Examples -> tokens (1, T), supervised (1, T) and the lengths of the rows in it, unpadded.

    The first token of a row is never learned: what stands before it is another row.
    """
    if not examples:
        return collate(examples, device)
    lengths = [length for one in examples for length in one.lengths or [len(one.ids)]]
    tokens = torch.from_numpy(np.concatenate([one.ids for one in examples]).astype(np.int64))
    supervised = torch.from_numpy(np.concatenate([one.supervised for one in examples]))
    supervised[np.cumsum([0, *lengths[:-1]])] = False
    return tokens[None].to(device), supervised[None].to(device), lengths
