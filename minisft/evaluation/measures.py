"""The figures of a comparison: how near answers are to references, and how models differ.

report = measure(items, answers, losses)
report["mean"]["rouge_l"]                     # {"mean": 0.31, "interval": (0.24, 0.38)}
differences(report, report_of_another_model)
"""

import math
from collections.abc import Sequence
from typing import Any

from minisft.evaluation.compare import Answer, Item, ReferenceLoss
from minisft.evaluation.confidence import mcnemar, mean_interval, wilson
from minisft.evaluation.text_metrics import corpus_bleu2, row_scores

MEASURES = ("bleu_2", "rouge_1", "rouge_2", "rouge_l", "exact_match")


def measure(
    items: Sequence[Item], answers: Sequence[Answer], losses: Sequence[ReferenceLoss | None]
) -> dict[str, Any]:
    """The figures of a model: {"rows": scores of each item, "mean": with intervals, and counts}.

    The mean of `bleu_2` is BLEU over all rows, and has no interval. Perplexity is per token: it
    compares only models with the same tokenizer. Bits per character compare all models.
    """
    rows: list[dict[str, Any]] = []
    for item, answer, loss in zip(items, answers, losses, strict=True):
        scores = row_scores(answer["answer"], item.reference)
        rows.append(scores | {"perplexity": _exp(loss[0] / loss[1]) if loss else None})
    mean: dict[str, Any] = {}
    for name in MEASURES[1:]:
        center, low, high = mean_interval([row[name] for row in rows], 0, 1)
        mean[name] = {"mean": center, "interval": (low, high)}
    mean["exact_match"]["interval"] = wilson(mean["exact_match"]["mean"], len(rows))
    texts = [answer["answer"] for answer in answers]
    mean["bleu_2"] = {"mean": corpus_bleu2(texts, [item.reference for item in items])}

    scored = [(loss, item) for loss, item in zip(losses, items, strict=True) if loss]
    nats, num_tokens = (sum(loss[place] for loss, _ in scored) for place in (0, 1))
    num_characters = sum(len(item.reference) for _, item in scored)
    return {
        "mean": mean,
        "rows": rows,
        "perplexity": _exp(nats / num_tokens) if scored else None,
        "bits_per_character": nats / math.log(2) / num_characters if num_characters else None,
        "answer_characters": sum(map(len, texts)) / len(answers),
        "answer_tokens": sum(answer["num_tokens"] for answer in answers) / len(answers),
        "answers_cut": sum(answer["is_cut"] for answer in answers),
        "questions_without_room": sum(answer["is_skipped"] for answer in answers),
        "references_without_room": list(losses).count(None),
    }


def _exp(value: float) -> float | None:
    """exp(value); None if it overflows, since JSON has no infinity."""
    return math.exp(value) if value < 700 else None


def differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How much higher `other` is than `first` in every measure, row by row, with intervals.

    For exact match also the p-value of McNemar's test. The interval is None if no row differs: a
    variance of 0 says nothing about other rows.
    """
    result: dict[str, dict[str, Any]] = {}
    for name in MEASURES:
        changes = [
            row[name] - first_row[name]
            for first_row, row in zip(first["rows"], other["rows"], strict=True)
        ]
        center, low, high = mean_interval(changes, -1, 1)
        result[name] = {"mean": center, "interval": (low, high) if any(changes) else None}
        if name == "exact_match":
            result[name]["p_value"] = mcnemar(changes.count(-1.0), changes.count(1.0))
    return result
