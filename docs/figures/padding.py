"""Chapter 4: one batch in the order of the file, one of similar lengths, and a pack."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from docs.figures.style import Colors, save
from docs.tour.lab import base_template, encoded, good_rows
from minisft.data.batching import steps_by_length
from minisft.data.encoding import Example

NUM_ROWS = 8


def data() -> tuple[list[Example], list[Example]]:
    """The first rows of the file, and a step of rows of similar length."""
    examples = encoded(good_rows()[:256], base_template())
    steps = steps_by_length(examples, len(examples) // NUM_ROWS, [0])
    return examples[:NUM_ROWS], max(steps, key=lambda step: len(step[0].ids) == 16)


def grid(examples: Sequence[Example]) -> np.ndarray:
    """(B, T): 0 padding, 1 context, 2 supervised."""
    width = max(len(example.ids) for example in examples)
    cells = np.zeros((len(examples), width), int)
    for row, example in enumerate(examples):
        cells[row, : len(example.ids)] = 1 + example.supervised
    return cells


def draw(colors: Colors, data: tuple[list[Example], list[Example]]) -> Figure:
    """Three batches. Every cell is a token."""
    from matplotlib.colors import ListedColormap

    first, similar = data
    packed = np.concatenate([1 + example.supervised for example in first])
    lines = -(-len(packed) // grid(first).shape[1])
    folded = np.full(lines * grid(first).shape[1], -1)
    folded[: len(packed)] = packed
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    panels = figure.subplots(3, 1, height_ratios=[NUM_ROWS, NUM_ROWS, lines])
    fills = ListedColormap(["none", colors.padding, colors.context, colors.supervised])
    for axes, cells, title in (
        (panels[0], grid(first), "rows in the order of the file"),
        (panels[1], grid(similar), "rows of similar length"),
        (panels[2], folded.reshape(lines, -1), "the first rows as a pack, here in several lines"),
    ):
        axes.pcolormesh(
            cells[::-1],
            cmap=fills,
            vmin=-1,
            vmax=2,
            edgecolors=colors.faint,
            lw=0.4,
            rasterized=True,
        )
        share = (cells == 0).sum() / (cells >= 0).sum()
        axes.set_title(f"{title}: {share:.0%} padding", loc="left", fontsize=9)
        axes.set(xlim=(0, grid(first).shape[1]), aspect="equal", anchor="W")
        axes.axis("off")
    # Where each row of the pack begins: its column, and its line from above.
    width = grid(first).shape[1]
    starts = np.cumsum([0, *(len(example.ids) for example in first[:-1])])
    bottoms = lines - 1 - starts // width
    panels[2].vlines(starts % width, bottoms, bottoms + 1, color=colors.text, lw=2, clip_on=False)
    return figure


if __name__ == "__main__":
    save("padding", draw, data())
