"""Chapter 11: k-means on the embeddings of the prompts, drawn in two dimensions."""

from collections import Counter

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from docs.figures.scored_rows import scored_rows
from docs.figures.style import Colors, save
from minisft.selection.kmeans import kmeans

NUM_CLUSTERS = 8
Map = tuple[np.ndarray, np.ndarray, list[str]]


def data() -> Map:
    """Places (N, 2) along the two main directions, clusters (N,), the commonest kind of each."""
    rows = scored_rows()
    clusters = kmeans(rows.embeddings, NUM_CLUSTERS, num_starts=4).assignment
    centered = rows.embeddings - rows.embeddings.mean(0)
    directions = np.linalg.svd(centered, full_matrices=False)[2][:2]
    names = [
        Counter(rows.kinds[clusters == cluster]).most_common(1)[0][0]
        for cluster in range(NUM_CLUSTERS)
    ]
    return centered @ directions.T, clusters, names


def draw(colors: Colors, data: Map) -> Figure:
    """A point for each prompt, coloured by cluster."""
    places, clusters, names = data
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes, palette = figure.subplots(), colormaps["tab10"]
    for cluster, name in enumerate(names):
        inside = places[clusters == cluster]
        axes.scatter(*inside.T, s=9, color=palette(cluster), label=f"{name} ({len(inside)} rows)")
    axes.set(xticks=[], yticks=[], xlabel="first direction", ylabel="second direction")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="cluster, by its main kind")
    return figure


if __name__ == "__main__":
    save("kmeans_map", draw, data())
