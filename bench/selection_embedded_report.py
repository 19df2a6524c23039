"""The table and the picture of bench/selection_embedded.py, from the results of its cells.

    summaries = summarize(results)
    draw(summaries, Path("selection.png"))
    print(table(summaries))

A Summary is a method at a share of the rows: means over its seeds, with an interval.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t

from bench.measure import ROOT

DOCS = ROOT / "docs"
METHODS = {
    "recipe": "ifd after pre-experience",
    "ifd": "ifd without pre-experience",
    "longest": "the longest answers",
    "random": "random",
    "random_matched": "random, lengths of the recipe",
    "all": "all rows",
    "all_same_steps": "all rows, same steps",
}
ALL_ROWS = ("all", "all_same_steps")  # methods that select nothing
BEGIN, END = "<!-- begin: bench/selection_embedded.py --write_docs -->", "<!-- end -->"

Result = dict[str, Any]  # of a cell, a line of results.jsonl


@dataclass
class Summary:
    """A method at a rate: means over its runs."""

    method: str
    rate: float
    exact_match: float
    interval: float | None  # half of the 95 % interval of exact_match; None for a single run
    bad_share: float
    mean_answer_characters: float
    num_rows: int
    steps: int
    num_runs: int


def summarize(results: list[Result]) -> list[Summary]:
    """A Summary of each method and rate. Intervals are by Student's t, over seeds."""
    summaries = []
    for method in METHODS:
        for rate in sorted({result["rate"] for result in results if result["method"] == method}):
            runs = [run for run in results if (run["method"], run["rate"]) == (method, rate)]
            values, interval = [run["exact_match"] for run in runs], None
            if len(runs) > 1:
                error = statistics.stdev(values) / len(runs) ** 0.5
                interval = float(t.ppf(0.975, len(runs) - 1)) * error
            summaries.append(
                Summary(
                    method,
                    rate,
                    statistics.mean(values),
                    interval,
                    statistics.mean(run["bad_share"] for run in runs),
                    statistics.mean(run["mean_answer_characters"] for run in runs),
                    runs[0]["num_rows"],
                    runs[0]["steps"],
                    len(runs),
                )
            )
    return summaries


def table(summaries: Iterable[Summary]) -> str:
    """The summaries as a Markdown table."""
    lines = [
        "| rows trained on | share | rows | steps | exact match | bad rows let through | "
        "characters of an answer | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in summaries:
        interval = f" ± {line.interval:.1%}" if line.interval is not None else ""
        lines.append(
            f"| {METHODS[line.method]} | {line.rate:.0%} | {line.num_rows:,} | {line.steps:,} | "
            f"{line.exact_match:.1%}{interval} | {line.bad_share:.1%} | "
            f"{line.mean_answer_characters:.1f} | {line.num_runs} |"
        )
    return "\n".join(lines)


def draw(summaries: list[Summary], path: Path) -> None:
    """Draw exact match over the share of rows, a line for each method, with its intervals."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="share of the rows trained on", ylabel="exact match")
    for number, method in enumerate(METHODS):
        points = [summary for summary in summaries if summary.method == method]
        if points and method in ALL_ROWS:
            style = "--" if method == "all" else ":"
            label = METHODS[method]
            axes.axhline(points[0].exact_match, linestyle=style, color="black", label=label)
        elif points:
            axes.errorbar(
                # Shifted a little, so that intervals do not hide each other.
                [point.rate * (1 + 0.03 * (number - 2)) for point in points],
                [point.exact_match for point in points],
                [point.interval or 0 for point in points],
                marker="o",
                capsize=3,
                label=METHODS[method],
            )
    axes.set_xticks(sorted({line.rate for line in summaries if line.method not in ALL_ROWS}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)


def write_docs(text: str) -> None:
    """Put the table and the picture between the marks in docs/selection.md."""
    page = DOCS / "selection.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(
        f"{before}{BEGIN}\n\n{text}\n\n![exact match](selection.png)\n\n{END}{after}",
        encoding="utf-8",
    )
