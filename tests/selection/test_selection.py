"""Each strategy against its definition."""

import tracemalloc

import numpy as np
import pytest

from minisft.common.errors import UserError
from minisft.selection import strategies
from minisft.selection.choose import Candidates
from minisft.selection.kmeans import ArrayRows, kmeans

GENERATOR = np.random.default_rng(0)
VALUES = GENERATOR.permutation(50).astype(float)
ROWS = np.flatnonzero(VALUES < 40)


def test_highest_and_middle():
    assert sorted(VALUES[strategies.highest(VALUES, ROWS, 3)]) == [37, 38, 39]
    assert sorted(VALUES[strategies.middle(VALUES, ROWS, 4)]) == [18, 19, 20, 21]
    equal = np.zeros(10)
    assert strategies.highest(equal, np.arange(2, 9), 3).tolist() == [2, 3, 4]
    for choose in (strategies.highest, strategies.middle):
        assert set(choose(VALUES, ROWS, 40)) == set(ROWS)
        with pytest.raises(UserError, match="cannot choose 41 rows: only 40"):
            choose(VALUES, ROWS, 41)


def test_at_random():
    first, again, other = (
        strategies.at_random(ROWS, 20, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert len(set(first)) == 20 and set(first) <= set(ROWS)
    assert (first == again).all() and set(first) != set(other)
    with pytest.raises(UserError, match="only 40"):
        strategies.at_random(ROWS, 41, GENERATOR)


def test_spread_over_clusters():
    rows = np.arange(10, 71)
    perplexity = np.full(100, np.nan)
    perplexity[10:70] = np.random.default_rng(3).permutation(60)
    perplexity[70] = 5
    assignment = np.repeat([0, 1, 2], [41, 15, 5])
    chosen = strategies.spread_over_clusters(assignment, perplexity, rows, 6, [25, 75])
    by_cluster = [chosen[np.isin(chosen, rows[assignment == cluster])] for cluster in range(3)]
    assert [len(some) for some in by_cluster] == [6, 6, 5]  # the last has no more
    for cluster, some in enumerate(by_cluster[:2]):
        all_of_it = perplexity[rows[assignment == cluster]]
        low, high = np.percentile(all_of_it, [25, 75])
        band = np.sort(all_of_it[(all_of_it >= low) & (all_of_it <= high)])
        assert perplexity[some].min() == band[0] and perplexity[some].max() == band[-1]
        ranks = np.searchsorted(band, np.sort(perplexity[some]))
        assert np.ptp(np.diff(ranks)) <= 1  # evenly spread
    singles = strategies.spread_over_clusters(assignment, perplexity, rows, 1, [25, 75])
    for cluster, single in enumerate(singles[:2]):  # not at an end of the band
        values = perplexity[rows[assignment == cluster]]
        assert abs((values < perplexity[single]).sum() - len(values) // 2) <= 1


def test_k_center():
    points = np.random.default_rng(1).standard_normal((60, 5)).astype(np.float32) + 3
    rows = np.arange(5, 60)
    chosen = strategies.k_center(points, rows, 12)
    mean = points[rows].mean(0)
    expected = [rows[np.square(points[rows] - mean).sum(1).argmin()]]
    while len(expected) < 12:  # by definition, with every distance
        distances = np.square(points[rows][:, None] - points[expected]).sum(2).min(1)
        expected.append(rows[distances.argmax()])
    assert chosen.tolist() == expected
    same = strategies.k_center(np.ones((20, 3), np.float32), np.arange(20), 20)
    assert sorted(same) == list(range(20))
    with pytest.raises(UserError, match="only 55"):
        strategies.k_center(points, rows, 56)


def test_embeddings_are_not_copied(tmp_path):
    """k-means and k-center copy only the rows they compute with."""
    points = np.random.default_rng(0).standard_normal((20_000, 128)).astype(np.float32)
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    rows = np.delete(np.arange(len(points)), [7, 900])
    tracemalloc.start()
    try:
        chosen = strategies.k_center(mapped, rows, 5)
        found = kmeans(ArrayRows(mapped, rows), 20, max_steps=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < points.nbytes / 4
    assert chosen.tolist() == strategies.k_center(points, rows, 5).tolist()
    whole = kmeans(points[rows], 20, max_steps=2)
    np.testing.assert_array_equal(found.assignment, whole.assignment)


def test_at_random_with_lengths():
    generator = np.random.default_rng(2)
    lengths = generator.geometric(0.02, 5000)
    reference = np.argsort(-lengths)[:2000:4]  # long ones
    chosen = strategies.at_random_with_lengths(
        lengths, np.arange(5000), reference, np.random.default_rng(0)
    )
    assert len(chosen) == len(set(chosen)) == len(reference)
    ours, theirs = np.sort(lengths[chosen]), np.sort(lengths[reference])
    grid = np.unique(lengths)
    gap = np.abs(np.searchsorted(ours, grid, "right") - np.searchsorted(theirs, grid, "right"))
    assert gap.max() <= len(reference) / strategies.NUM_LENGTH_RANGES + 1
    assert lengths[chosen].mean() == pytest.approx(lengths[reference].mean(), rel=0.02)
    assert lengths[reference].mean() > 1.5 * lengths.mean()
    assert len(np.intersect1d(chosen, reference)) < 0.6 * len(reference)  # and yet random
    other = strategies.at_random_with_lengths(
        lengths, np.arange(5000), reference, np.random.default_rng(1)
    )
    assert set(other) != set(chosen)


@pytest.mark.parametrize("lengths", [[5] * 30, [1, 2] * 15, list(range(30))])
def test_at_random_with_few_different_lengths(lengths):
    lengths = np.array(lengths)
    for reference in (np.array([3]), np.array([0, 1, 2, 29]), np.arange(30)):
        chosen = strategies.at_random_with_lengths(lengths, np.arange(30), reference, GENERATOR)
        assert len(set(chosen)) == len(reference)
        assert lengths[chosen].min() >= lengths[reference].min()
        assert lengths[chosen].max() <= lengths[reference].max()


def test_at_random_with_lengths_that_are_dropped():
    lengths = np.arange(30)
    with pytest.raises(UserError, match="--match has .* rows in a range of lengths"):
        strategies.at_random_with_lengths(lengths, np.arange(20), np.arange(15, 30), GENERATOR)


def test_dropped_rows_are_counted_by_reason():
    candidates = Candidates(6)
    candidates.drop(np.array([True] * 2 + [False] * 4), "short")
    candidates.drop(np.array([True] * 3 + [False] * 3), "long")
    reasons = np.array([None] * 3 + ["longer: 9", "longer: 8", None], object)
    candidates.drop_unscored(reasons)
    assert candidates.rows.tolist() == [5]
    assert candidates.dropped == {"short": 2, "long": 1, "longer": 2}
