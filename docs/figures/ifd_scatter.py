"""Chapter 11: s(A) against s(A|Q) of every row, and the rows that IFD chooses."""

import numpy as np
from matplotlib.figure import Figure

from docs.figures.scored_rows import ScoredRows, scored_rows
from docs.figures.style import Colors, save
from minisft.selection.strategies import highest


def draw(colors: Colors, data: ScoredRows) -> Figure:
    """A point for each row; the diagonal is IFD 1."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes, is_good = figure.subplots(), data.qualities == "good"
    ifd = data.conditioned / data.direct
    chosen = highest(ifd, np.flatnonzero(ifd < 1), len(ifd) // 20)
    for rows, color, label in (
        (is_good, colors.supervised, "right answer"),
        (~is_good, colors.trap, "spoiled answer"),
    ):
        axes.scatter(data.direct[rows], data.conditioned[rows], 9, color=color, label=label)
    axes.scatter(
        data.direct[chosen],
        data.conditioned[chosen],
        40,
        facecolor="none",
        edgecolor=colors.text,
        linewidth=0.7,
        label="chosen: the highest 5 % below 1",
    )
    top = float(max(data.direct.max(), data.conditioned.max()))
    axes.plot([0, top], [0, top], "--", color=colors.faint)
    axes.set(xlabel="s(A), the answer alone", ylabel="s(A|Q), after its question")
    axes.legend(loc="upper left")
    return figure


if __name__ == "__main__":
    save("ifd_scatter", draw, scored_rows())
