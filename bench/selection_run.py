"""The work of the selection study: the data and scores that all runs share, and a single run.

    prepare(options, folder)                       # pool.json, ifd.jsonl, embed.embeddings.npy, ...
    result = run_one(options, Run("ifd", "300", seed=0))

Scores, training, losses and answers come from minisft: score.py and train.py, called in this
process, and the functions of eval.py.
"""

import json
import shutil
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import score
import train
from bench.measure import flags
from bench.selection_checks import MAX_NEW_TOKENS, make_prompts
from bench.selection_choice import choose_rows, scored
from bench.selection_options import SAME_STEPS, STRATEGIES, TARGETS, Budget
from bench.selection_pool import TARGET_SOURCES, Record, make_data, num_answer_tokens
from minisft.checkpoints import hub
from minisft.common.devices import resolve_device, resolve_dtype
from minisft.common.json_files import write_rows
from minisft.common.metric_lines import read_metrics
from minisft.data.dataset import load_rows
from minisft.evaluation.compare import Item, answer_items, read_items, reference_losses
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.model.config import ModelConfig
from minisft.selection.score_options import parse_options as score_options
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer
from minisft.training.build import model_on_meta
from minisft.training.operations import forward_operations, training_operations
from minisft.training.options import parse_options as train_options

Result = dict[str, Any]  # a line of results.jsonl
BATCH_SIZE, EVAL_BATCH_SIZE = 8, 16
MICRO_BATCHES = 2  # of a step: with one, a run on rows of 512 tokens takes 9.4 GB in float32
NEVER = 10**6  # --save_steps


@dataclass(frozen=True)
class Run:
    """One training: a strategy, a budget ("300", "300t", "all", "none"), a seed."""

    strategy: str
    budget: str
    seed: int


def spent_seconds() -> float:
    """A clock: processor time, which other programs hardly change; with a GPU, real time."""
    return time.monotonic() if torch.cuda.is_available() else time.process_time()


def prepare(options: Namespace, folder: Path) -> None:
    """Write the data, and compute the scores and embeddings that the strategies read, once."""
    pool = folder / "pool.json"
    if not pool.exists():
        template = get_template(options.template, Tokenizer.load(model_dir(options)))
        data = make_data(
            Path(options.data_dir),
            template,
            options.cutoff_len,
            options.held_out,
            seed=0,
            max_rows=options.max_rows,
        )
        write_records(data.held_out, folder / "heldout.json")
        for name in TARGET_SOURCES:
            write_records(data.targets[name], folder / f"target_{name}.json")
        write_records(data.pool, pool)  # the last: it marks the data as complete

    def score_file(dataset: str, output: str, **more: Any) -> None:
        """The scores of a file, by score.py, which continues an interrupted call."""
        words = [*shared_flags(options), *flags(dataset=folder / dataset, **more)]
        words += flags(output=folder / f"{output}.jsonl", cutoff_len=options.cutoff_len)
        words += flags(dataloader_num_workers=0)
        logged(folder / f"{output}.log", lambda: score.main(score_options(words)))

    def pre_experience() -> None:
        """A few rows of every cluster, for an epoch (arXiv 2308.12032)."""
        numbers = choose_rows(folder, "kmeans", Budget(options.pre_rows), 0, options.clusters)
        write_records(read_records(pool, numbers), folder / "pre.json")
        train_adapter(options, folder / "pre.json", folder / "pre", 0, num_train_epochs=1)

    steps: dict[str, Callable[[], None]] = {
        "ifd": lambda: score_file("pool.json", "ifd", mode="ifd"),
        "embed": lambda: score_file("pool.json", "embed", mode="embed"),
        "weighted": lambda: score_file("pool.json", "weighted", mode="embed", pooling="weighted"),
        **{
            f"target_{name}": lambda name=name: score_file(
                f"target_{name}.json", f"target_{name}", mode="embed", pooling="weighted"
            )
            for name in TARGET_SOURCES
        },
        "pre": pre_experience,
        "pre_ifd": lambda: score_file("pool.json", "pre_ifd", mode="ifd", adapter=folder / "pre"),
    }
    needed = {step for name in options.strategies for step in STRATEGIES[name].needs}
    for step, action in steps.items():
        if step in {"ifd", *needed}:  # ifd.jsonl has the lengths too
            run_step(folder / "steps.jsonl", step, action)


def run_step(log: Path, step: str, action: Callable[[], None]) -> None:
    """Do a step unless the log says that it is done. The log counts the time of all tries."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if any(record["step"] == step and record["done"] for record in map(json.loads, lines)):
        return
    began, done = spent_seconds(), False
    try:
        action()
        done = True
    finally:
        record = {"step": step, "done": done, "seconds": spent_seconds() - began}
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def run_one(options: Namespace, run: Run) -> Result:
    """Choose rows, train on them, measure: a line of results.jsonl."""
    study = Path(options.output_dir)
    folder = study / f"{run.strategy}-{run.budget}-{run.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.mkdir()
    result: Result = {"strategy": run.strategy, "budget": run.budget, "seed": run.seed}
    seconds, adapter = {"choose": 0.0, "train": 0.0}, None
    result |= {"num_rows": 0, "answer_tokens": 0, "steps": 0, "trained_tokens": 0}
    if run.strategy != "base":
        began = spent_seconds()
        budget = Budget.parse("1" if run.budget == "all" else run.budget)
        records, num_tokens = rows_of_run(options, run, budget)
        write_records(records, folder / "chosen.json")
        seconds["choose"] = spent_seconds() - began

        began, adapter = spent_seconds(), folder / "adapter"
        size: dict[str, Any] = {"num_train_epochs": options.epochs}
        if run.strategy == "all":
            size = {"num_train_epochs": 1}
        elif run.strategy in SAME_STEPS:
            size = {"max_steps": options.epochs * -(-budget.num_rows // BATCH_SIZE)}
        train_adapter(options, folder / "chosen.json", adapter, run.seed, **size)
        seconds["train"] = spent_seconds() - began
        [*_, last] = (row for row in read_metrics(adapter / "metrics.jsonl") if "tokens" in row)
        result |= {
            "num_rows": len(records),
            "answer_tokens": num_tokens,
            "steps": last["step"],
            "trained_tokens": last["tokens"],
            "quality": dict(Counter(record["quality"] for record in records)),
            "sources": dict(Counter(record["source"] for record in records)),
        }
    began = spent_seconds()
    measured, answers = measure(options, adapter)
    seconds["measure"] = spent_seconds() - began
    write_records(answers, folder.with_suffix(".answers.json"))
    shutil.rmtree(folder)
    return result | measured | {"seconds": seconds}


def rows_of_run(options: Namespace, run: Run, budget: Budget) -> tuple[list[Record], int]:
    """The rows that a run trains on, and how many tokens their answers have."""
    study = Path(options.output_dir)
    if run.strategy in TARGETS:
        records = read_records(study / f"target_{TARGETS[run.strategy]}.json")
        template = get_template(options.template, Tokenizer.load(model_dir(options)))
        return records, sum(num_answer_tokens(record, template) for record in records)
    numbers = choose_rows(study, run.strategy, budget, run.seed, options.clusters)
    lengths = scored(study / "ifd.jsonl")["num_answer_tokens"]
    return read_records(study / "pool.json", numbers), int(lengths[numbers].sum())


def measure(options: Namespace, adapter: Path | None) -> tuple[dict[str, Any], list[Result]]:
    """The losses, a mean for each held-out row, and the checks, 1 for a right answer; the answers.

    ({"loss": {source: [...]}, "checks": {kind: [...]}}, [{"question": ..., "answer": ...}, ...])
    """
    study = Path(options.output_dir)
    assistant = Assistant(
        options.model_name_or_path, adapter, options.template, dtype=options.dtype
    )
    records = read_records(study / "heldout.json")
    items = read_items(load_rows(study / "heldout.json"))
    losses: dict[str, list[float | None]] = {}
    found = reference_losses(assistant, items, EVAL_BATCH_SIZE)
    for record, loss in zip(records, found, strict=True):
        value = round(loss[0] / loss[1], 5) if loss else None
        losses.setdefault(record["source"], []).append(value)

    prompts = make_prompts(options.per_kind)
    questions = [Item([{"role": "user", "content": prompt.question}], "") for prompt in prompts]
    greedy = Sampling(max_new_tokens=MAX_NEW_TOKENS, greedy=True)
    checks: dict[str, list[int]] = {}
    answers = []
    found = answer_items(assistant, questions, greedy, batch_size=5 * EVAL_BATCH_SIZE)
    for prompt, answer in zip(prompts, found, strict=True):
        checks.setdefault(prompt.kind, []).append(int(prompt.is_right(answer["answer"])))
        answers.append({"question": prompt.question, "answer": answer["answer"]})
    return {"loss": losses, "checks": checks}, answers


def train_adapter(
    options: Namespace, dataset: Path, output_dir: Path, seed: int, **size: Any
) -> None:
    """Train an adapter by train.py. size: num_train_epochs or max_steps."""
    words = [*training_flags(options), *flags(dataset=dataset, output_dir=output_dir, seed=seed)]
    words += flags(overwrite_output_dir=True, **size)
    log = output_dir.with_name(f"{output_dir.name}.log")
    logged(log, lambda: train.main(train_options(words)))


def shared_flags(options: Namespace) -> list[str]:
    """The flags of score.py and train.py that name the model."""
    model = model_dir(options)
    return flags(model_name_or_path=model, template=options.template, dtype=options.dtype)


def training_flags(options: Namespace) -> list[str]:
    """The flags of train.py for all runs."""
    return [
        *shared_flags(options),
        *flags(
            lora_rank=options.lora_rank,
            learning_rate=options.learning_rate,
            cutoff_len=options.cutoff_len,
            per_device_train_batch_size=BATCH_SIZE // MICRO_BATCHES,
            gradient_accumulation_steps=MICRO_BATCHES,
            save_steps=NEVER,
            dataloader_num_workers=0,
        ),
    ]


def logged(path: Path, action: Callable[[], None]) -> None:
    """Call a function; what it prints goes to a file."""
    with open(path, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        action()


def operations(options: Namespace) -> dict[str, float]:
    """Arithmetic operations of the steps done, by name, and of training on a token ("token")."""
    study = Path(options.output_dir)
    words = [*training_flags(options), *flags(dataset="-", output_dir="-")]
    config = ModelConfig.load(model_dir(options))
    dtype = resolve_dtype(options.dtype, resolve_device("auto"))
    model = model_on_meta(train_options(words), config, dtype)
    scores = scored(study / "ifd.jsonl")
    tokens, answers = scores["num_tokens"], scores["num_answer_tokens"]
    length = float(tokens.mean())
    token = training_operations(model, length)
    # Tokens of each step: ifd reads an answer twice, with its prompt and without.
    counts = {"ifd": (tokens + answers).sum(), "embed": (tokens - answers).sum()}
    counts |= {"weighted": tokens.sum(), "pre_ifd": counts["ifd"]}
    for name in TARGET_SOURCES:
        counts[f"target_{name}"] = len(read_records(study / f"target_{name}.json")) * length
    forward = forward_operations(model, length)
    result = {step: float(count) * forward for step, count in counts.items()}
    metrics = study / "pre" / "metrics.jsonl"
    pre = [row["tokens"] for row in read_metrics(metrics)] if metrics.exists() else [0]
    return result | {"token": token, "pre": pre[-1] * token}


def model_dir(options: Namespace) -> Path:
    """The folder of the model."""
    return hub.resolve(options.model_name_or_path)


def read_records(path: Path, numbers: Sequence[int] | np.ndarray | None = None) -> list[Record]:
    """The rows of a file that write_records wrote, or those of these numbers."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return records if numbers is None else [records[number] for number in numbers]


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write rows as a JSON array, a row on a line."""
    write_rows((json.dumps(record, ensure_ascii=False) for record in records), path, True)
