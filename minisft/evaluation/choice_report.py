"""The figures of a multiple-choice run: accuracies, averages, comparison with an earlier run.

    summary = summarize(subjects, {"law": predictions}, num_fewshot=5)
    print("\\n".join(summary_lines(summary)))

Accuracies are between 0 and 1, intervals 95 %.
"""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from minisft.common.json_files import write_json
from minisft.common.outputs import recorded_options
from minisft.evaluation.benchmarks import Benchmark, Subject
from minisft.evaluation.confidence import macro_interval, mcnemar, mean_interval, wilson
from minisft.evaluation.predictions import Baseline, Prediction, read_finished
from minisft.text.chat_template import ChatTemplate

# Subject -> its predictions, all repetitions.
Predictions = dict[str, list[Prediction]]
Summary = dict[str, Any]  # as in summary.json
# Options that change the prompts: figures from different ones differ for that reason alone.
PROTOCOL = ("num_fewshot", "template", "template_kwargs", "enable_thinking", "max_length")


def summarize(subjects: Sequence[Subject], predictions: Predictions, num_fewshot: int) -> Summary:
    """Accuracies by subject, by group and in total, with intervals; counts of what was dropped.

    `macro` is the mean over subjects; `weighted` gives every question the same weight. If the
    answers are secret, there are only counts.
    """
    all_rows = [row for subject in subjects for row in predictions[subject.key]]
    # Repetitions ask the same questions, so they do not make the sample larger.
    first_run = [row for row in all_rows if row.run == 0]
    dropped = [
        min(num_fewshot, len(subject.demonstrations)) - row.num_fewshot
        for subject in subjects
        for row in predictions[subject.key]
        if row.run == 0
    ]
    summary: Summary = {
        "num_questions": len(first_run),
        "questions_with_dropped_demonstrations": sum(number > 0 for number in dropped),
        "dropped_demonstrations": sum(dropped),
        "questions_cut": sum(row.is_cut for row in first_run),
    }
    if any(row.answer is None for row in all_rows):
        return summary
    entries = {}
    for subject in subjects:
        count, rate = len(subject.questions), _accuracy(predictions[subject.key])
        entries[subject.key] = {
            "name": subject.name,
            "group": subject.group,
            "num_questions": count,
            "accuracy": rate,
            "interval": wilson(rate, count),
        }
    groups = {}
    for name in sorted({entry["group"] for entry in entries.values()} - {""}):
        groups[name] = _averages([entry for entry in entries.values() if entry["group"] == name])
    summary |= _averages(list(entries.values()))
    runs = sorted({row.run for row in all_rows})
    if len(runs) > 1:
        summary["macro_of_each_run"] = [
            sum(
                _accuracy(row for row in predictions[subject.key] if row.run == run)
                for subject in subjects
            )
            / len(subjects)
            for run in runs
        ]
    return summary | {"groups": groups, "subjects": entries}


def _accuracy(predictions: Iterable[Prediction]) -> float:
    is_right = [row.is_right for row in predictions]
    return sum(is_right) / len(is_right)


def _averages(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = [(entry["accuracy"], entry["num_questions"]) for entry in entries]
    total = sum(count for _, count in counts)
    weighted = sum(rate * count for rate, count in counts) / total
    return {
        "macro": {
            "accuracy": sum(rate for rate, _ in counts) / len(counts),
            "interval": macro_interval(counts),
        },
        "weighted": {"accuracy": weighted, "interval": wilson(weighted, total)},
        "num_questions": total,
    }


def submission(subjects: Sequence[Subject], predictions: Predictions) -> dict[str, dict[str, str]]:
    """The predictions of the first run in the form that C-Eval accepts: {subject: {id: letter}}."""
    return {
        subject.key: {row.id: row.prediction for row in predictions[subject.key] if row.run == 0}
        for subject in subjects
    }


def compare_with_baseline(baseline: Baseline, predictions: Predictions) -> dict[str, Any]:
    """The difference in accuracy from an earlier run, over the questions that both answered.

    If questions were repeated, the first repetition counts. The interval is None if no question
    differs: a variance of 0 says nothing about other questions.
    """
    pairs = [
        (was_right[row.id, row.question], row.is_right)
        for key, was_right in baseline.items()
        for row in predictions[key]
        if row.run == 0 and (row.id, row.question) in was_right
    ]
    difference, low, high = mean_interval([after - before for before, after in pairs], -1, 1)
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return {
        "num_questions": len(pairs),
        "difference": difference,
        "interval": (low, high) if lost + gained else None,
        "only_baseline_right": lost,
        "only_this_right": gained,
        "p_value": mcnemar(lost, gained),
    }


def other_protocol(options: Namespace) -> dict[str, Any]:
    """The options in PROTOCOL that the baseline's run had otherwise, with its values."""
    recorded = recorded_options(options.baseline_dir)
    return {
        name: recorded.get(name)
        for name in PROTOCOL
        if recorded and recorded.get(name) != getattr(options, name)
    }


def summary_lines(summary: Summary) -> list[str]:
    """The summary for the terminal, in percent."""
    lines = []
    if "macro" in summary:
        for key, entry in summary["subjects"].items():
            lines.append(_table_line(key, entry["num_questions"], entry))
        for name, entry in summary["groups"].items():
            lines.append(_table_line(name, entry["num_questions"], entry["macro"]))
        count = summary["num_questions"]
        lines.append(_table_line("mean over subjects", count, summary["macro"]))
        lines.append(_table_line("mean over questions", count, summary["weighted"]))
    if "baseline" in summary:
        change = summary["baseline"]
        spread = "no question differs"
        if change["interval"]:
            spread = " to ".join(f"{100 * end:+.1f}" for end in change["interval"])
        lines.append(
            f"against the baseline, over {change['num_questions']} questions: "
            f"{100 * change['difference']:+.1f} points ({spread}), "
            f"McNemar's p = {change['p_value']:.3g}"
        )
        if others := change.get("other_protocol"):
            had = ", ".join(f"--{name} {value}" for name, value in others.items())
            lines.append(f"the baseline had {had}: the difference is not that of the models alone")
    if summary["dropped_demonstrations"]:
        lines.append(
            f"{summary['questions_with_dropped_demonstrations']} questions had no room for all "
            f"demonstrations: {summary['dropped_demonstrations']} were dropped"
        )
    if summary["questions_cut"]:
        lines.append(
            f"{summary['questions_cut']} questions were too long even without demonstrations and "
            "lost their beginning"
        )
    return lines


def _table_line(name: str, count: int, entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return (
        f"{name:<40} {count:>6} {100 * entry['accuracy']:>6.1f} %"
        f"  ({100 * low:.1f} to {100 * high:.1f})"
    )


def choice_protocol(
    benchmark: Benchmark, options: Namespace, dtype: torch.dtype, template: ChatTemplate | None
) -> str:
    """How the figures were measured, as text. Only figures of equal protocols are comparable.

    template: None for a prompt of plain text.
    """
    parts = [f"{benchmark.title}, {options.split} split"]
    if options.subjects:
        parts.append(f"subjects {options.subjects}")
    if options.max_samples:
        parts.append(f"the first {options.max_samples} questions of each subject")
    shots = f"{options.num_fewshot}-shot"
    if options.num_fewshot:
        shots += " with the first rows of dev"
    if options.n_times > 1:
        shots += f", mean of {options.n_times} runs with different demonstrations"
    form = f"turns of the template {template.name}" if template else "plain text"
    model = options.model_name_or_path
    if options.adapter:
        model += f" with {options.adapter}"
    model += " in " + str(dtype).removeprefix("torch.")
    if options.quantization_bit:
        model += f" with linear layers in {options.quantization_bit} bits"
    parts += [
        shots,
        f"the prompt of the authors as {form}",
        "the letter with the highest log-likelihood after the prompt",
        model,
        "95 % intervals, Wilson's for questions, normal over subjects",
    ]
    return "; ".join(parts)


def write_summary(
    options: Namespace,
    protocol: str,
    subjects: list[Subject],
    rows_dir: Path,
    baseline: dict[str, Any] | None,
) -> None:
    """Print and write the accuracy of the predictions in rows_dir, or the file to submit."""
    predictions = {
        subject.key: read_finished(rows_dir / f"{subject.key}.csv", subject, options.n_times)
        for subject in subjects
    }
    summary = {"protocol": protocol} | summarize(subjects, predictions, options.num_fewshot)
    if baseline:
        summary["baseline"] = compare_with_baseline(baseline, predictions)
        summary["baseline"]["other_protocol"] = other_protocol(options)
    if "macro" not in summary:
        path = rows_dir.parent / "submission.json"
        write_json(submission(subjects, predictions), path)
        is_part = options.max_samples or options.subjects
        todo = "a part of what is submitted" if is_part else "to be submitted"
        print(f"the answers of this split are secret: wrote {path}, {todo}")
    print("\n".join([*summary_lines(summary), protocol]))
    path = rows_dir.parent / "summary.json"
    write_json(summary, path)
    print(f"wrote {path}")
