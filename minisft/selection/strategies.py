"""Strategies: rules that choose the rows to train on.

    chosen = highest(scores["ifd"], rows=np.flatnonzero(scores["ifd"] < 1), number=150)

`rows` are the numbers of the rows that may be chosen; all other arrays are indexed by row number.
Every function returns row numbers. If values are equal, the first row in the file wins. `choose` in
choose.py applies them by name.

The tour explains it: docs/tour/11_select.md.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from minisft.common.errors import UserError
from minisft.selection.kmeans import ArrayRows, CenteredPoints

# random_matched divides the lengths into this many ranges.
NUM_LENGTH_RANGES = 20


def highest(values: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
    """The rows with the highest values (ifd, ifd_ppl, reward, margin, longest)."""
    check_enough(rows, number)
    return rows[np.argsort(-values[rows], kind="stable")[:number]]


def middle(values: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
    """The rows around the median of the values (mid_ppl)."""
    check_enough(rows, number)
    order = rows[np.argsort(values[rows], kind="stable")]
    start = (len(order) - number) // 2
    return order[start : start + number]


def at_random(rows: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Rows drawn uniformly, without replacement (random)."""
    check_enough(rows, number)
    return generator.choice(rows, number, replace=False)


def balanced(
    groups: np.ndarray, rows: np.ndarray, number: int, generator: np.random.Generator
) -> np.ndarray:
    """Random rows, the same number from each group (random --balance).

    groups: the group of each of `rows`, any integers. The groups take turns; a group that has no
    rows left is passed over.
    """
    check_enough(rows, number)
    shuffled = generator.permutation(len(rows))
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    sizes = np.unique(groups, return_counts=True)[1]
    turns = np.concatenate([np.arange(size) for size in sizes])  # in which a row is drawn
    # The last turn may not be complete: groups take it in random order.
    order = np.lexsort((generator.random(len(rows)), turns))
    return rows[by_group[order[:number]]]


def spread_over_clusters(
    assignment: np.ndarray,
    perplexity: np.ndarray,
    rows: np.ndarray,
    per_cluster: int,
    band: Sequence[float],
) -> np.ndarray:
    """Rows of each cluster, evenly spread over a band of its perplexities (cluster).

    assignment: the cluster of each of `rows`. band: two percentiles (arXiv 2308.12032, section 2).
    A cluster of at most `per_cluster` rows is taken completely. If fewer rows than that are in the
    band, all of these are taken.
    """
    chosen = [rows[:0]]
    for cluster in np.unique(assignment):
        members = rows[assignment == cluster]
        if len(members) > per_cluster:
            low, high = np.percentile(perplexity[members], band)
            is_inside = (perplexity[members] >= low) & (perplexity[members] <= high)
            members = members[is_inside]
            members = members[np.argsort(perplexity[members], kind="stable")]
            members = members[evenly_spread(len(members), min(per_cluster, len(members)))]
        chosen.append(members)
    return np.concatenate(chosen)


def evenly_spread(length: int, number: int) -> np.ndarray:
    """`number` of the places 0 ... length - 1, from end to end; a single one is in the middle."""
    if number == 1:
        return np.array([(length - 1) // 2])
    return np.linspace(0, length - 1, number).round().astype(int)


def k_center(embeddings: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
    """Each row as far as possible from all rows before it (kcenter; Gonzalez 1985).

    embeddings: (all rows, D). The first row is the nearest to the mean.
    """
    check_enough(rows, number)
    centered = CenteredPoints(ArrayRows(embeddings, rows))
    chosen = [centered.squares.argmin()]
    nearest = np.full(len(rows), np.inf, np.float32)  # squared distance to the chosen rows
    while len(chosen) < number:
        distances = centered.distances(centered.points[chosen[-1:]] - centered.mean)[0]
        nearest = np.minimum(nearest, distances)
        nearest[chosen] = -1  # never twice, even if all points are equal
        chosen.append(nearest.argmax())
    return rows[chosen]


def at_random_with_lengths(
    lengths: np.ndarray, rows: np.ndarray, reference: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Random rows with the length distribution of the rows `reference` (random_matched).

    A control: does a strategy do more than find long answers? The reference lengths are divided
    into ranges with equal numbers of rows, and the same number of rows is drawn from each range. If
    few rows are that long, most of the reference is drawn again.
    """
    wanted = np.sort(lengths[reference])
    ranges = np.array_split(wanted, min(NUM_LENGTH_RANGES, len(wanted)))
    # A range ends halfway to the next, so every length from the shortest to the longest is in one.
    ends = [(left[-1] + right[0]) / 2 for left, right in pairwise(ranges)]
    chosen, low = [], -math.inf
    for high in [*ends, wanted[-1]]:
        count = int(((wanted > low) & (wanted <= high)).sum())
        is_inside = (lengths[rows] > low) & (lengths[rows] <= high) & (lengths[rows] >= wanted[0])
        inside = rows[is_inside]
        if count > len(inside):
            raise UserError(
                f"--match has {count:,} rows in a range of lengths from which only "
                f"{len(inside):,} rows can be chosen. Lower --sample_number, if it is more than "
                "--match has, or make that selection with the same --dedup, --skip_bad_rows, "
                "--min_tokens and --max_tokens."
            )
        if count > 0:
            chosen.append(at_random(inside, count, generator))
        low = high
    return np.concatenate(chosen)


def check_enough(rows: np.ndarray, number: int) -> None:
    """UserError if there are fewer than `number` rows to choose from."""
    if number > len(rows):
        raise UserError(
            f"cannot choose {number:,} rows: only {len(rows):,} can be chosen. Lower "
            "--sample_number or --sample_rate."
        )
