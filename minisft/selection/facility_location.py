"""Facility location: choose rows so that every row is near a chosen one.

    F(chosen) = sum over all i of max over chosen j of cos(i, j)

    chosen = facility_location(embeddings, rows=np.arange(1000), number=100)

Superfiltering.D (arXiv 2402.00530) applies it to the rows that are best by IFD. The gain of a row
is the growth of F if the row is chosen; the row with the highest gain comes next. This reaches at
least 1 - 1/e of the best possible F (Nemhauser et al. 1978).

A gain never grows when more rows are chosen, so an old gain is an upper bound. Only rows whose old
gain is above the best new one need another (lazy greedy; Minoux 1978).

The tour explains it: docs/tour/11_select.md.
"""

import numpy as np

from minisft.selection.kmeans import UnitRows
from minisft.selection.strategies import check_enough

# Rows whose gains are computed at a time.
GAINS_AT_A_TIME = 64


def facility_location(embeddings: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
    """The `number` rows that best represent all `rows`, the best first (facility).

    embeddings: (all rows, D). Time grows with len(rows)^2; memory holds a copy of their embeddings.
    """
    check_enough(rows, number)
    units = UnitRows(embeddings, rows)[:]  # (len(rows), D)
    chosen = []
    nearest = np.full(len(rows), -1, np.float32)  # cosine to the nearest chosen row
    # Before the first choice, the gain of j is the sum over i of cos(i, j) + 1.
    gains = (units @ units.sum(0) + len(rows)).astype(np.float64)
    size = min(GAINS_AT_A_TIME, len(rows))
    while len(chosen) < number:
        is_new = np.zeros(len(rows), bool)
        is_new[chosen] = True  # chosen rows need no gain
        while not is_new[best := gains.argmax()]:
            highest = np.argpartition(gains, -size)[-size:]
            places = np.union1d(highest[~is_new[highest]], best)
            cosines = units[places] @ units.T
            gains[places] = np.maximum(cosines - nearest, 0).sum(1, dtype=np.float64)
            is_new[places] = True
        chosen.append(best)
        gains[best] = -1  # never twice
        nearest = np.maximum(nearest, units @ units[best])
    return rows[chosen]
