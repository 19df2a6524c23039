"""The picture of a selection, for select.py --plot.

draw(inputs, chosen, "cluster", "runs/pre.json")     # selection.Inputs; -> runs/pre.png
"""

import math
from pathlib import Path

import numpy as np

from minisft.selection.kmeans import Space
from minisft.selection.strategies import Chosen

NAMES = {
    "ifd": "IFD, a ratio of losses",
    "ifd_ppl": "IFD, a ratio of perplexities",
    "reward": "reward",
    "margin": "reward of the chosen answer less that of the rejected",
}
ALL, CHOSEN = "#b0b8c0", "#d55e00"  # grey and vermilion, which everybody can tell apart


def draw(inputs, chosen, strategy, output):
    """Draw what there is, scores and embeddings, with the chosen rows marked; returns the path."""
    from matplotlib.figure import Figure

    panels = (inputs.scores is not None) + (inputs.embeddings is not None)
    figure = Figure(figsize=(6 * panels, 4.5), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    if inputs.scores is not None:
        draw_scores(axes[0], inputs.scores, chosen, strategy)
    if inputs.embeddings is not None:
        draw_embeddings(axes[-1], inputs, chosen)
    figure.suptitle(f"{strategy}: {len(chosen):,} of {len(inputs.rows):,} rows chosen")
    path = Path(output).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def draw_scores(axes, scores, chosen, strategy):
    """A histogram of the scores; the few beyond its ends are counted in the outermost bars."""
    has_rewards = strategy == "margin" or np.isfinite(scores["reward"]).any()
    name = "ifd_ppl" if strategy == "ifd_ppl" else "ifd"
    if has_rewards:
        name = "margin" if strategy == "margin" else "reward"
    values = scores[name]
    ends = (
        np.percentile(values[np.isfinite(values)], [0.5, 99.5])
        if (np.isfinite(values).any())
        else np.array([0.0, 1.0])
    )
    if not has_rewards:
        ends = min(ends[0], 0.9), max(ends[1], 1.1)
        axes.axvline(1, color="black", linewidth=0.8, label="above: the instruction does not help")
    # 1 is where two bars meet.
    width, middle = (ends[1] - ends[0] + 1e-6) / 60, 0 if has_rewards else 1
    first, last = ((end - middle) / width for end in ends)
    bins = middle + width * np.arange(math.floor(first), math.ceil(last) + 2)
    axes.hist(np.clip(values, *ends), bins, color=ALL, label="all rows")
    axes.hist(np.clip(values[chosen], *ends), bins, color=CHOSEN, label="chosen")
    axes.set(xlabel=NAMES[name], ylabel="number of rows")
    axes.margins(y=0.35)  # room for what follows
    axes.legend()


def draw_embeddings(axes, inputs, chosen):
    """The rows in the plane of largest variance, coloured by cluster where there are such."""
    rows, cluster = inputs.clustered or (inputs.rows, None)
    points, size = np.full((len(inputs.embeddings), 2), np.nan), np.clip(10_000 / len(rows), 4, 24)
    points[inputs.rows] = principal_components(Chosen(inputs.embeddings, inputs.rows))
    colors, by = (
        ({"color": ALL}, "")
        if cluster is None
        else ({"c": cluster, "cmap": "viridis"}, ", coloured by cluster")
    )
    axes.scatter(*points[rows].T, s=size, linewidths=0, label=f"all rows{by}", **colors)
    axes.scatter(
        *points[chosen].T,
        s=2 * size + 8,
        facecolors="none",
        edgecolors=CHOSEN,
        linewidths=1.2,
        label="chosen",
    )
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.legend()


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
            image += block.T @ (block @ basis.astype(np.float32))
        basis, variances, _ = np.linalg.svd(image, full_matrices=False)
    axes = basis[:, :number].astype(np.float32)
    return np.concatenate([block @ axes for _, block in space.blocks()])
