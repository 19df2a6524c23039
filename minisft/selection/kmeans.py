"""k-means in numpy: k-means++ seeding, then Lloyd steps by matrix products in blocks.

    result = kmeans(points, num_clusters=100, seed=0)      # points (N, D) float32
    result.assignment, result.centers, result.inertia      # (N,), (K, D), sum of squared distances

    assign    each point to its nearest center
    update    each center to the mean of its points; repeat until nothing changes

Squared distances come from matrix products: |x - c|^2 = |x|^2 - 2 x.c + |c|^2, with x and c
relative to the mean of the points: far from the origin, the difference of such large squares would
be mostly rounding error. The mean is subtracted a block at a time, so memory-mapped points are
never copied.

The tour explains it: docs/tour/11_select.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minisft.common.errors import UserError

BLOCK_ROWS = 512  # points multiplied at a time


@dataclass
class ArrayRows:
    """Some rows of an array (N, D), which may be memory-mapped; copied only when indexed."""

    array: np.ndarray
    rows: np.ndarray  # their numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray | list[np.intp]) -> np.ndarray:
        return self.array[self.rows[index]]

    @property
    def shape(self) -> tuple[int, int]:
        """(number of rows, D)."""
        return len(self.rows), self.array.shape[1]


@dataclass
class UnitRows(ArrayRows):
    """ArrayRows divided by their length, so that products are cosines. Zeros stay zeros."""

    def __getitem__(self, index: slice | np.ndarray | list[np.intp]) -> np.ndarray:
        points = super().__getitem__(index)
        lengths = np.linalg.norm(points, axis=-1, keepdims=True)
        return points / np.maximum(lengths, np.finfo(np.float32).tiny)


@dataclass
class Clusters:
    """centers (K, D) float32, assignment (N,) int64. inertia: the sum of squared distances."""

    centers: np.ndarray
    assignment: np.ndarray
    inertia: float
    num_steps: int


def kmeans(
    points: np.ndarray | ArrayRows,
    num_clusters: int,
    seed: int = 0,
    num_starts: int = 1,
    max_steps: int = 300,
    tolerance: float = 1e-4,
) -> Clusters:
    """The best of several starts (Lloyd 1982; k-means++: Arthur and Vassilvitskii 2007).

    points: (N, D) float32, finite. tolerance: stop when the squared shift of all centers is below
    this fraction of the mean variance of a dimension. UserError for fewer points than clusters.
    """
    if not 1 <= num_clusters <= len(points):
        raise UserError(
            f"cannot make {num_clusters} clusters of {len(points)} rows. Lower --clusters."
        )
    centered = CenteredPoints(points)
    results = [
        lloyd(centered, seed_centers(centered, num_clusters, generator), max_steps, tolerance)
        for generator in np.random.default_rng(seed).spawn(num_starts)
    ]
    return min(results, key=lambda clusters: clusters.inertia)


class CenteredPoints:
    """Points relative to their mean (D,), a block at a time. squares: |x - mean|^2 (N,).

    `points` themselves stay as they are, and are never copied.
    """

    def __init__(self, points: np.ndarray | ArrayRows) -> None:
        self.points = points
        total = np.zeros(points.shape[1])
        for rows in self.slices():
            total += points[rows].sum(0, dtype=np.float64)
        self.mean = (total / len(points)).astype(np.float32)
        self.squares = np.concatenate(
            [np.einsum("nd,nd->n", block, block) for _, block in self.blocks()]
        )

    def slices(self) -> Iterator[slice]:
        """Yield the slices of the blocks."""
        for start in range(0, len(self.points), BLOCK_ROWS):
            yield slice(start, min(start + BLOCK_ROWS, len(self.points)))

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (slice, its points minus the mean), in an array that the next block overwrites."""
        shape = (min(BLOCK_ROWS, len(self.points)), self.points.shape[1])
        buffer = np.empty(shape, np.float32)
        for rows in self.slices():
            block = self.points[rows]
            yield rows, np.subtract(block, self.mean, out=buffer[: len(block)])

    def closeness(self, block: np.ndarray, centers: np.ndarray) -> np.ndarray:
        """(rows, K): half of |x|^2 - |x - c|^2, which is largest for the nearest center.

        The block and the centers (K, D) are relative to the mean.
        """
        product = block @ centers.T
        product -= 0.5 * np.einsum("kd,kd->k", centers, centers)
        return product

    def distances(self, centers: np.ndarray) -> np.ndarray:
        """(K, N): squared distances of all points from a few centers, relative to the mean."""
        squares = np.empty((len(centers), len(self.points)), np.float32)
        for rows, block in self.blocks():
            squares[:, rows] = -2 * self.closeness(block, centers).T
        squares += self.squares
        return np.maximum(squares, 0, out=squares)


def seed_centers(
    centered: CenteredPoints, num_clusters: int, generator: np.random.Generator
) -> np.ndarray:
    """k-means++: draw centers in proportion to the squared distances from the centers so far.

    Each draw keeps the best of a few candidates: the one with the smallest sum of squared
    distances. Returns centers (K, D), relative to the mean.
    """
    num_candidates, chosen = 2 + int(math.log(num_clusters)), []
    nearest = np.full(len(centered.points), np.inf, np.float32)  # squared distance to the chosen
    candidates = generator.integers(len(centered.points), size=1)
    while True:
        distances = centered.distances(centered.points[candidates] - centered.mean)
        np.minimum(distances, nearest, out=distances)
        best = distances.sum(1, dtype=np.float64).argmin()
        chosen.append(candidates[best])
        nearest = distances[best]
        nearest[chosen[-1]] = 0
        if len(chosen) == num_clusters:
            return centered.points[chosen] - centered.mean
        candidates = indices_by_weight(nearest, generator.random(num_candidates))


def indices_by_weight(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Indices drawn in proportion to `weights`, from uniform random numbers in [0, 1)."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    indices = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.minimum(indices, len(weights) - 1)


def lloyd(
    centered: CenteredPoints, centers: np.ndarray, max_steps: int, tolerance: float
) -> Clusters:
    """Assign every point to its nearest center, move centers to the means of their points, repeat.

    centers: (K, D), relative to the mean. The sums of the clusters' points are updated only by the
    points that change cluster, which soon are few.
    """
    points, K = centered.points, len(centers)
    limit = tolerance * centered.squares.mean(dtype=np.float64) / points.shape[1]
    assignment = np.full(len(points), -1)
    closeness = np.empty(len(points), np.float32)
    sums, counts = np.zeros(centers.shape), np.zeros(K, np.int64)
    num_steps = 0
    while num_steps < max_steps:
        num_steps, has_changed = num_steps + 1, False
        for rows, block in centered.blocks():
            products = centered.closeness(block, centers)
            nearest = products.argmax(1)
            closeness[rows] = products[np.arange(len(block)), nearest]
            moved = np.flatnonzero(nearest != assignment[rows])
            if len(moved):
                has_changed = True
                move(sums, counts, block[moved], assignment[rows][moved], nearest[moved])
                assignment[rows] = nearest
        reseed_empty(centered, closeness, assignment, sums, counts)
        means = (sums / counts[:, None]).astype(np.float32)
        shift = np.square(means - centers, dtype=np.float64).sum()
        if has_changed:
            centers = means
        if not has_changed or shift <= limit:
            break
    return assign_all(centered, centers, num_steps)


def move(
    sums: np.ndarray, counts: np.ndarray, points: np.ndarray, old: np.ndarray, new: np.ndarray
) -> None:
    """Move points (n, D) from the sums of their old clusters (-1: none) to the new clusters'."""
    weights, columns = np.zeros((len(counts), len(points)), np.float32), np.arange(len(points))
    weights[new, columns] = 1
    weights[old[old >= 0], columns[old >= 0]] -= 1
    sums += weights @ points
    counts += weights.sum(1).astype(np.int64)


def reseed_empty(
    centered: CenteredPoints,
    closeness: np.ndarray,
    assignment: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Give each cluster without points the point that is farthest from its center.

    closeness: (N,), of each point to its center. Changes assignment, sums and counts.
    """
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return
    distances = centered.squares - 2 * closeness
    for cluster in empty:
        while counts[assignment[point := distances.argmax()]] == 1:
            distances[point] = -np.inf
        distances[point] = -np.inf
        row = centered.points[[point]] - centered.mean
        move(sums, counts, row, assignment[[point]], np.array([cluster]))
        assignment[point] = cluster


def assign_all(centered: CenteredPoints, centers: np.ndarray, num_steps: int) -> Clusters:
    """Assign all points to the final centers, and compute the inertia."""
    assignment, inertia = np.empty(len(centered.points), np.int64), 0.0
    for rows, block in centered.blocks():
        assignment[rows] = centered.closeness(block, centers).argmax(1)
        difference = block - centers[assignment[rows]]
        inertia += float(np.einsum("nd,nd->", difference, difference))
    return Clusters(centers + centered.mean, assignment, inertia, num_steps)
