"""The numbers of the selection study with their intervals.

    change = difference([run["loss"] for run in ours], [run["loss"] for run in random])
    print(change.mean, change.low, change.high)

A difference to random is the mean over sources (or kinds of prompt) of the mean over their rows, so
neither a long answer nor a large source counts more. Its 95 % interval covers both chances: which
rows were held out, and which seeds were drawn. Rows are paired, seeds are not. A single run of a
strategy cannot say how much seeds matter; they are then taken to matter as much as for random.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, t

from bench.selection_figure import Estimate
from bench.selection_options import ALL_ROWS, SAME_STEPS

Result = dict[str, Any]  # a line of results.jsonl
# The values of a run: {source or kind of prompt: one for each row}; None if a row was too long.
Values = Mapping[str, Sequence[float | None]]


# Two more rows that count in the variance of checks, which are right or wrong, 1 or 0: that a few
# prompts are all right is not certain. Of a share: Laplace's rule; of a difference of shares: half
# a row in each cell of their table (Agresti and Min 2005).
SHARES, CHANGES = (0.0, 1.0), (-math.sqrt(0.5), math.sqrt(0.5))


def difference(
    ours: Sequence[Values], theirs: Sequence[Values], imagined: Sequence[float] = ()
) -> Estimate:
    """How much larger our values are than theirs: a mean and its t interval.

    ours, theirs: the runs of each, one for each seed. The variance is the sum of those of the
    paired differences over the rows of each group, and of those of the means over seeds on both
    sides; its degrees of freedom are Welch and Satterthwaite's. A side with one run is taken to
    have the variance over seeds of the other. imagined: differences that count as more rows of each
    group in its variance.
    """
    parts: list[tuple[float, int]] = []  # (variance, degrees of freedom)
    groups, means = list(ours[0]), []
    for group in groups:
        # (rows,): the mean over seeds on either side
        first, second = (mean_over_seeds(runs, group) for runs in (ours, theirs))
        change = first - second
        change = change[~np.isnan(change)]
        means.append(float(change.mean()))
        if len(change) > 1:
            rows = np.append(change, imagined)
            variance = float(rows.var(ddof=0 if imagined else 1)) / len(change) / len(groups) ** 2
            parts.append((variance, len(change) - 1))
    varied = [runs for runs in (ours, theirs) if len(runs) > 1]
    for runs in varied:
        weight = 1 / len(runs) + (len(varied) == 1)  # 1 for the single run of the other side
        variance = statistics.variance(map(overall_mean, runs)) * weight
        parts.append((variance, len(runs) - 1))
    mean, variance = statistics.mean(means), sum(variance for variance, _ in parts)
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)


def level(runs: Sequence[Values], imagined: Sequence[float] = ()) -> Estimate:
    """The values themselves, as a difference to zero, which no seed changes. Several runs."""
    zeros = {group: [0.0] * len(rows) for group, rows in runs[0].items()}
    return difference(runs, [zeros] * 2, imagined)


def bad_rows(runs: Sequence[Result]) -> Estimate | None:
    """The share of bad rows among those taken, with Wilson's interval; None if no row was taken.

    Runs that take the same rows count once. What was not chosen is no sample: its share is exact.
    """
    choices = {
        (run["num_rows"], run["answer_tokens"], run["quality"].get("good", 0))
        for run in runs
        if run["num_rows"]
    }
    if not choices:
        return None
    num_rows, _, num_good = map(sum, zip(*choices, strict=True))
    result = binomtest(num_rows - num_good, num_rows)
    share = float(result.statistic)
    if runs[0]["strategy"] in (*SAME_STEPS, *ALL_ROWS):
        return Estimate(share, share, share)
    return Estimate(share, *map(float, result.proportion_ci(method="wilson")))


def mean_over_seeds(runs: Sequence[Values], group: str) -> np.ndarray:
    """The values of a group's rows (rows,), each a mean over the runs; NaN for None."""
    return np.array([run[group] for run in runs], float).mean(0)


def overall_mean(run: Values) -> float:
    """The mean over groups of the mean over their rows."""
    return statistics.mean(float(np.nanmean(np.array(rows, float))) for rows in run.values())


def of_source(runs: Sequence[Values], name: str) -> list[Values]:
    """The values of one source only."""
    return [{name: run[name]} for run in runs]
