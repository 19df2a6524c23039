"""Which rows should one train on? Strategies against random rows, on a real model and real data.

    python bench/selection.py --data_dir DATA --runs 0                      # only the estimate
    python bench/selection.py --data_dir DATA --jobs 2                      # run what is missing
    python bench/selection.py --data_dir DATA --budgets 300 --minutes 120   # no new run after that
    python bench/selection.py --report --write_docs      # tables and figure; docs/selection.md too

SmolLM2-135M-Instruct learns, by LoRA, rows that a strategy has chosen from a pool in which 15 % of
the rows are bad (selection_pool.py lists the sources). Measured are the loss on held-out rows of
every source, and the right answers to 200 prompts that a program checks (selection_checks.py). Each
run, a strategy, a budget and a seed, is a line of results.jsonl in --output_dir. An interrupted
command continues there; tables and figure come from the lines that exist.

With a budget of rows all strategies take the same number of steps; with one of answer tokens
(300t), the same number of epochs.
"""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from bench.selection_options import SAME_STEPS, Budget, parse_options  # noqa: E402
from minisft.common.script import run_script  # noqa: E402

if __name__ == "__main__":
    # Before the heavy modules, so that --help and a mistyped flag answer at once.
    command_line = run_script(parse_options)
else:
    command_line = None

import torch  # noqa: E402
from real import unpack_model  # noqa: E402

from bench.selection_checks import KINDS, MAX_NEW_TOKENS  # noqa: E402
from bench.selection_pool import SOURCES, check_files  # noqa: E402
from bench.selection_report import write_report  # noqa: E402
from bench.selection_run import (  # noqa: E402
    BATCH_SIZE,
    Result,
    Run,
    operations,
    prepare,
    read_records,
    run_one,
)
from minisft.common.devices import dtype_name, resolve_device, resolve_dtype  # noqa: E402
from minisft.common.errors import UserError  # noqa: E402
from minisft.common.hashes import sha256  # noqa: E402
from minisft.common.json_files import read_json, write_json  # noqa: E402
from minisft.common.metric_lines import read_metrics  # noqa: E402
from minisft.common.outputs import atomic_write  # noqa: E402
from minisft.common.words import duration  # noqa: E402

# For the estimate before the first run. Tokens a second of one core in bfloat16: of training, of
# forward passes, and of answers; mean tokens of a row; rows of the pool.
TRAINED, READ, ANSWERED, MEAN_TOKENS, NUM_ROWS = 250, 800, 65, 265, 5500
RANDOM_SEEDS = 5  # every other strategy is compared with random
# The settings that all runs share.
SHARED = """model_name_or_path template cutoff_len held_out per_kind epochs lora_rank learning_rate
    dtype clusters pre_rows max_rows""".split()


def main(options: Namespace | None = None) -> None:
    """Prepare, run what is missing, report."""
    options = options or parse_options()
    folder = Path(options.output_dir)
    runs, results = wanted_runs(options), read_metrics(folder / "results.jsonl")
    if not options.report:
        check_files(Path(options.data_dir))
        missing = missing_runs(runs, results)
        seconds = estimate(options, missing, results)
        print(f"{len(runs)} runs, {len(missing)} to do: about {duration(seconds)}", flush=True)
        if options.runs == 0:
            return
        if missing:
            run_missing(options, folder, missing[: options.runs], results)
    wanted = [(run.strategy, run.budget, run.seed) for run in runs]
    write_report(folder, wanted, options.write_docs)


def run_missing(
    options: Namespace, folder: Path, missing: Sequence[Run], results: Sequence[Result]
) -> None:
    """Run these and add their lines to the results."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(options, folder)
    options.model_name_or_path = options.model_name_or_path or str(unpack_model())
    # Without a line that a crash has left incomplete.
    with atomic_write(folder / "results.jsonl") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    prepare(options, folder)
    settings = read_json(folder / "settings.json")
    pool_rows = len(read_records(folder / "pool.json"))
    write_json({**settings, "pool_rows": pool_rows}, folder / "settings.json")
    write_json(operations(options), folder / "operations.json")
    end = began + 60 * options.minutes if options.minutes else None
    for result in run_all(options, missing, end):
        with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        took = duration(sum(result["seconds"].values()))
        print(f"{result['strategy']} {result['budget']} seed {result['seed']}: {took}")


def wanted_runs(options: Namespace) -> list[Run]:
    """All runs of the study. Each budget is a result by itself, and so is each seed within it."""
    runs = [Run("base", "none", 0)]
    for budget in [*options.budgets, "all"]:
        of_budget = []
        for name in options.strategies:
            num_seeds = options.seeds
            if name == "random" and not options.smoke:
                num_seeds = max(num_seeds, RANDOM_SEEDS)
            if (name == "all") != (budget == "all") or (
                name in SAME_STEPS and budget.endswith("t")
            ):
                continue
            of_budget += [Run(name, budget, seed) for seed in range(num_seeds)]
        runs += sorted(of_budget, key=lambda run: run.seed)
    return runs


def missing_runs(runs: Sequence[Run], results: Sequence[Result]) -> list[Run]:
    """The runs without a result."""
    done = {(result["strategy"], result["budget"], result["seed"]) for result in results}
    return [run for run in runs if (run.strategy, run.budget, run.seed) not in done]


def estimate(options: Namespace, missing: Sequence[Run], results: Sequence[Result]) -> float:
    """Seconds that the missing runs take: at the speed of the runs so far, else of EPYC cores."""
    cores = 1 if torch.cuda.is_available() else torch.get_num_threads()
    num_tokens = MEAN_TOKENS * sum(rows_seen(options, run) for run in missing)
    timed = [result for result in results if result["trained_tokens"]]
    if timed:
        training = sum(result["seconds"]["train"] for result in timed)
        speed = sum(result["trained_tokens"] for result in timed) / training
        measuring = sum(result["seconds"]["measure"] for result in timed) / len(timed)
        return (num_tokens / speed + len(missing) * measuring) / cores
    losses = len(SOURCES) * options.held_out * MEAN_TOKENS / READ
    answers = len(KINDS) * options.per_kind * MAX_NEW_TOKENS / ANSWERED
    preparing = 4.5 * pool_size(options) * MEAN_TOKENS / READ  # IFD twice, embeddings twice
    return (num_tokens / TRAINED + len(missing) * (losses + answers) + preparing) / cores


def pool_size(options: Namespace) -> int:
    """About how many rows the pool has."""
    return min(NUM_ROWS, len(SOURCES) * (options.max_rows or NUM_ROWS))


def rows_seen(options: Namespace, run: Run) -> int:
    """About how many rows a run trains on, repetitions included."""
    if run.strategy == "base":
        return 0
    if run.strategy == "all":
        return pool_size(options)
    return options.epochs * Budget.parse(run.budget).num_rows


def check_settings(options: Namespace, folder: Path) -> None:
    """Record the settings that all runs share. UserError if the folder has runs with others."""
    settings = {name: getattr(options, name) for name in SHARED}
    # "auto" may mean another type on another machine.
    settings["dtype"] = dtype_name(resolve_dtype(options.dtype, resolve_device("auto")))
    settings |= {"batch_size": BATCH_SIZE, "max_new_tokens": MAX_NEW_TOKENS}
    settings["files"] = [
        sha256(path)
        for source in SOURCES.values()
        if (path := Path(options.data_dir) / source.file_name).is_file()
    ]
    path = folder / "settings.json"
    recorded = read_json(path, missing=settings)
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise UserError(
                f"--output_dir {folder} has runs with {name} {recorded.get(name)}, not {value}. "
                "Give another folder, or the same setting."
            )
    write_json({**recorded, **settings}, path)


def run_all(options: Namespace, missing: Sequence[Run], end: float | None) -> Iterator[Result]:
    """The results of the runs, --jobs at a time; no run begins after the time `end`."""
    waiting = iter(missing)

    def next_run() -> Run | None:
        is_over = end is not None and time.monotonic() > end
        return None if is_over else next(waiting, None)

    if options.jobs == 1:
        while run := next_run():
            yield run_one(options, run)
        return
    num_threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), torch.set_num_threads, (num_threads,)
    ) as pool:
        running, failed = set[Future[Result]](), None
        while True:
            while not failed and len(running) < options.jobs and (run := next_run()):
                running.add(pool.submit(run_one, options, run))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                if job.exception():
                    failed = job
                else:
                    yield job.result()
        if failed:  # after the results of the others
            failed.result()


if __name__ == "__main__":
    run_script(lambda: main(command_line))
