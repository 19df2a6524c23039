"""The picture of a selection: its axes, and the colours and names in it."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from minisft import selection_plot


def test_principal_components_equal_scikit_learn():
    generator = np.random.default_rng(0)
    points = generator.standard_normal((1500, 40)).astype(np.float32)
    points = points * np.linspace(4, 0.5, 40, dtype=np.float32) + 20
    ours = selection_plot.principal_components(points)
    theirs = PCA(2, svd_solver="full").fit_transform(points)
    for axis in range(2):
        assert abs(np.corrcoef(ours[:, axis], theirs[:, axis])[0, 1]) > 0.99
        assert ours[:, axis].std() == pytest.approx(theirs[:, axis].std(), rel=1e-3)
