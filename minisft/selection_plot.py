"""The picture of a selection, for select.py --plot.

    draw(inputs, chosen, "cluster", "runs/pre.json")     # selection.Inputs; -> runs/pre.png
"""

from pathlib import Path

import numpy as np

from minisft.kmeans import Space


def principal_components(points, number=2, steps=8, seed=0):
    """Points (N, D) -> (N, number), their projections on the directions of largest variance.

    Subspace iteration in blocks (Halko et al. 2011): the points are read `steps` times.
    """
    space = Space(points)
    width = min(number + 8, points.shape[1])
    basis = np.random.default_rng(seed).standard_normal((points.shape[1], width))
    for _ in range(steps):
        image = np.zeros_like(basis)
        for _, block in space.blocks():
            centered = block - space.mean
            image += centered.T @ (centered @ basis.astype(np.float32))
        basis, variances, _ = np.linalg.svd(image, full_matrices=False)
    axes = basis[:, :number].astype(np.float32)
    return np.concatenate([(block - space.mean) @ axes for _, block in space.blocks()])


def draw(inputs, chosen, strategy, output):
    """Draw what there is, scores and embeddings, with the chosen rows marked; returns the path."""
    from matplotlib.figure import Figure

    panels = (inputs.scores is not None) + (inputs.embeddings is not None)
    figure = Figure(figsize=(6 * panels, 4.5), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    if inputs.scores is not None:
        has_rewards = np.isfinite(inputs.scores["reward"]).any()
        name = "reward" if has_rewards else "ifd_ppl" if strategy == "ifd_ppl" else "ifd"
        values = inputs.scores[name]
        shown = values[np.isfinite(values)]
        bins = np.linspace(0, max(1.2, np.percentile(shown, 99)) if len(shown) else 1.2, 80)
        if has_rewards:
            bins = np.linspace(shown.min(), shown.max() + 1e-6, 80)
        else:
            axes[0].axvline(1, color="black", linewidth=0.8)
        axes[0].hist(shown, bins, color="#b0b8c0", label="all rows")
        axes[0].hist(values[chosen], bins, color="#d1495b", label="chosen")
        axes[0].set(xlabel=name, ylabel="rows")
        axes[0].legend()
    if inputs.embeddings is not None:
        rows, cluster = inputs.clustered or (np.arange(len(inputs.embeddings)), None)
        points = principal_components(inputs.embeddings)
        colors = {"color": "#b0b8c0"} if cluster is None else {"c": cluster, "cmap": "tab20"}
        axes[-1].scatter(*points[rows].T, s=4, alpha=0.5, linewidths=0, **colors)
        axes[-1].scatter(*points[chosen].T, s=14, facecolors="none", edgecolors="black",
                         linewidths=0.6, label="chosen")
        axes[-1].set(xlabel="first principal component", ylabel="second")
        axes[-1].legend()
    figure.suptitle(f"{strategy}: {len(chosen):,} rows chosen")
    path = Path(output).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path
