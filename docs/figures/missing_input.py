"""Chapter 1: the best possible exact match on rows whose input is dropped, by kind of task."""

import json
from collections import Counter, defaultdict
from typing import Any

from matplotlib.figure import Figure

from docs.figures.style import Colors, save
from docs.tour.lab import DATA


def data() -> list[tuple[str, float]]:
    """(kind, share of rows that the most frequent answer to each instruction gets right)."""
    shares = []
    records: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in json.loads((DATA / "train.json").read_text("utf-8")):
        if record["quality"] == "good":
            records[record["kind"]].append(record)
    for kind, rows in records.items():
        answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            answers[row["instruction"]][row["output"]] += 1
        right = sum(counter.most_common(1)[0][1] for counter in answers.values())
        shares.append((kind, right / len(rows)))
    return sorted(shares, key=lambda pair: pair[1])


def draw(colors: Colors, data: list[tuple[str, float]]) -> Figure:
    """A bar for every kind; the rest of its rows cannot be answered."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds, shares = zip(*data, strict=True)
    axes.barh(kinds, shares, color=colors.supervised, label="can be answered")
    rest = [1 - share for share in shares]
    axes.barh(kinds, rest, left=shares, color=colors.trap, label="lost with the input")
    axes.set(xlabel="share of the rows, without the column input", xlim=(0, 1))
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.margins(y=0.01)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


if __name__ == "__main__":
    save("missing_input", draw, data())
