"""Examples become optimizer steps, and steps become batches of similar length.

    batches = Batches(rows, encode, seed=0)
    for examples in batches.steps(rows_per_step=32, start=0, stop=1000):
        for micro_batch in micro_batches(examples, batch_size=8, rank=0, world_size=2):
            tokens, supervised, _ = collate(micro_batch)

The rows of an epoch are shuffled by number and dealt into windows of about a hundred steps. Each
window is read, encoded, sorted by length and cut into steps, and its steps are shuffled. So only a
window is in memory, whatever the size of the data, and any step can be rebuilt from its number.
A step depends on the data, the seed and `rows_per_step`; never on workers, ranks or batch size.

The tour explains it: docs/tour/04_batches.md.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minisft.common.devices import send
from minisft.common.errors import UserError
from minisft.data.dataset import Rows
from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Encode, Example
from minisft.data.order import ShuffledRows, ShuffledRuns
from minisft.data.workers import Window, WindowReader, read_ahead

# Padding to a multiple gives fewer shapes to prepare kernels for, and compiled layers fewer still.
PAD_MULTIPLE = 8
COMPILED_PAD_MULTIPLE = 128
# A window has at most this many steps, and fewer if their rows would be larger than this.
WINDOW_STEPS, WINDOW_BYTES = 128, 2 * 2**20

# tokens (B, T), supervised (B, T), and the lengths of the rows if they are packed into one. Only
# the tokens go to the device: the CPU needs the mask to know how many targets there are.
Batch = tuple[Tensor, Tensor, list[int] | None]


class Batches:
    """The optimizer steps of all epochs.

    rows: a sequence. encode: rows -> (examples, report); see encoding.py. num_workers: processes
    that read and encode windows ahead of training. total_bytes: size of all rows.
    order: the order of the rows in an epoch; by default every row once, shuffled.
    """

    def __init__(
        self,
        rows: Rows | Sequence[Example],
        encode: Encode,
        seed: int = 0,
        num_workers: int = 0,
        total_bytes: float = 0,
        order: ShuffledRows | ShuffledRuns | None = None,
    ) -> None:
        self.rows, self.encode, self.seed, self.num_workers = rows, encode, seed, num_workers
        self.order = order or ShuffledRows(len(rows), seed)
        self.num_examples = self.order.num_examples
        self.example_bytes = total_bytes / self.num_examples
        self.report = EncodeReport()  # on the windows used since take_report()
        self.sample_report = EncodeReport()  # on rows encoded before training
        self.told_report = EncodeReport()  # the last one that changed_report() returned

    def steps_per_epoch(self, rows_per_step: int) -> int:
        """Steps that use every row once; the last step may have fewer rows."""
        return math.ceil(self.num_examples / rows_per_step)

    def steps(self, rows_per_step: int, start: int, stop: int) -> Iterator[list[Example]]:
        """Yield the examples of steps `start` to `stop` - 1, counted through all epochs.

        Rows without supervised tokens are left out, so a step may be empty. A broken row raises
        UserError.
        """
        reader = WindowReader(self.rows, self.encode)
        windows = self._windows(rows_per_step, start, stop)
        for window, examples, report in read_ahead(reader, windows, self.num_workers):
            if isinstance(examples, UserError):
                raise examples
            self.report.add(report)
            steps = steps_by_length(examples, window.num_steps, window.seed)
            yield from steps[max(0, start - window.first_step) : stop - window.first_step]

    def _windows(self, rows_per_step: int, start: int, stop: int) -> Iterator[Window]:
        per_epoch = self.steps_per_epoch(rows_per_step)
        step_bytes = max(1, round(rows_per_step * self.example_bytes))
        per_window = min(WINDOW_STEPS, max(1, WINDOW_BYTES // step_bytes))
        per_window = self.order.window_steps(per_window, per_epoch, step_bytes)
        for epoch in range(start // per_epoch, math.ceil(stop / per_epoch)):
            rows_between = self.order.of_epoch(epoch)
            before = epoch * per_epoch
            for first in range(0, per_epoch, per_window):
                last = min(first + per_window, per_epoch)
                if before + last > start and before + first < stop:
                    numbers = rows_between(first * rows_per_step, last * rows_per_step)
                    seed = [self.seed, epoch, first]
                    yield Window(before + first, last - first, numbers, seed)

    def take_report(self) -> EncodeReport:
        """The report on the rows used since the last call."""
        report, self.report = self.report, EncodeReport()
        report.drop_repeated_notes(self.sample_report)
        return report

    def changed_report(self) -> EncodeReport:
        """take_report(), but empty if the report before it, or on the sample, says the same."""
        report = self.take_report()
        if report.same_counts(self.told_report) or report.same_counts(self.sample_report):
            return EncodeReport()
        self.told_report = report
        return report


def steps_by_length(
    examples: list[Example], num_steps: int, seed: Sequence[int]
) -> list[list[Example]]:
    """Sort examples by padded length, cut them into steps, shuffle the steps.

    Examples of equal padded length are shuffled, so a step has different rows in every epoch. The
    sizes of the steps differ by one at most.
    """
    generator = np.random.default_rng(seed)
    padded = -(-np.array([len(example.ids) for example in examples], int) // PAD_MULTIPLE)
    order = generator.permutation(len(examples))
    steps = np.array_split(order[np.argsort(padded[order], kind="stable")], num_steps)
    return [[examples[row] for row in steps[step]] for step in generator.permutation(num_steps)]


def micro_batches(
    examples: Sequence[Example], batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Sequence[Example]]:
    """The micro-batches of this rank. Every rank gets the same number; some may be empty.

    The examples, sorted by length, are dealt to the ranks in turn, so the batches of all ranks have
    about the same length.
    """
    stride = batch_size * world_size
    return [
        examples[start : start + stride][rank::world_size]
        for start in range(0, max(1, len(examples)), stride)
    ]


def collate(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    pad_multiple: int = PAD_MULTIPLE,
) -> Batch:
    """Pad examples on the right: tokens (B, T) int64, supervised (B, T) bool on the CPU, None.

    A causal model never sees the tokens to the right, so padding needs no mask and may have any id.
    Without examples: one row of padding, nothing supervised.
    """
    longest = max([len(example.ids) for example in examples], default=1)
    width = -(-longest // pad_multiple) * pad_multiple
    tokens = torch.zeros(max(1, len(examples)), width, dtype=torch.int64)
    supervised = torch.zeros_like(tokens, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.from_numpy(example.ids)
        supervised[row, : len(example.ids)] = torch.from_numpy(example.supervised)
    return send(tokens, device), supervised, None


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Concatenate examples: tokens (1, T), supervised (1, T) on the CPU, the lengths of the rows.

    The first token of a row is never a target: the token before it belongs to another row.
    """
    if not examples:
        return collate(examples, device)
    lengths = [length for example in examples for length in example.lengths or [len(example.ids)]]
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    supervised = np.concatenate([example.supervised for example in examples])
    supervised[np.cumsum([0, *lengths[:-1]])] = False
    tokens = send(torch.from_numpy(ids)[None], device)
    return tokens, torch.from_numpy(supervised)[None], lengths
