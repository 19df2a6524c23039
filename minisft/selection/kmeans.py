"""k-means in numpy: k-means++ seeding, then Lloyd steps by matrix products in blocks.

    result = kmeans(points, num_clusters=100, seed=0)      # points (N, D) float32, may be mapped
    result.assignment, result.centers, result.inertia      # (N,), (K, D), sum of squared distances

Distances come from products: |x - c|^2 = |x|^2 - 2 x.c + |c|^2. Where the points are far from the
origin these terms are large and their difference is small, so float32 would leave little but
rounding. Both x and c are therefore measured from the mean of the points. The mean is subtracted a
block at a time, so the points are never copied and may be larger than memory.
"""

import math
from dataclasses import dataclass

import numpy as np

from minisft.common.errors import UserError

BLOCK_ROWS = 512  # points multiplied at a time


@dataclass
class Clusters:
    """What k-means found: centers (K, D) float32, assignment (N,) int64, the sum of squares."""

    centers: np.ndarray
    assignment: np.ndarray
    inertia: float
    num_steps: int


def kmeans(points, num_clusters, seed=0, num_starts=1, max_steps=300, tolerance=1e-4):
    """The best Clusters of several starts (Lloyd 1982, k-means++: Arthur and Vassilvitskii 2007).

    points: (N, D) float32, finite. tolerance: stop when the centers move by less, in all, than this
    share of the mean variance of a dimension. UserError for fewer points than clusters.
    """
    if not 1 <= num_clusters <= len(points):
        raise UserError(f"{num_clusters} clusters of {len(points)} rows: give fewer clusters")
    space = Space(points)
    found = [
        lloyd(space, seed_centers(space, num_clusters, generator), max_steps, tolerance)
        for generator in np.random.default_rng(seed).spawn(num_starts)
    ]
    return min(found, key=lambda one: one.inertia)


class Space:
    """The points, their mean (D,) and squared distances from it (N,).

    `points` stay as they are; `blocks()` and everything computed from them are from the mean.
    """

    def __init__(self, points):
        self.points = points
        total = sum(points[rows].sum(0, dtype=np.float64) for rows in self.slices())
        self.mean = (total / len(points)).astype(np.float32)
        self.squares = np.concatenate(
            [np.einsum("nd,nd->n", block, block) for _, block in self.blocks()])

    def slices(self):
        """Yield the slices of the blocks."""
        for start in range(0, len(self.points), BLOCK_ROWS):
            yield slice(start, min(start + BLOCK_ROWS, len(self.points)))

    def blocks(self):
        """Yield (slice, its points minus the mean), in an array that the next block overwrites."""
        shape = (min(BLOCK_ROWS, len(self.points)), self.points.shape[1])
        buffer = np.empty(shape, np.float32)
        for rows in self.slices():
            block = self.points[rows]
            yield rows, np.subtract(block, self.mean, out=buffer[: len(block)])

    def closeness(self, block, centers):
        """(rows, K): half of |x|^2 - |x - c|^2, largest for the nearest of the centers.

        The block and centers (K, D) are both from the mean.
        """
        product = block @ centers.T
        product -= 0.5 * np.einsum("kd,kd->k", centers, centers)
        return product

    def distances(self, centers):
        """(K, N): squared distances of all points from a few centers, which are from the mean."""
        squares = np.empty((len(centers), len(self.points)), np.float32)
        for rows, block in self.blocks():
            squares[:, rows] = -2 * self.closeness(block, centers).T
        squares += self.squares
        return np.maximum(squares, 0, out=squares)


def seed_centers(space, num_clusters, generator):
    """k-means++: centers (K, D), from the mean, drawn from the points by squared distance.

    Of a few candidates each time the one that leaves the least sum is taken.
    """
    num_candidates, chosen = 2 + int(math.log(num_clusters)), []
    nearest = np.full(len(space.points), np.inf, np.float32)  # squared distance to the chosen
    candidates = generator.integers(len(space.points), size=1)
    while True:
        distances = space.distances(space.points[candidates] - space.mean)
        np.minimum(distances, nearest, out=distances)
        best = distances.sum(1, dtype=np.float64).argmin()
        chosen.append(candidates[best])
        nearest = distances[best]
        nearest[chosen[-1]] = 0
        if len(chosen) == num_clusters:
            return space.points[chosen] - space.mean
        candidates = draw(nearest, generator.random(num_candidates))


def draw(weights, heights):
    """Indices drawn in proportion to `weights`, at `heights` from 0 to 1 of their running sum."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    places = np.searchsorted(cumulative, heights * cumulative[-1], side="right")
    return np.minimum(places, len(weights) - 1)


def lloyd(space, centers, max_steps, tolerance):
    """Assign every point to its nearest center, move centers to the means of their points, repeat.

    Sums of points are kept, and changed by the points that change sides, which soon are few.
    """
    points, K = space.points, len(centers)
    limit = tolerance * space.squares.mean(dtype=np.float64) / points.shape[1]
    assignment = np.full(len(points), -1)
    closeness = np.empty(len(points), np.float32)
    sums, counts = np.zeros(centers.shape), np.zeros(K, np.int64)
    num_steps = 0
    while num_steps < max_steps:
        num_steps, changed = num_steps + 1, 0
        for rows, block in space.blocks():
            products = space.closeness(block, centers)
            nearest = products.argmax(1)
            closeness[rows] = products[np.arange(len(block)), nearest]
            moved = np.flatnonzero(nearest != assignment[rows])
            changed += len(moved)
            if len(moved):
                old, new = assignment[rows][moved], nearest[moved]
                assignment[rows] = nearest
                move(sums, counts, block[moved], old, new)
        reseed_empty(space, closeness, assignment, sums, counts)
        means = (sums / counts[:, None]).astype(np.float32)
        shift = np.square(means - centers, dtype=np.float64).sum()
        if not changed:
            break
        centers = means
        if shift <= limit:
            break
    return finished(space, centers, num_steps)


def move(sums, counts, points, old, new):
    """Take points (n, D) from the sums of their old clusters (-1: none) and add them to the new."""
    weights, columns = np.zeros((len(counts), len(points)), np.float32), np.arange(len(points))
    weights[new, columns] = 1
    weights[old[old >= 0], columns[old >= 0]] -= 1
    sums += weights @ points
    counts += weights.sum(1).astype(np.int64)


def reseed_empty(space, closeness, assignment, sums, counts):
    """Give each cluster without points the point that is farthest from its own center."""
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return
    distances = space.squares - 2 * closeness
    for cluster in empty:
        while counts[assignment[point := distances.argmax()]] == 1:
            distances[point] = -np.inf
        distances[point] = -np.inf
        move(sums, counts, space.points[[point]] - space.mean, assignment[[point]],
             np.array([cluster]))
        assignment[point] = cluster


def finished(space, centers, num_steps):
    """Assign all points once more, so that the assignment and inertia are those of `centers`."""
    assignment, inertia = np.empty(len(space.points), np.int64), 0.0
    for rows, block in space.blocks():
        assignment[rows] = space.closeness(block, centers).argmax(1)
        difference = block - centers[assignment[rows]]
        inertia += float(np.einsum("nd,nd->", difference, difference))
    return Clusters(centers + space.mean, assignment, inertia, num_steps)
