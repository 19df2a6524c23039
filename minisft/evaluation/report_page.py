"""The results of a comparison as an HTML page: figures, and all answers side by side.

    write_results(results, Path("runs/comparison"))

`results` is the content of results.json; report.html.jinja is the page. Jinja escapes what models
and data sets wrote, so it stays text. The page is a single file, and its Content-Security-Policy
forbids every request.
"""

from pathlib import Path
from typing import Any

import jinja2

from minisft.common.json_files import write_json
from minisft.common.outputs import atomic_write
from minisft.evaluation.report_lines import MEASURES, difference_lines, reliability

TEMPLATE = "report.html.jinja"
# The other figures in the table.
COUNTS = {
    "perplexity": "perplexity of the references, never truncated",
    "bits_per_character": "bits per character of the reference",
    "answer_characters": "answer length, characters",
    "answers_cut": "answers truncated at --max_new_tokens",
    "questions_without_room": "questions too long for the context",
    "references_without_room": "references too long for the context",
}
OUTCOMES = {"win": "won", "tie": "tied", "loss": "lost", None: "unreadable"}


def write_results(results: dict[str, Any], output_dir: Path) -> None:
    """Write results.json and report.html."""
    write_json(results, output_dir / "results.json")
    with atomic_write(output_dir / "report.html") as file:
        file.write(render_page(results))


def render_page(results: dict[str, Any]) -> str:
    """The page as HTML. A reader can search the rows, and filter them by result."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = results["models"]
    return environment.get_template(TEMPLATE).render(
        title=" / ".join(models),
        protocol=results["protocol"],
        models=models,
        measures=MEASURES,
        counts=COUNTS,
        difference_lines=difference_lines(results),
        verdicts=_verdicts(results),
        outcomes=OUTCOMES,
        kinds=_kinds(results),
        rows=[_row(results, number) for number in range(len(results["questions"]))],
    )


def _verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry on the page of every model that was judged."""
    judge = results.get("judge", {"name": "", "against_first": {}})
    return [
        {
            "name": name,
            "first": next(iter(results["models"])),
            "judge": judge["name"],
            "report": report,
            "reliability": reliability(report),
        }
        for name, report in judge["against_first"].items()
    ]


def _kinds(results: dict[str, Any]) -> dict[str, str]:
    """The kinds of rows that the page can filter by: value -> text."""
    kinds = {
        "all-right": "all right (exact match)",
        "none-right": "none right",
        "differ": "right in some only",
    }
    judged = results.get("judge", {}).get("outcomes", {})
    for number, name in enumerate(results["models"]):
        if name in judged:
            for outcome in ("win", "tie", "loss"):
                kinds[f"{outcome}-{number}"] = f"{name} {OUTCOMES[outcome]}"
    return kinds


def _row(results: dict[str, Any], number: int) -> dict[str, Any]:
    """A question with its reference, the answers of all models, and its kinds."""
    judged = results.get("judge", {}).get("outcomes", {})
    answers, is_right, kinds = [], [], []
    for model_number, (name, report) in enumerate(results["models"].items()):
        outcome = judged[name][number] if name in judged else None
        scores = report["rows"][number]
        answers.append(
            {
                "model": name,
                "is_judged": name in judged,
                "outcome": outcome,
                "text": report["answers"][number]["answer"],
                "scores": scores,
            }
        )
        is_right.append(scores["exact_match"] == 1)
        if outcome:
            kinds.append(f"{outcome}-{model_number}")
    kinds.append("all-right" if all(is_right) else "differ" if any(is_right) else "none-right")
    item = results["questions"][number]
    return {
        "question": item["question"],
        "reference": item["reference"],
        "answers": answers,
        "kinds": kinds,
    }
