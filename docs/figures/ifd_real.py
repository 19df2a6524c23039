"""Chapter 11: the IFD of real rows, scored by SmolLM2, and the length of their answers.

The rows are those of alpaca_en_demo.json of LLaMA-Factory. They are not part of this repository;
without the file the figure stays as it is.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from docs.figures import smollm2
from docs.figures.style import Colors, save
from docs.tour.lab import ROOT, ifd_scores
from minisft import get_template
from minisft.data.dataset import Row, load_rows
from minisft.selection.strategies import highest

PATH = ROOT.parent / "shared/data/instruct/alpaca_en_demo.json"
NUM_ROWS, MAX_CHARACTERS = 160, 500  # long answers would take hours


@dataclass
class RealRows:
    """s(A), s(A|Q) and the characters of the answer of each row (N,)."""

    direct: np.ndarray
    conditioned: np.ndarray
    characters: np.ndarray


def data() -> RealRows:
    """Every second row with an answer that is not too long."""
    model, tokenizer = smollm2.load()
    rows = [row for row in load_rows(PATH)[::2] if len(answer_of(row)) < MAX_CHARACTERS][:NUM_ROWS]
    scores = ifd_scores(model, get_template("auto", tokenizer), rows)
    kept = [
        (score.record, row) for score, row in zip(scores, rows, strict=True) if score.record["ifd"]
    ]
    return RealRows(
        np.array([record["loss_direct"] for record, _ in kept]),
        np.array([record["loss_conditioned"] for record, _ in kept]),
        np.array([len(answer_of(row)) for _, row in kept]),
    )


def answer_of(row: Row) -> str:
    """The text of the answer."""
    return row.messages[-1]["content"]


def draw(colors: Colors, data: RealRows) -> Figure:
    """Left: the losses, with IFD 1 as a line. Right: IFD against the length of the answer."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    ifd = data.conditioned / data.direct
    chosen = highest(ifd, np.flatnonzero(ifd < 1), len(ifd) // 10)
    for axes, x, y in ((left, data.direct, data.conditioned), (right, data.characters, ifd)):
        axes.scatter(x, y, 9, color=colors.quantity, label="row of Alpaca")
        ring = {"facecolor": "none", "edgecolor": colors.text, "linewidth": 0.7}
        axes.scatter(x[chosen], y[chosen], 40, **ring, label="chosen: the highest 10 % below 1")
    top = float(max(data.direct.max(), data.conditioned.max()))
    left.plot([0, top], [0, top], "--", color=colors.faint)
    left.set(xlabel="s(A), the answer alone", ylabel="s(A|Q), after its question")
    left.legend(loc="upper left", fontsize=9)
    right.axhline(1, linestyle="--", color=colors.faint)
    right.set(xscale="log", xlabel="characters of the answer", ylabel="IFD")
    right.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    right.minorticks_off()
    return figure


if __name__ == "__main__":
    if PATH.exists():
        save("ifd_real", draw, data())
    else:
        print(f"ifd_real stays as it is: there is no {PATH}")
