"""Tables and the figure of the selection study, from the runs that are done.

write_report(Path("runs/selection"), wanted=[("random", "300", 0), ...], write_docs=False)
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.measure import ROOT
from bench.selection_estimates import (
    CHANGES,
    SHARES,
    Result,
    bad_rows,
    difference,
    level,
    of_source,
)
from bench.selection_figure import Estimate, Summary, draw
from bench.selection_options import STRATEGIES, Budget
from bench.selection_pool import TARGET_SOURCES
from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.common.metric_lines import read_metrics
from minisft.common.outputs import atomic_write

DOCS = ROOT / "docs"
BEGIN, END = "<!-- begin: bench/selection.py --report --write_docs -->", "<!-- end: study -->"


def summarize(
    results: Sequence[Result],
    budget: str,
    operations: Mapping[str, float],
    step_seconds: Mapping[str, float],
) -> list[Summary]:
    """A Summary of each strategy that has runs with this budget, and of `base` and `all`.

    operations: of the steps of the preparation, and of training on a token ("token"). The cost is
    NaN where they lack a step. Minutes are at the mean speeds of all steps and of all trainings: a
    busy machine or another one slows single ones.
    """
    steps = step_seconds.keys() & operations.keys()
    step_speed = ratio(
        sum(operations[step] for step in steps), sum(step_seconds[step] for step in steps)
    )
    training_speed = ratio(
        sum(run["trained_tokens"] for run in results),
        sum(run["seconds"]["train"] for run in results),
    )

    def runs_of(strategy: str) -> list[Result]:
        budgets = {"base": "none", "all": "all"}
        wanted = strategy, budgets.get(strategy, budget)
        return [run for run in results if (run["strategy"], run["budget"]) == wanted]

    summaries, random = [], runs_of("random")
    for strategy in ("base", *STRATEGIES):
        runs = runs_of(strategy)
        if not runs:
            continue

        def mean_of(name: str, runs: list[Result] = runs) -> float:
            return statistics.mean(run[name] for run in runs)

        # Without training there is no chance: two equal runs have no variance.
        repeats = 2 if strategy == "base" else 1
        losses, checks = ([run[name] for run in runs * repeats] for name in ("loss", "checks"))
        loss_change = checks_change = None
        by_source: dict[str, Estimate] = {}
        if random and strategy != "random":
            loss_change = difference(losses, [run["loss"] for run in random])
            checks_change = difference(checks, [run["checks"] for run in random], CHANGES)
            by_source = {
                name: difference(
                    of_source(losses, name), of_source([run["loss"] for run in random], name)
                )
                for name in losses[0]
            }
        num_rows = mean_of("num_rows")
        needs = STRATEGIES[strategy].needs if strategy in STRATEGIES else ()
        choosing = sum(operations.get(step, math.nan) for step in needs)
        seconds = statistics.mean(run["seconds"]["choose"] for run in runs)
        seconds += choosing / step_speed if choosing else 0.0
        seconds += mean_of("trained_tokens") / training_speed
        summaries.append(
            Summary(
                strategy=strategy,
                label=STRATEGIES[strategy].label if strategy in STRATEGIES else "no training",
                budget=budget,
                num_runs=len(runs),
                num_rows=num_rows,
                answer_length=mean_of("answer_tokens") / num_rows if num_rows else 0.0,
                steps=mean_of("steps"),
                trained_tokens=mean_of("trained_tokens"),
                bad_share=bad_rows(runs),
                loss=level(losses),
                checks=level(checks, SHARES),
                source_losses={name: level(of_source(losses, name)) for name in losses[0]},
                loss_difference=loss_change,
                checks_difference=checks_change,
                source_differences=by_source,
                choosing=choosing,
                training=mean_of("trained_tokens") * operations.get("token", math.nan),
                minutes=seconds / 60,
            )
        )
    return summaries


def ratio(amount: float, seconds: float) -> float:
    """The amount of work in a second; NaN if nothing was measured."""
    return amount / seconds if seconds else math.nan


def choice_table(summaries: Sequence[Summary]) -> list[str]:
    """What was chosen and what it cost, as Markdown."""
    lines = [
        "| rows chosen by | rows | % bad | tokens of an answer | steps | tokens trained on | "
        "10^12 operations: choosing + training | core minutes | runs |",
        "|---" * 9 + "|",
    ]
    for line in summaries:
        if line.num_rows:
            lines.append(
                f"| {line.label} | {line.num_rows:,.0f} | {in_words(line.bad_share, '.0f', 100)} | "
                f"{line.answer_length:,.0f} | {line.steps:,.0f} | {line.trained_tokens:,.0f} | "
                f"{line.choosing / 1e12:,.0f} + {line.training / 1e12:,.0f} | "
                f"{line.minutes:,.1f} | {line.num_runs} |"
            )
    return lines


def result_table(summaries: Sequence[Summary]) -> list[str]:
    """What came of it, as Markdown."""
    lines = [
        "| rows chosen by | loss | minus random's | % of checks right | minus random's, points |",
        "|---" * 5 + "|",
    ]
    for line in summaries:
        lines.append(
            f"| {line.label} | {in_words(line.loss, '.3f')} | "
            f"{in_words(line.loss_difference, '+.3f')} | {in_words(line.checks, '.1f', 100)} | "
            f"{in_words(line.checks_difference, '+.1f', 100)} |"
        )
    return lines


def source_table(summaries: Sequence[Summary]) -> list[str]:
    """Held-out loss of each source, random's and the differences to it, as Markdown."""
    compared = [line for line in summaries if line.source_differences]
    if not compared:
        return []
    sources = list(compared[0].source_differences)
    lines = [f"| rows chosen by | {' | '.join(sources)} |", "|---" * (len(sources) + 1) + "|"]
    for line in summaries:
        if line.strategy == "random":
            cells = [in_words(line.source_losses[name], ".3f") for name in sources]
            lines.append(f"| random: the loss itself | {' | '.join(cells)} |")
    for line in compared:
        cells = [in_words(line.source_differences[name], "+.3f") for name in sources]
        lines.append(f"| {line.label} | {' | '.join(cells)} |")
    return lines


def in_words(estimate: Estimate | None, form: str, scale: int = 1) -> str:
    """An estimate and its interval, if it has one, times `scale`; nothing for None."""
    if estimate is None:
        return ""
    if estimate.low == estimate.high:
        return f"{scale * estimate.mean:{form}}"
    mean, low, high = (
        f"{scale * value:{form}}" for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean} ({low} to {high})"


def settings_line(folder: Path, results: Sequence[Result]) -> str:
    """The size of the study and what its runs share: the figures mean nothing without."""
    settings = read_json(folder / "settings.json", missing={})
    if not settings:
        return ""
    num_losses, num_checks = (
        sum(map(len, results[0][name].values())) for name in ("loss", "checks")
    )
    rank, rate = settings["lora_rank"], settings["learning_rate"]
    return (
        f"{settings['pool_rows']:,} rows of at most {settings['cutoff_len']:,} tokens to choose "
        f"from; {num_losses:,} held-out rows, {num_checks:,} prompts; {settings['epochs']} epochs "
        f"of LoRA of rank {rank}, learning rate {rate:g}, {settings['dtype']}; "
        f"{settings['clusters']} clusters, {settings['pre_rows']} rows of pre-experience."
    )


def sources_line(folder: Path, results: Sequence[Result]) -> str:
    """How many rows there are of each source: with --max_rows, some have very few."""
    held_out = {name: len(rows) for name, rows in results[0]["loss"].items()}
    parts = [f"Held-out rows: {counts_in_words(held_out)}."]
    if (path := folder / "pool.json").exists():
        pool = Counter(record["source"] for record in json.loads(path.read_text(encoding="utf-8")))
        parts.insert(0, f"Rows to choose from: {counts_in_words(pool)}.")
        targets = {
            name: len(json.loads((folder / f"target_{name}.json").read_text(encoding="utf-8")))
            for name in TARGET_SOURCES
        }
        parts.append(f"Target rows of RDS+: {counts_in_words(targets)}.")
    return " ".join(parts)


def counts_in_words(counts: Mapping[str, int]) -> str:
    """{"lima": 112, "tools": 19} -> "lima 112, tools 19"."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def equal_checks_line(results: Sequence[Result]) -> str:
    """The kinds of prompts that all runs answer equally well: they distinguish no strategy."""
    parts = []
    for words, value in (("right", 1), ("wrong", 0)):
        kinds = [
            kind
            for kind in results[0]["checks"]
            if all(check == value for run in results for check in run["checks"][kind])
        ]
        if kinds:
            parts.append(f"always {words} in every run: {', '.join(kinds)}")
    return f"Prompts that distinguish nothing, {'; '.join(parts)}." if parts else ""


def missing_line(results: Sequence[Result], wanted: Sequence[tuple[str, str, int]]) -> str:
    """How many runs are missing, and which."""
    done = {(result["strategy"], result["budget"], result["seed"]) for result in results}
    missing = Counter(run[:2] for run in wanted if run not in done)
    if not missing:
        return f"All {len(wanted)} runs are done."
    parts = [f"{strategy} {budget} ({count})" for (strategy, budget), count in missing.items()]
    return f"{missing.total()} of {len(wanted)} runs are missing: {', '.join(parts)}."


def write_report(folder: Path, wanted: Sequence[tuple[str, str, int]], write_docs: bool) -> None:
    """Write report.md and selection.png into the folder, and print the report.

    write_docs: into docs/ too. UserError if no run is done.
    """
    results = read_metrics(folder / "results.jsonl")
    if not results:
        raise UserError(f"{folder}/results.jsonl: no run is done. Run the study without --report.")
    operations = read_json(folder / "operations.json", missing={})
    step_seconds: dict[str, float] = {}
    for record in read_metrics(folder / "steps.jsonl"):
        step = record["step"]
        step_seconds[step] = step_seconds.get(step, 0.0) + record["seconds"]
    budgets = dict.fromkeys(budget for _, budget, _ in wanted if budget not in ("none", "all"))
    about = [settings_line(folder, results), sources_line(folder, results)]
    about += [equal_checks_line(results), missing_line(results, wanted)]
    parts, lines = [], ["\n\n".join(filter(None, about))]
    for budget in budgets:
        summaries = summarize(results, budget, operations, step_seconds)
        if any(summary.strategy not in ("base", "all") for summary in summaries):
            parts.append(summaries)
            lines += ["", f"**{Budget.parse(budget).label}**", "", *choice_table(summaries)]
            lines += ["", *result_table(summaries)]
            if by_source := source_table(summaries):
                lines += ["", "Loss minus random's, by source:", "", *by_source]
    if write_docs and not parts:
        raise UserError(
            f"{folder}/results.jsonl: no run with --budgets {' '.join(budgets)} is done."
        )
    text = "\n".join(lines)
    with atomic_write(folder / "report.md") as file:
        file.write(text + "\n")
    print(text)
    if parts:
        draw(parts, folder / "selection.png")
        print(f"\ndrew {folder / 'selection.png'}")
    if write_docs:
        page = DOCS / "selection.md"
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        picture = "![the study](selection_study.png)"
        draw(parts, DOCS / "selection_study.png")
        with atomic_write(page) as file:
            file.write(f"{before}{BEGIN}\n\n{text}\n\n{picture}\n\n{END}{rest.split(END)[1]}")
