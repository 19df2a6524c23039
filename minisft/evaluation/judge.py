"""A judge model decides which of two answers is better.

    judge = RemoteJudge("http://127.0.0.1:8000/v1", "judge-model", key=None)
    verdicts = collect_verdicts(judge, comparisons, "runs/comparison/verdicts.jsonl")

Judges are biased by the order of the answers. Therefore every pair is judged twice, in both orders.
Each verdict is saved as soon as it is known, so an interrupted run continues where it stopped.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minisft.common.errors import UserError
from minisft.evaluation.compare import Item, answer_items
from minisft.evaluation.confidence import mcnemar, wilson
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling

MAX_NEW_TOKENS = 512  # of a judgement
# "1/2", "1 or 2" and "1.5" are no choice: they match without a group.
VERDICT = re.compile(
    r"""
    verdict\W*(?:answer\W*)?
    (?:
        (1|2|tie)
        (?![0-9a-z] | [.,:-][0-9])
        (?!
            [^\w\n]{0,9} (?:[/|&] | (?:or|and)\b | [或和与])
            [^\w\n]{0,9} (?:answer\W{0,9})? (?:[0-9]|tie)
        )
        | [0-9] | tie
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
INSTRUCTION = """\
Two assistants answered the question below. Judge which answer is better: correct, to the point, \
complete, in the language of the question. Neither their order nor their length counts. Give your \
reason in one or two sentences, then a last line that reads "Verdict: 1", "Verdict: 2" or, if \
neither is better, "Verdict: tie".

[Question]
{question}

[Answer 1]
{first}

[Answer 2]
{second}
"""
# The place of the better answer, "tie", or None if the judge's text has no verdict.
Verdict = int | str | None
# Verdicts of both orders: with the baseline's answer first, and with the other model's first.
Verdicts = tuple[Verdict, Verdict]


@dataclass(frozen=True)
class Comparison:
    """A question, and the answers of the baseline and of another model."""

    question: str
    baseline: str
    other: str

    def prompts(self) -> list[str]:
        """The texts for the judge in both orders, with the baseline's answer first and second."""
        return [
            INSTRUCTION.format(question=self.question, first=first, second=second)
            for first, second in ((self.baseline, self.other), (self.other, self.baseline))
        ]


class Judge(Protocol):
    """A model that judges: LocalJudge or RemoteJudge."""

    name: str

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (number of a prompt, the judge's text) in the order in which they come."""
        ...


class LocalJudge:
    """A judge on this machine, which decides greedily."""

    def __init__(self, assistant: Assistant, name: str, batch_size: int):
        self.assistant, self.name, self.batch_size = assistant, name, batch_size

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (number of a prompt, the judge's text), batch by batch."""
        limit = min(MAX_NEW_TOKENS, self.assistant.max_length // 2)
        sampling = Sampling(max_new_tokens=limit, greedy=True)
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            items = [Item([{"role": "user", "content": text}], "") for text in batch]
            answers = answer_items(self.assistant, items, sampling, self.batch_size)
            for number, answer in enumerate(answers, start):
                is_skipped = answer["is_skipped"]
                yield number, "(no room in the context)" if is_skipped else answer["answer"]


def comparisons_with_first(results: dict[str, Any]) -> dict[str, list[Comparison]]:
    """Every model but the first -> its answers beside those of the first. results: results.json."""
    (_, first), *others = results["models"].items()
    return {
        name: [
            Comparison(item["question"], baseline["answer"], other["answer"])
            for item, baseline, other in zip(
                results["questions"], first["answers"], report["answers"], strict=True
            )
        ]
        for name, report in others
    }


def collect_verdicts(
    judge: Judge,
    comparisons: Sequence[Comparison],
    path: str | Path,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Verdicts]:
    """Both verdicts on each comparison.

    path: a file of JSON lines, to which verdicts are added. Prompts whose verdict it has are not
    judged again. advance: called with the number of verdicts since the last call.
    """
    known = _read_verdicts(Path(path))
    prompts = [text for comparison in comparisons for text in comparison.prompts()]
    keys = [hashlib.sha256(f"{judge.name}\n{text}".encode()).hexdigest() for text in prompts]
    missing = list({key: place for place, key in enumerate(keys) if key not in known}.values())
    advance(len(prompts) - len(missing))
    for number, text in judge.replies([prompts[place] for place in missing]):
        key, verdict = keys[missing[number]], parse_verdict(text)
        known[key] = verdict
        _append(Path(path), {"key": key, "verdict": verdict, "text": text})
        advance(1)
    verdicts = [known[key] for key in keys]
    return list(zip(verdicts[::2], verdicts[1::2], strict=True))


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from error


def _read_verdicts(path: Path) -> dict[str, Verdict]:
    """key -> verdict. An incomplete last line is removed from the file."""
    content = path.read_bytes() if path.exists() else b""
    # Not splitlines: a judge may write other line ends, which JSON does not escape.
    *lines, cut_off = content.split(b"\n")
    if cut_off:
        os.truncate(path, len(content) - len(cut_off))
    try:
        return {record["key"]: record["verdict"] for record in map(json.loads, lines)}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a file of verdicts. Remove it.") from error


def parse_verdict(text: str) -> Verdict:
    """The last verdict in a judge's text: 1, 2 or "tie"; None if there is none, or no choice."""
    verdicts = VERDICT.findall(text)
    choice = verdicts[-1].lower() if verdicts else ""
    return int(choice) if choice.isdigit() else choice or None


def outcome(baseline_first: Verdict, other_first: Verdict) -> str | None:
    """The outcome for the other model: "win", "tie" or "loss"; None if a verdict is missing.

    It wins with two verdicts, or with one and a tie. Verdicts that contradict each other are a tie.
    """
    if baseline_first is None or other_first is None:
        return None
    points: dict[int | str, int] = {1: -1, 2: 1, "tie": 0}
    total = points[baseline_first] - points[other_first]
    return "win" if total > 0 else "loss" if total < 0 else "tie"


def tally(verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """Wins, ties and losses with the Wilson interval of each share, and a sign test's p-value.

    `contradicting` counts the ties whose two verdicts chose the same place. `first_place` is the
    share of choices for the answer shown first: 0.5 for a judge that ignores the order.
    """
    outcomes = [outcome(*pair) for pair in verdicts]
    readable = [result for result in outcomes if result]
    places = [
        verdict for pair in verdicts if None not in pair for verdict in pair if verdict != "tie"
    ]
    report: dict[str, Any] = {
        "unreadable": len(outcomes) - len(readable),
        "contradicting": sum(pair in ((1, 1), (2, 2)) for pair in verdicts),
        "first_place": places.count(1) / len(places) if places else None,
    }
    for name in ("win", "tie", "loss"):
        share = readable.count(name) / max(1, len(readable))
        report[name] = {
            "count": readable.count(name),
            "share": share,
            "interval": wilson(share, len(readable)),
        }
    return report | {"p_value": mcnemar(readable.count("loss"), readable.count("win"))}


def judge_report(name: str, verdicts: dict[str, list[Verdicts]]) -> dict[str, Any]:
    """The entry "judge" of results.json. verdicts: {model: verdicts}, without the first model."""
    return {
        "name": name,
        "outcomes": {
            model: [outcome(*pair) for pair in pairs] for model, pairs in verdicts.items()
        },
        "against_first": {model: tally(pairs) for model, pairs in verdicts.items()},
    }


def cost_line(
    comparisons: Sequence[Comparison], price_in: float = 0.0, price_out: float = 0.0
) -> str:
    """A line with the maximum cost of judging. The prices are for a million tokens.

    The number of tokens is an estimate: a token for each Chinese character, and for every four
    bytes of other text.
    """
    texts = [text for comparison in comparisons for text in comparison.prompts()]
    # The ideographs of Unicode begin after U+2E7F.
    others = "".join(character for text in texts for character in text if character <= "\u2e7f")
    tokens_in = sum(map(len, texts)) - len(others) + len(others.encode()) // 4
    tokens_out = len(texts) * MAX_NEW_TOKENS
    cost = (tokens_in * price_in + tokens_out * price_out) / 10**6
    line = (
        f"judging: {len(texts):,} requests, about {tokens_in:,} tokens to read, at most "
        f"{tokens_out:,} to write"
    )
    return line + (f"; at most about {cost:,.2f}" if cost else "")
