"""The picture of a selection, for select.py --plot.

draw(data, rows, choice, "cluster", "runs/pre.json")     # writes runs/pre.png
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.outputs import save_figure
from minisft.selection.choose import Choice, RowData
from minisft.selection.kmeans import ArrayRows, CenteredPoints

LABELS = {
    "ifd": "IFD, a ratio of losses",
    "ifd_ppl": "IFD, a ratio of perplexities",
    "reward": "reward",
    "margin": "reward of the chosen answer minus reward of the rejected",
}
# Grey and vermilion, which colour-blind people can distinguish.
ALL_COLOR, CHOSEN_COLOR = "#b0b8c0", "#d55e00"


def draw(
    data: RowData, rows: np.ndarray, choice: Choice, strategy: str, output: str | Path
) -> Path:
    """Draw the lengths of the answers, and the scores and embeddings that are given.

    rows: the numbers of all usable rows. Returns the path of the picture.
    """
    from matplotlib.figure import Figure

    has_scores, has_embeddings = len(data.scores) > 0, len(data.embeddings) > 0
    num_panels = 1 + has_scores + has_embeddings
    figure = Figure(figsize=(6 * num_panels, 4.5), layout="constrained")
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    draw_lengths(axes[0], data, rows, choice.rows)
    if has_scores:
        draw_scores(axes[1], data.scores, choice.rows, strategy)
    if has_embeddings:
        draw_embeddings(axes[-1], data.embeddings, rows, choice)
    figure.suptitle(f"{strategy}: {len(choice.rows):,} of {len(rows):,} rows chosen")
    path = Path(output).with_suffix(".png")
    save_figure(figure, path)
    return path


def draw_lengths(axes: Any, data: RowData, rows: np.ndarray, chosen: np.ndarray) -> None:
    """A histogram of the answers' lengths, on a logarithmic axis."""
    lengths = np.maximum(data.lengths, 1)
    bins = np.geomspace(lengths[rows].min() * 0.99, lengths[rows].max() * 1.01, 41)
    axes.hist(lengths[rows], bins, color=ALL_COLOR, label="all rows")
    axes.hist(lengths[chosen], bins, color=CHOSEN_COLOR, label="chosen")
    axes.set(xscale="log", xlabel=f"{data.length_unit} of the answer", ylabel="number of rows")
    axes.legend()


def draw_scores(
    axes: Any, scores: dict[str, np.ndarray], chosen: np.ndarray, strategy: str
) -> None:
    """A histogram of the scores. Outliers are counted in the outermost bars."""
    name = strategy.partition("+")[0]
    if name not in LABELS:
        name = "reward" if np.isfinite(scores["reward"]).any() else "ifd"
    values = scores[name]
    low, high = 0.0, 1.0
    if np.isfinite(values).any():
        low, high = np.percentile(values[np.isfinite(values)], [0.5, 99.5])
    edge = 0
    if name in ("ifd", "ifd_ppl"):
        edge, low, high = 1, min(low, 0.9), max(high, 1.1)
        axes.axvline(1, color="black", linewidth=0.8, label="above: the instruction does not help")
    # `edge` is a border between two bars.
    width = (high - low + 1e-6) / 60
    first, last = math.floor((low - edge) / width), math.ceil((high - edge) / width)
    bins = edge + width * np.arange(first, last + 2)
    axes.hist(np.clip(values, low, high), bins, color=ALL_COLOR, label="all rows")
    axes.hist(np.clip(values[chosen], low, high), bins, color=CHOSEN_COLOR, label="chosen")
    axes.set(xlabel=LABELS[name], ylabel="number of rows")
    axes.margins(y=0.35)  # space for the legend
    axes.legend()


def draw_embeddings(axes: Any, embeddings: np.ndarray, rows: np.ndarray, choice: Choice) -> None:
    """The rows in the plane of largest variance, coloured by cluster if there are clusters."""
    points = np.full((len(embeddings), 2), np.nan)
    points[rows] = principal_components(ArrayRows(embeddings, rows))
    style: dict[str, Any] = {"color": ALL_COLOR, "label": "all rows"}
    if choice.clusters:
        rows, assignment = choice.clusters
        style = {"c": assignment, "cmap": "viridis", "label": "all rows, coloured by cluster"}
    size = np.clip(10_000 / len(rows), 4, 24)
    axes.scatter(*points[rows].T, s=size, linewidths=0, **style)
    ring = {"facecolors": "none", "edgecolors": CHOSEN_COLOR, "linewidths": 1.2}
    axes.scatter(*points[choice.rows].T, s=2 * size + 8, label="chosen", **ring)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.legend()


def principal_components(
    points: np.ndarray | ArrayRows, number: int = 2, steps: int = 8, seed: int = 0
) -> np.ndarray:
    """Project points (N, D) on the directions of largest variance; returns (N, number).

    Subspace iteration in blocks (Halko et al. 2011): the points are read `steps` times.
    """
    centered = CenteredPoints(points)
    width = min(number + 8, points.shape[1])
    basis = np.random.default_rng(seed).standard_normal((points.shape[1], width))
    for _ in range(steps):
        image = np.zeros_like(basis)
        for _, block in centered.blocks():
            image += block.T @ (block @ basis.astype(np.float32))
        basis = np.linalg.svd(image, full_matrices=False)[0]
    axes = basis[:, :number].astype(np.float32)
    return np.concatenate([block @ axes for _, block in centered.blocks()])
