"""The results of a comparison as lines for the terminal.

    print(*measure_lines(results), sep="\\n")

`results` is the content of results.json.
"""

from argparse import Namespace
from typing import Any

MEASURES = {
    "bleu_2": "BLEU-2",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
}
# Counts of failures.
PROBLEMS = {
    "answers_cut": "answers were truncated at --max_new_tokens",
    "questions_without_room": "questions left no room for an answer; the answer counts as empty",
    "references_without_room": "references did not fit and do not count in the perplexity",
}


def measure_lines(results: dict[str, Any]) -> list[str]:
    """The figures of every model, counts of failures, and the differences from the first model."""
    lines = []
    for name, report in results["models"].items():
        figures = ", ".join(
            f"{label} {100 * report['mean'][key]['mean']:.1f}" for key, label in MEASURES.items()
        )
        perplexity = "unknown"
        if report["perplexity"]:
            perplexity = f"{report['perplexity']:,.2f} (references never truncated)"
        lines.append(f"{name}: {figures}, perplexity {perplexity}")
        for key, problem in PROBLEMS.items():
            if report[key]:
                lines.append(f"{name}: {report[key]} of {len(report['rows'])} {problem}")
    return lines + difference_lines(results)


def difference_lines(results: dict[str, Any]) -> list[str]:
    """How much higher every other model is than the first, with intervals over rows."""
    first, *others = results["models"]
    lines = []
    for name in others:
        entry = results["differences_to_first"][name]
        changes = []
        for key in ("rouge_l", "exact_match"):
            interval, spread = entry[key]["interval"], "no row differs"
            if interval:
                spread = " to ".join(f"{100 * end:+.1f}" for end in interval)
            changes.append(f"{MEASURES[key]} {100 * entry[key]['mean']:+.1f} points ({spread})")
        lines.append(
            f"{name} minus {first}: {', '.join(changes)}, McNemar's p = "
            f"{entry['exact_match']['p_value']:.3g}"
        )
    return lines


def verdict_lines(results: dict[str, Any]) -> list[str]:
    """The judge's verdicts on every model against the first."""
    first = next(iter(results["models"]))
    lines = []
    for name, report in results["judge"]["against_first"].items():
        counts = ", ".join(f"{report[key]['count']} {key}" for key in ("win", "tie", "loss"))
        lines.append(
            f"{name} against {first}: {counts}, {report['unreadable']} unreadable; "
            f"{reliability(report)}"
        )
    if any(report["unreadable"] for report in results["judge"]["against_first"].values()):
        lines.append(
            'unreadable: a text of the judge has no line such as "Verdict: 1"; verdicts.jsonl has '
            "the texts. A larger model keeps to this form."
        )
    return lines


def reliability(report: dict[str, Any]) -> str:
    """How much the order of the answers influenced the judge. report: as `tally` returns it."""
    if report["first_place"] is None:
        return "the judge chose no answer"
    return (
        f"{report['contradicting']} of the ties because the judge contradicted itself; it chose "
        f"the answer shown first in {100 * report['first_place']:.0f} % of its choices"
    )


def compare_protocol(options: Namespace, num_questions: int) -> str:
    """How the answers were made and measured, as text."""
    sampling = "greedily"
    if options.temperature > 0:
        sampling = (
            f"at temperature {options.temperature}, top-k {options.top_k}, top-p {options.top_p}, "
            f"seed {options.seed}"
        )
    models = ", ".join(options.models)
    if options.quantization_bit:
        models += f" with linear layers in {options.quantization_bit} bits"
    return (
        f"{num_questions} questions of {options.dataset}, template {options.template}, answers of "
        f"at most {options.max_new_tokens} tokens written {sampling}; {models}; BLEU by sacrebleu "
        "(zh), ROUGE F by rouge-score, both by character in Chinese; perplexity over the last "
        "answer of each row, never truncated (train.py: over all answers, truncated at "
        "--cutoff_len); 95 % intervals, normal for means, Wilson's for shares"
    )
