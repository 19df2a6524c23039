"""k-means equals scikit-learn from the same centers, and is as good with its own seeding."""

import tracemalloc

import numpy as np
import pytest
from sklearn.cluster import KMeans

from minisft.common.errors import UserError
from minisft.selection import kmeans
from minisft.selection.kmeans import CenteredPoints, lloyd, seed_centers


def blobs(rows=1500, width=24, number=12, spread=0.5, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((number, width))
    points = centers[generator.integers(number, size=rows)]
    return (points + spread * generator.standard_normal((rows, width)) + offset).astype(np.float32)


def lloyd_in_float64(points, centers):
    """Plain Lloyd steps -> (assignment, inertia, how close a point came to changing sides).

    The last is the least difference of a point's squared distances to its two nearest centers.
    """
    mean = points.mean(0, dtype=np.float64)
    points, centers, before, margin = points - mean, centers - mean, None, np.inf
    while True:
        distances = np.square(points[:, None] - centers).sum(2)
        assignment, nearest = distances.argmin(1), np.sort(distances, axis=1)
        margin = min(margin, (nearest[:, 1] - nearest[:, 0]).min())
        if np.array_equal(assignment, before):
            return assignment, nearest[:, 0].sum(), margin
        before = assignment
        centers = np.stack([points[assignment == one].mean(0) for one in range(len(centers))])


@pytest.mark.parametrize("offset", [0.0, 300.0, 3000.0])
def test_lloyd_equals_scikit_learn(offset):
    """Products of points 3000 from the origin round by more than the distances between clusters:
    unless the mean is subtracted on both sides, this fails on every processor."""
    points = blobs(offset=offset)
    start = points[np.random.default_rng(4).choice(len(points), 20, replace=False)]
    assignment, inertia, margin = lloyd_in_float64(points, start)
    # Two roundings agree only if no point is, at any step, equally near to two centers. From
    # other starts, some points have a margin of 2e-7, and float32 may put them on either side.
    assert margin > 1e-4
    theirs = KMeans(20, init=start, n_init=1, tol=0, max_iter=100, algorithm="lloyd").fit(points)
    space = CenteredPoints(points)
    ours = lloyd(space, start - space.mean, 100, 0)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.inertia == pytest.approx(inertia, rel=1e-6)
    np.testing.assert_array_equal(ours.assignment, theirs.labels_)
    np.testing.assert_array_equal(ours.assignment, assignment)
    np.testing.assert_allclose(ours.centers, theirs.cluster_centers_, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 300.0, 3000.0])
def test_distances(offset):
    """The squared distances that float64 gives, however far the points are from the origin."""
    points = blobs(offset=offset)
    centers = points[:3] + 1
    space = CenteredPoints(points)
    expected = np.square(points.astype(float) - centers[:, None]).sum(2)
    # A float32 at 3000 has steps of 2.4e-4: subtracting the mean costs the centers this precision.
    np.testing.assert_allclose(space.distances(centers - space.mean), expected, rtol=1e-4)


def test_seeding_is_as_good_as_theirs():
    points = blobs(spread=0.2)
    ours = [kmeans.kmeans(points, 12, seed).inertia for seed in range(40)]
    theirs = [KMeans(12, n_init=1, random_state=seed).fit(points).inertia_ for seed in range(40)]
    assert min(ours) == pytest.approx(min(theirs), rel=1e-4)  # both find the blobs
    assert np.mean(ours) < 1.08 * np.mean(theirs)
    # Uniformly drawn seeds miss blobs.
    space, generator = CenteredPoints(points), np.random.default_rng(0)
    uniform = [
        lloyd(space, points[generator.choice(len(points), 12)] - space.mean, 100, 1e-4)
        for _ in range(40)
    ]
    assert np.mean([one.inertia for one in uniform]) > 1.5 * np.mean(ours)


def test_seeds_are_points_and_apart():
    points = blobs(spread=0.01)
    space = CenteredPoints(points)
    seeds = seed_centers(space, 12, np.random.default_rng(0)) + space.mean
    distances = np.square(points[:, None] - seeds).sum(2)
    assert (distances.min(0) < 1e-6).all()
    assert distances.min(1).max() < 0.1  # one in every blob


def test_reproducible_and_best_of_several():
    points = blobs(spread=2.0)
    one, other = (kmeans.kmeans(points, 20, seed=1) for _ in range(2))
    np.testing.assert_array_equal(one.assignment, other.assignment)
    assert (kmeans.kmeans(points, 20, seed=2).assignment != one.assignment).any()
    assert kmeans.kmeans(points, 20, seed=1, num_starts=4).inertia <= one.inertia


def test_assignment_centers_and_inertia_agree():
    points = blobs(spread=2.0)
    found = kmeans.kmeans(points, 20, tolerance=0)
    distances = np.square(points[:, None].astype(float) - found.centers).sum(2)
    np.testing.assert_array_equal(found.assignment, distances.argmin(1))
    assert found.inertia == pytest.approx(distances.min(1).sum(), rel=1e-5)
    for cluster in range(20):
        np.testing.assert_allclose(
            points[found.assignment == cluster].mean(0),
            found.centers[cluster],
            rtol=1e-4,
            atol=1e-4,
        )


def test_tolerance_stops_early():
    points = blobs(spread=3.0)
    assert kmeans.kmeans(points, 20, tolerance=1e-2).num_steps < (
        kmeans.kmeans(points, 20, tolerance=0).num_steps
    )
    assert kmeans.kmeans(points, 20, max_steps=2, tolerance=0).num_steps == 2


def test_empty_clusters_are_reseeded():
    points = blobs(spread=0.1)
    space = CenteredPoints(points)
    start = np.concatenate([points[:8], np.full((4, points.shape[1]), 100.0, np.float32)])
    found = lloyd(space, start - space.mean, 100, 0)
    assert len(np.unique(found.assignment)) == 12
    assert np.abs(found.centers).max() < 10


def test_equal_points_and_one_cluster():
    points = np.ones((10, 3), np.float32)
    found = kmeans.kmeans(points, 4)
    assert found.inertia == 0 and (found.centers == 1).all()
    points = blobs(rows=50)
    np.testing.assert_allclose(kmeans.kmeans(points, 1).centers[0], points.mean(0), atol=1e-5)
    assert kmeans.kmeans(points, 50).inertia == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="cannot make 51 clusters of 50 rows"):
        kmeans.kmeans(points, 51)


def test_memory_is_bounded(tmp_path):
    np.save(tmp_path / "points.npy", blobs(rows=30_000, width=128))
    points = np.load(tmp_path / "points.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        kmeans.kmeans(points, 100, max_steps=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < points.nbytes / 2  # no copy of the points, nor rows x clusters
