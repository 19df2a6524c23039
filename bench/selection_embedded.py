"""What does selection gain? The recipe against all rows and against controls, over several seeds.

    python bench/selection_embedded.py --jobs 2         # everything; hours on two cores
    python bench/selection_embedded.py --methods recipe random --rates 0.05 --seeds 0
    python bench/selection_embedded.py --write_docs     # only the table and the picture

A cell is a method, a share of the rows and a seed: choose the rows, train the base model of
examples/ on them as in examples/demo.toml, answer the held-out questions. Its result is appended to
results.jsonl in the output folder, so an interrupted command continues where it stopped.

The data has rows that are known to be bad. The benchmark counts their share of the chosen rows;
training never sees the mark. A selection is trained for the epochs of the recipe, and for at least
--min_steps optimizer steps: 5 % of the rows would be only fifty steps. `all, same steps` trains all
rows for that many steps, the same amount of computation.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from bench.measure import flags, output_of  # noqa: E402
from bench.selection_embedded_report import (  # noqa: E402
    ALL_ROWS,
    DOCS,
    METHODS,
    Result,
    draw,
    summarize,
    table,
    write_docs,
)
from minisft.common.hashes import sha256  # noqa: E402
from minisft.data.dataset import load_rows  # noqa: E402
from minisft.generation.assistant import Assistant  # noqa: E402
from minisft.generation.sampling import Sampling  # noqa: E402

BASE, DATA = ROOT / "examples/base", ROOT / "examples/data"
RECIPE = ROOT / "examples/demo.toml"
TEMPLATE, BATCH_SIZE = "plain", 16


def call(script: str, *words: object, log: Path) -> None:
    """Run a script; its output goes to the file `log`."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{script} failed; see {log}")


class Cells:
    """Runs cells in a folder. Files that exist are not made again."""

    def __init__(self, options: Namespace):
        self.options, self.folder = options, Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train_file = DATA / "train.json"

    def prepare(self, seed: int) -> None:
        """For a seed: embeddings and scores of the base, pre-experience, scores after it."""
        before, adapter = self.folder / "before.jsonl", self.folder / f"pre-{seed}"
        log, chosen = self.folder / f"prepare-{seed}.log", adapter.with_suffix(".json")
        shared = flags(
            model_name_or_path=BASE, template=TEMPLATE, dtype="float32", dataset=self.train_file
        )
        score = partial(call, "score.py", *shared, log=log)
        score("--mode", "all", "--output", before)
        if not (adapter / "adapter_model.safetensors").exists():
            words = flags(
                embeddings=before.with_name("before.embeddings.npy"),
                clusters=self.options.clusters,
                per_cluster=self.options.per_cluster,
            )
            self.select("cluster", chosen, seed, log, *words)
            # Small batches, so that an epoch of a few hundred rows has more than a few steps.
            words = flags(num_train_epochs=1, per_device_train_batch_size=8)
            self.train(chosen, adapter, seed, log, *words)
        score("--adapter", adapter, "--output", self.folder / f"scores-{seed}.jsonl")
        for rate in self.options.rates:  # two methods need it, perhaps at the same time
            self.chosen_file("recipe", rate, seed, log)

    def select(self, strategy: str, output: Path, seed: int, log: Path, *more: object) -> None:
        """Choose rows with select.py, unless the output exists."""
        if not Path(f"{output}.manifest").exists():
            words = flags(
                dataset=self.train_file,
                strategy=strategy,
                seed=seed,
                output=output,
                overwrite=True,
            )
            call("select.py", *words, *more, log=log)

    def train(self, dataset: Path, output_dir: Path, seed: int, log: Path, *more: object) -> None:
        """Train an adapter with the recipe."""
        words = flags(
            config=RECIPE,
            dataset=dataset,
            seed=seed,
            output_dir=output_dir,
            overwrite_output_dir=True,
        )
        call("train.py", *words, *more, log=log)

    def chosen_file(self, method: str, rate: float, seed: int, log: Path) -> Path:
        """The file of the rows that a cell trains on."""
        if method in ALL_ROWS:
            return self.train_file
        output = self.folder / f"{method}-{rate}-{seed}.json"
        size = flags(sample_rate=rate)
        after = flags(scores=self.folder / f"scores-{seed}.jsonl")
        before = flags(scores=self.folder / "before.jsonl")
        if method == "recipe":
            self.select("ifd", output, seed, log, *after, *size)
        elif method == "random_matched":
            match = flags(match=self.chosen_file("recipe", rate, seed, log))
            self.select("random_matched", output, seed, log, *after, *match)
        elif method == "random":
            self.select(method, output, seed, log, *size)
        else:
            self.select(method, output, seed, log, *before, *size)
        return output

    def run(self, method: str, rate: float, seed: int) -> Result:
        """Choose, train and evaluate one cell."""
        began = time.monotonic()
        name = f"{method}-{rate}-{seed}"
        log, adapter = self.folder / f"{name}.log", self.folder / f"{name}-model"
        dataset = self.chosen_file(method, rate, seed, log)
        rows = json.loads(dataset.read_text(encoding="utf-8"))
        steps = self.options.min_steps
        if method != "all_same_steps":
            steps = max(steps, self.options.epochs * math.ceil(len(rows) / BATCH_SIZE))
        words = flags(
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            dataloader_num_workers=0,
            save_steps=10**6,
        )
        self.train(dataset, adapter, seed, log, *words)
        answer = json.loads(output_of(__file__, "--evaluate", adapter))
        return {
            "method": method,
            "rate": rate,
            "seed": seed,
            "num_rows": len(rows),
            "steps": steps,
            "exact_match": answer["exact_match"],
            "bad_share": sum(row["quality"] != "good" for row in rows) / len(rows),
            "mean_answer_characters": statistics.mean(len(row["output"]) for row in rows),
            "seconds": round(time.monotonic() - began, 1),
        }


def evaluate(adapter: str) -> None:
    """Print the share of held-out questions that an adapter answers exactly."""
    held_out = load_rows(DATA / "heldout.json")
    assistant = Assistant(BASE, adapter=adapter, template=TEMPLATE)
    questions = [{"messages": row.messages[:-1]} for row in held_out]
    sampling = Sampling(max_new_tokens=48, greedy=True)
    answers, _ = assistant.inference(questions, sampling, batch_size=64)
    right = sum(
        answer.strip() == row.messages[-1]["content"]
        for answer, row in zip(answers, held_out, strict=True)
    )
    print(json.dumps({"exact_match": right / len(held_out), "questions": len(held_out)}))


def identity(options: Namespace) -> dict[str, Any]:
    """The settings that all results of a table must share."""
    files = [BASE / "model.safetensors", DATA / "train.json", DATA / "heldout.json", RECIPE]
    return {
        "files": [sha256(path) for path in files],
        "min_steps": options.min_steps,
        "epochs": options.epochs,
        "clusters": options.clusters,
        "per_cluster": options.per_cluster,
    }


def read_results(path: Path, record: dict[str, Any]) -> list[Result]:
    """The results so far. Exits if they belong to another base, data set or setting."""
    if not path.exists():
        path.write_text(json.dumps(record) + "\n")
    first, *results = map(json.loads, path.read_text().splitlines())
    if first != record:
        sys.exit(
            f"{path} has results of another base, data set, recipe or setting. Give another "
            "--output_dir."
        )
    return results


def run_missing(options: Namespace, path: Path, results: list[Result]) -> None:
    """Run the cells without a result, --jobs at a time, and append each result."""
    cells = Cells(options)
    done = {(result["method"], result["rate"], result["seed"]) for result in results}
    wanted = [
        (method, 1.0 if method in ALL_ROWS else rate, seed)
        for seed in options.seeds
        for method in options.methods
        for rate in (options.rates[:1] if method in ALL_ROWS else options.rates)
    ]
    missing = [cell for cell in wanted if cell not in done]
    print(f"{len(wanted)} cells, {len(missing)} to do", flush=True)
    for seed in sorted({seed for method, _, seed in missing if method not in ALL_ROWS}):
        cells.prepare(seed)
    with ThreadPoolExecutor(options.jobs) as pool:
        for job in as_completed([pool.submit(cells.run, *cell) for cell in missing]):
            result = job.result()
            with open(path, "a") as file:
                file.write(json.dumps(result) + "\n")
            results.append(result)
            print(
                "{method:15} {rate:5.0%} seed {seed}: {num_rows:5,} rows, {steps:5,} steps, "
                "exact match {exact_match:6.1%}, bad {bad_share:5.1%}, {seconds:,.0f} s".format(
                    **result
                ),
                flush=True,
            )


def main() -> None:
    """Run the missing cells, then write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=6, help="epochs, as in examples/demo.toml")
    parser.add_argument("--min_steps", type=int, default=240, help="minimum of optimizer steps")
    parser.add_argument("--clusters", type=int, default=30, help="clusters of the pre-experience")
    parser.add_argument("--per_cluster", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at the same time")
    parser.add_argument("--output_dir", default=str(ROOT / "runs/selection"))
    parser.add_argument(
        "--write_docs",
        action="store_true",
        help="run nothing; write the table and the picture of docs/selection.md",
    )
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.evaluate:
        evaluate(options.evaluate)
        return

    path = Path(options.output_dir) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(path, identity(options))
    if not options.write_docs:
        run_missing(options, path, results)
    if not results:
        sys.exit(f"{path}: there are no results yet")
    summaries = summarize(results)
    draw(
        summaries, DOCS / "selection.png" if options.write_docs else path.with_name("selection.png")
    )
    if options.write_docs:
        write_docs(table(summaries))
    print(table(summaries))


if __name__ == "__main__":
    main()
