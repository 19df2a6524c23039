"""The figure of the selection study: all strategies, what they choose, what comes of it, the cost.

    draw([summaries of the first budget, of the second, ...], Path("selection.png"))

Rows are strategies, colours are budgets. Differences are to random rows of the same budget. Of so
many intervals, one in twenty misses the line in the middle by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.selection_options import Budget
from bench.selection_pool import BAD_SHARE

COLORS = ("#2a6f97", "#e07a1f", "#7a5cc0", "#2a9d6f")
FAINT = "#c8ced6"


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """A strategy with a budget: means over its runs.

    Differences are to random rows, None for these themselves. bad_share: None if no row was chosen.
    loss: of held-out rows, in nats. checks: share of right answers. choosing, training: operations.
    minutes: of both, at the mean speeds of the study.
    """

    strategy: str
    label: str
    budget: str
    num_runs: int
    num_rows: float
    answer_length: float  # tokens
    steps: float
    trained_tokens: float
    bad_share: Estimate | None
    loss: Estimate
    checks: Estimate
    loss_difference: Estimate | None
    checks_difference: Estimate | None
    source_losses: dict[str, Estimate]
    source_differences: dict[str, Estimate]
    choosing: float
    training: float
    minutes: float


def draw(parts: Sequence[Sequence[Summary]], path: Path) -> None:
    """Draw the summaries of all budgets into one picture."""
    shown = [[line for line in part if line.strategy != "base"] for part in parts]
    labels = list(dict.fromkeys(line.label for part in shown for line in part))
    figure = Figure(figsize=(15, 1.8 + 0.42 * len(labels)), layout="constrained")
    widths = [1, 1, 1.5, 1.7, 1.5, 1.3]
    axes = figure.subplots(1, 6, sharey=True, width_ratios=widths)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color=FAINT, linewidth=0.5)
        panel.set_axisbelow(True)
        panel.tick_params(axis="x", labelsize=8)
    bad, length, loss, sources, checks, cost = axes
    for number, part in enumerate(shown):
        # Budgets stand one below the other in the line of a strategy.
        shift = (number - (len(shown) - 1) / 2) * 0.6 / max(1, len(shown))
        places = [labels.index(line.label) + shift for line in part]
        color = COLORS[number % len(COLORS)]
        name = Budget.parse(part[0].budget).label
        draw_estimates(bad, [line.bad_share for line in part], places, color, 100)
        length.plot([line.answer_length for line in part], places, "o", color=color, label=name)
        draw_estimates(loss, [line.loss_difference for line in part], places, color, 1)
        draw_estimates(checks, [line.checks_difference for line in part], places, color, 100)
        height = 0.7 / max(1, len(shown))
        choosing = [line.choosing / 1e15 for line in part]
        training = [line.training / 1e15 for line in part]
        cost.barh(places, choosing, height, color=color)
        cost.barh(places, training, height, left=choosing, color=color, alpha=0.4)
    bad.axvline(100 * BAD_SHARE, color="black", linewidth=0.8, linestyle=":")
    for panel in (loss, checks):
        panel.axvline(0, color="black", linewidth=0.8)
    draw_sources(sources, shown[0], labels)
    for panel, name, scale in ((loss, "loss_difference", 1), (checks, "checks_difference", 100)):
        limit_to_selections(panel, shown, labels, name, scale)
    titles = {
        bad: "bad rows taken\n% (dotted: of the pool)",
        length: "answer\ntokens",
        loss: "held-out loss minus random's\nnats; left is better",
        sources: f"the same by source\n{Budget.parse(shown[0][0].budget).label}",
        checks: "checks right minus random's\npoints; right is better",
        cost: "10^15 operations\ndark: choosing, light: training",
    }
    for panel, title in titles.items():
        panel.set_title(title, fontsize=9)
    bad.set_yticks(range(len(labels)), labels)
    bad.set_ylim(len(labels) - 0.5, -0.5)
    bad.set_xlim(left=0)
    length.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def draw_estimates(
    axes: Axes, values: Sequence[Estimate | None], places: Sequence[float], color: str, scale: int
) -> None:
    """Means with their intervals."""
    for value, place in zip(values, places, strict=True):
        if value:
            ends = [scale * value.low, scale * value.high]
            axes.plot(ends, [place, place], color=color, linewidth=1.5)
            axes.plot(scale * value.mean, place, "o", color=color, markersize=5)


def limit_to_selections(
    axes: Axes, parts: Sequence[Sequence[Summary]], labels: list[str], name: str, scale: int
) -> None:
    """Limit a panel to the strategies that select: all rows may be far away, and are then named."""
    lines = [line for part in parts for line in part if line.strategy != "all"]
    values = [value for line in lines if (value := getattr(line, name))]
    if not values:
        return
    most = 1.1 * scale * max(max(abs(value.low), abs(value.high)) for value in values)
    most = max(most, 1e-3)
    axes.set_xlim(-most, most)
    all_rows = [line for part in parts for line in part if line.strategy == "all"]
    means = [scale * value.mean for line in all_rows if (value := getattr(line, name))]
    if means and abs(means[0]) > most:
        side, x = ("left", 0.02) if means[0] < 0 else ("right", 0.98)
        where, y = axes.get_yaxis_transform(), labels.index(all_rows[0].label)
        text = f"{means[0]:+.2f}, beyond"
        axes.text(x, y, text, ha=side, va="center", fontsize=7, transform=where)


def draw_sources(axes: Axes, part: Sequence[Summary], labels: Sequence[str]) -> None:
    """A coloured cell for each strategy and source: green is a lower loss than random's."""
    compared = [line for line in part if line.source_differences]
    if not compared:
        return
    names = list(compared[0].source_differences)
    table = np.full((len(labels), len(names)), np.nan)
    for line in compared:
        values = [line.source_differences[name].mean for name in names]
        table[labels.index(line.label)] = values
    limit = max(1e-3, float(np.nanquantile(np.abs(table), 0.9)))
    axes.imshow(table, cmap="PiYG_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.argwhere(~np.isnan(table)):
        text = f"{table[row, column]:+.2f}".replace("+0.", "+.").replace("-0.", "-.")
        color = "white" if abs(table[row, column]) > 0.7 * limit else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.grid(False)
