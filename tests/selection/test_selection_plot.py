"""The picture of a selection: its panels, bars and points."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from minisft.selection import plot
from minisft.selection.choose import Choice


def test_principal_components_equal_scikit_learn():
    generator = np.random.default_rng(0)
    points = generator.standard_normal((1500, 40)).astype(np.float32)
    points = points * np.linspace(4, 0.5, 40, dtype=np.float32) + 20
    ours = plot.principal_components(points)
    theirs = PCA(2, svd_solver="full").fit_transform(points)
    for axis in range(2):
        assert abs(np.corrcoef(ours[:, axis], theirs[:, axis])[0, 1]) > 0.99
        assert ours[:, axis].std() == pytest.approx(theirs[:, axis].std(), rel=1e-3)


def test_every_row_is_in_the_histogram():
    """Chosen rows have separate bars; no bar crosses 1; outliers are counted."""
    values = np.concatenate([np.random.default_rng(0).normal(0.9, 0.1, 997), [0.01, 50.0, np.nan]])
    scores = {"ifd": values, "reward": np.full(1000, np.nan)}
    below = np.flatnonzero(values < 1)
    axes = Figure().subplots()
    plot.draw_scores(axes, scores, below, "ifd")
    every, chosen = (container.patches for container in axes.containers)
    assert [sum(bar.get_height() for bar in bars) for bars in (every, chosen)] == [999, len(below)]
    assert all(bar.get_x() + bar.get_width() < 1 + 1e-9 for bar in chosen if bar.get_height())
    assert axes.get_xlim()[1] < 2  # one outlier does not shrink the other bars to a line
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "above: the instruction does not help",
        "all rows",
        "chosen",
    }
    assert "IFD" in axes.get_xlabel() and axes.get_ylabel() == "number of rows"


@pytest.mark.parametrize(
    ("strategy", "reward", "drawn"),
    [("ifd", np.nan, 20), ("ifd_ppl", np.nan, 30), ("reward", 1.0, 40), ("margin", np.nan, 10)],
)
def test_the_score_of_the_strategy_is_drawn(strategy, reward, drawn):
    scores = {
        name: np.array([1.5] * count + [np.nan] * (40 - count))
        for name, count in (("ifd", 20), ("ifd_ppl", 30), ("margin", 10))
    }
    axes = Figure().subplots()
    plot.draw_scores(axes, {**scores, "reward": np.full(40, reward)}, [0], strategy)
    assert sum(bar.get_height() for bar in axes.containers[0].patches) == drawn


def test_rows_without_an_embedding_are_not_drawn():
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((50, 6)).astype(np.float32) + 100
    embeddings[:10] = 0  # as score.py leaves broken rows
    rows = np.arange(10, 50)
    for clusters in (None, (rows, rows % 7)):
        axes = Figure().subplots()
        plot.draw_embeddings(axes, embeddings, rows, Choice(rows[:3], clusters=clusters))
        every, chosen = (one.get_offsets() for one in axes.collections)
        np.testing.assert_allclose(every, plot.principal_components(embeddings[rows]))
        np.testing.assert_array_equal(chosen, every[:3])
