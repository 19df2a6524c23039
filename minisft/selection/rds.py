"""RDS+: choose the rows that are nearest to a few rows of the target task.

    similarities = similarity_to_targets(embeddings, rows, [targets])     # (turns, len(rows))
    chosen = nearest_to_targets(similarities, rows, number=100)

Representation-based data selection, "Large-Scale Data Selection for Instruction Tuning" (arXiv
2503.01807). `score.py --mode embed --pooling weighted` embeds both kinds of rows: see ifd.py.

The tour explains it: docs/tour/11_select.md.
"""

from collections.abc import Sequence

import numpy as np

from minisft.selection.kmeans import BLOCK_ROWS, UnitRows
from minisft.selection.strategies import check_enough


def similarity_to_targets(
    embeddings: np.ndarray, rows: np.ndarray, tasks: Sequence[np.ndarray]
) -> np.ndarray:
    """(turns, len(rows)): how near each row is to the target rows, by cosine.

    tasks: target rows (n, D) of each task. A turn is a target row or, with several tasks, a task,
    of which the nearest target row counts.
    """
    units = UnitRows(embeddings, rows)
    targets = np.concatenate([UnitRows(task, np.arange(len(task)))[:] for task in tasks])
    starts = np.cumsum([0, *map(len, tasks[:-1])])
    similarities = np.empty(
        (len(targets) if len(tasks) == 1 else len(tasks), len(rows)), np.float32
    )
    for start in range(0, len(rows), BLOCK_ROWS):
        block = targets @ units[start : start + BLOCK_ROWS].T
        if len(tasks) > 1:
            block = np.maximum.reduceat(block, starts, axis=0)
        similarities[:, start : start + BLOCK_ROWS] = block
    return similarities


def nearest_to_targets(similarities: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
    """The targets take turns: each picks its nearest row that is not taken (rds; 2503.01807).

    similarities: (turns, len(rows)); a turn is a target row or, with several tasks, a task.
    """
    check_enough(rows, number)
    # When a target has its turn, at least one of its first `number` rows is free.
    orders = [iter(np.argsort(-row, kind="stable")[:number]) for row in similarities]
    chosen, is_taken = [], np.zeros(len(rows), bool)
    while len(chosen) < number:
        order = orders[len(chosen) % len(orders)]
        chosen.append(next(place for place in order if not is_taken[place]))
        is_taken[chosen[-1]] = True
    return rows[chosen]
