"""The order of the rows in an epoch.

rows_between = ShuffledRows(1000, seed=0).of_epoch(2)
rows_between(0, 32)                  # numbers of the first 32 rows of epoch 2
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

# Two positions in an epoch -> the numbers of the rows between them.
RowsBetween = Callable[[int, int], np.ndarray]
RUNS_IN_WINDOW = 8


class ShuffledRows:
    """Every row once, in an order that depends on seed and epoch.

    num_examples: about how many of the rows have something to learn; by default all. The positions
    of an epoch count these, so the rows are spread evenly over them.
    """

    def __init__(self, num_rows: int, seed: int, num_examples: int | None = None) -> None:
        self.num_rows, self.seed = num_rows, seed
        self.num_examples = num_examples or num_rows

    def of_epoch(self, epoch: int) -> RowsBetween:
        """The order of one epoch."""
        # Half the memory for data sets of up to four billion rows.
        dtype = np.uint32 if self.num_rows < 2**32 else np.int64
        order = np.arange(self.num_rows, dtype=dtype)
        np.random.default_rng([self.seed, epoch]).shuffle(order)

        def rows_between(start: int, end: int) -> np.ndarray:
            """The rows at the positions in [start, end)."""
            first, last = (
                position * self.num_rows // self.num_examples for position in (start, end)
            )
            return order[first:last]

        return rows_between

    def window_steps(self, wanted: int, per_epoch: int, step_bytes: int) -> int:
        """The steps of a window of batching.py: as many as wanted."""
        return wanted


class ShuffledRuns:
    """Shuffled runs of consecutive rows; the rows of a run keep their order.

    For plain texts: neighbouring short texts share a block, and a block is cut from a run.
    bounds: (R + 1,) row numbers where the runs begin, and the end. sizes: (R,) bytes of each run.
    num_examples: about how many blocks all runs contain.
    """

    def __init__(self, bounds: np.ndarray, sizes: np.ndarray, num_examples: int, seed: int) -> None:
        self.bounds, self.sizes = bounds, sizes
        self.num_examples, self.seed = num_examples, seed

    def of_epoch(self, epoch: int) -> RowsBetween:
        """The order of one epoch. A run belongs to the positions where its middle lies."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[order])
        middles = (ends - self.sizes[order] / 2) * (self.num_examples / ends[-1])

        def rows_between(start: int, end: int) -> np.ndarray:
            """The rows of the runs whose middle is in [start, end)."""
            first, last = np.searchsorted(middles, [start, end])
            return self.rows_of(order[first:last])

        return rows_between

    def window_steps(self, wanted: int, per_epoch: int, step_bytes: int) -> int:
        """The steps of a window: at least RUNS_IN_WINDOW of the longest run, and all about equal.

        A run is not divided, so smaller windows might have none, and their steps no token.
        """
        least = RUNS_IN_WINDOW * int(self.sizes.max()) // step_bytes
        num_windows = max(1, per_epoch // max(wanted, least))
        return math.ceil(per_epoch / num_windows)

    def rows_of(self, runs: Iterable[int]) -> np.ndarray:
        """The numbers of the rows in these runs."""
        parts = [np.arange(self.bounds[run], self.bounds[run + 1]) for run in runs]
        return np.concatenate([np.arange(0), *parts])
