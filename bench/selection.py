"""What selection buys: the recipe against all rows and against the controls, over several seeds.

    python bench/selection.py --jobs 2                       # everything; hours on two cores
    python bench/selection.py --methods recipe random --rates 0.05 --seeds 0      # a few cells
    python bench/selection.py --write_docs                   # only the table and the picture

A cell is a method, a share of the rows and a seed: choose the rows, train the embedded base on them
as examples/demo.toml says, answer the held-out questions. Each is appended to results.jsonl in the
output folder when it is done, so that the command goes on where it was stopped.

The data has rows that are known to be bad; the share of them among the chosen is counted. Training
never sees that mark. A selection is trained for so many epochs as the recipe of the demo says, but
never for less than --min_steps optimizer steps, since 5 % of the rows would else be fifty steps;
`all, same steps` is all rows for that many steps: the same budget of computation.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
BASE, DATA = ROOT / "examples/base", ROOT / "examples/data"
RECIPE, DOCS = ROOT / "examples/demo.toml", ROOT / "docs"
TEMPLATE, BATCH = "plain", 16
METHODS = {
    "recipe": "ifd after pre-experience",
    "ifd": "ifd without pre-experience",
    "longest": "the longest answers",
    "random": "random",
    "random_matched": "random, lengths of the recipe",
    "all": "all rows",
    "all_same_steps": "all rows, same steps",
}
WHOLE = ("all", "all_same_steps")
BEGIN, END = "<!-- begin: bench/selection.py --write_docs -->", "<!-- end -->"


def call(script, *words, log):
    """Run one of the scripts; what it says goes to the file `log`."""
    words = [sys.executable, str(ROOT / script), *map(str, words)]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{script} failed; see {log}")


class Cells:
    """The cells and what they are made from, in a folder; what is there is not made again."""

    def __init__(self, options):
        self.options, self.folder = options, Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train_file = DATA / "train.json"
        self.rows = json.loads(self.train_file.read_text(encoding="utf-8"))

    def prepare(self, seed):
        """Embeddings and scores before training, pre-experience of this seed, scores after it."""
        before, pre = self.folder / "before.jsonl", self.folder / f"pre-{seed}"
        log = self.folder / f"prepare-{seed}.log"
        about = ["--model_name_or_path", BASE, "--template", TEMPLATE, "--dtype", "float32"]
        score = partial(call, "score.py", *about, "--dataset", self.train_file, log=log)
        score("--mode", "all", "--output", before)
        if not (pre / "adapter_model.safetensors").exists():
            self.select(
                "cluster",
                pre.with_suffix(".json"),
                seed,
                log,
                "--embeddings",
                before.with_name("before.embeddings.npy"),
                "--clusters",
                self.options.clusters,
                "--per_cluster",
                self.options.per_cluster,
            )
            # Small batches, so that one epoch of a few hundred rows is more than a few steps.
            call(
                "train.py",
                "--config",
                RECIPE,
                "--dataset",
                pre.with_suffix(".json"),
                "--seed",
                seed,
                "--num_train_epochs",
                1,
                "--per_device_train_batch_size",
                8,
                "--output_dir",
                pre,
                "--overwrite_output_dir",
                log=log,
            )
        score("--adapter", pre, "--output", self.folder / f"scores-{seed}.jsonl")
        for rate in self.options.rates:  # which two methods need, maybe at the same time
            self.chosen("recipe", rate, seed, log)

    def select(self, strategy, output, seed, log, *more):
        """Choose rows with select.py, unless that has been done."""
        if not Path(f"{output}.manifest").exists():
            call(
                "select.py",
                "--dataset",
                self.train_file,
                "--strategy",
                strategy,
                "--seed",
                seed,
                "--output",
                output,
                "--overwrite",
                *more,
                log=log,
            )

    def chosen(self, method, rate, seed, log):
        """The file of the rows that a cell trains on."""
        if method in WHOLE:
            return self.train_file
        output = self.folder / f"{method}-{rate}-{seed}.json"
        size = ["--sample_rate", rate]
        after = ["--scores", self.folder / f"scores-{seed}.jsonl"]
        before = ["--scores", self.folder / "before.jsonl"]
        if method == "recipe":
            self.select("ifd", output, seed, log, *after, *size)
        elif method == "random_matched":
            self.select(
                "random_matched",
                output,
                seed,
                log,
                *after,
                "--match",
                self.chosen("recipe", rate, seed, log),
            )
        elif method == "random":
            self.select(method, output, seed, log, *size)
        else:
            self.select(method, output, seed, log, *before, *size)
        return output

    def run(self, method, rate, seed):
        """One cell -> its result, a dict."""
        began = time.monotonic()
        name = f"{method}-{rate}-{seed}"
        log, model = self.folder / f"{name}.log", self.folder / f"{name}-model"
        data = self.chosen(method, rate, seed, log)
        rows = json.loads(data.read_text(encoding="utf-8"))
        per_epoch = math.ceil(len(rows) / BATCH)
        steps = max(self.options.min_steps, self.options.epochs * per_epoch)
        if method == "all_same_steps":
            steps = self.options.min_steps
        call(
            "train.py",
            "--config",
            RECIPE,
            "--dataset",
            data,
            "--seed",
            seed,
            "--max_steps",
            steps,
            "--per_device_train_batch_size",
            BATCH,
            "--dataloader_num_workers",
            0,
            "--save_steps",
            10**6,
            "--output_dir",
            model,
            "--overwrite_output_dir",
            log=log,
        )
        answer = subprocess.run(
            [sys.executable, __file__, "--evaluate", model],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        bad = sum(row["quality"] != "good" for row in rows) / len(rows)
        length = statistics.mean(len(row["output"]) for row in rows)
        return {
            "method": method,
            "rate": rate,
            "seed": seed,
            "num_rows": len(rows),
            "steps": steps,
            "exact_match": json.loads(answer)["exact_match"],
            "bad_share": bad,
            "mean_answer_characters": length,
            "seconds": round(time.monotonic() - began, 1),
        }


def evaluate(model):
    """Print the share of held-out questions that an adapter answers exactly."""
    from demo import exact_match

    from minisft.data.dataset import load_rows
    from minisft.generation.assistant import Assistant

    held_out = load_rows(DATA / "heldout.json")
    share, _ = exact_match(Assistant(BASE, adapter=model, template=TEMPLATE), held_out)
    print(json.dumps({"exact_match": share, "questions": len(held_out)}))


def identity(options):
    """What results have in common that may stand in one table."""
    from minisft.selection.provenance import sha256

    files = [BASE / "model.safetensors", DATA / "train.json", DATA / "heldout.json", RECIPE]
    return {
        "files": [sha256(path) for path in files],
        "min_steps": options.min_steps,
        "epochs": options.epochs,
        "clusters": options.clusters,
        "per_cluster": options.per_cluster,
    }


def read_results(path, record):
    """The results so far; ends the program where they are of another base, data or setting."""
    if not path.exists():
        path.write_text(json.dumps(record) + "\n")
    first, *results = map(json.loads, path.read_text().splitlines())
    if first != record:
        sys.exit(
            f"{path}: has results of another base, data set, recipe or setting; give another "
            "--output_dir"
        )
    return results


def run_missing(options, path, results):
    """Run the cells that are wanted and not there, --jobs at a time; append each as it ends."""
    cells = Cells(options)
    done = {(one["method"], one["rate"], one["seed"]) for one in results}
    wanted = [
        (method, 1.0 if method in WHOLE else rate, seed)
        for seed in options.seeds
        for method in options.methods
        for rate in (options.rates[:1] if method in WHOLE else options.rates)
    ]
    missing = [one for one in wanted if one not in done]
    print(f"{len(wanted)} cells, {len(missing)} to do", flush=True)
    for seed in sorted({seed for method, _, seed in missing if method not in WHOLE}):
        cells.prepare(seed)
    with ThreadPoolExecutor(options.jobs) as pool:
        for job in as_completed([pool.submit(cells.run, *one) for one in missing]):
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


def summary(results):
    """[(method, rate, mean exact match, half of its 95 % interval, mean bad share, runs, ...)]

    The interval is that of the mean over seeds, by Student's t; None for a single run.
    """
    from scipy.stats import t

    lines = []
    for method in METHODS:
        for rate in sorted({one["rate"] for one in results if one["method"] == method}):
            runs = [one for one in results if (one["method"], one["rate"]) == (method, rate)]
            values, half = [one["exact_match"] for one in runs], None
            if len(runs) > 1:
                half = t.ppf(0.975, len(runs) - 1) * statistics.stdev(values) / len(runs) ** 0.5
            means = [
                statistics.mean(one[name] for one in runs)
                for name in ("exact_match", "bad_share", "mean_answer_characters")
            ]
            lines.append(
                (
                    method,
                    rate,
                    means[0],
                    half,
                    *means[1:],
                    runs[0]["num_rows"],
                    runs[0]["steps"],
                    len(runs),
                )
            )
    return lines


def table(lines):
    """The summary as a Markdown table."""
    rows = [
        "| rows trained on | share | rows | steps | exact match | bad rows let through | "
        "characters of an answer | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, rate, mean, half, bad, length, num_rows, steps, runs in lines:
        around = f" ± {half:.1%}" if half is not None else ""
        rows.append(
            f"| {METHODS[method]} | {rate:.0%} | {num_rows:,} | {steps:,} | "
            f"{mean:.1%}{around} | {bad:.1%} | {length:.1f} | {runs} |"
        )
    return "\n".join(rows)


def draw(lines, path):
    """Exact match over the share of rows, a line for each method, with its intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="share of the rows trained on", ylabel="exact match")
    for number, method in enumerate(METHODS):
        own = [line for line in lines if line[0] == method]
        if own and method in WHOLE:
            style = "--" if method == "all" else ":"
            axes.axhline(own[0][2], linestyle=style, color="black", label=METHODS[method])
        elif own:
            # A little apart, so that intervals do not hide each other.
            shares = [rate * (1 + 0.03 * (number - 2)) for _, rate, *_ in own]
            axes.errorbar(
                shares,
                [line[2] for line in own],
                [line[3] or 0 for line in own],
                marker="o",
                capsize=3,
                label=METHODS[method],
            )
    axes.set_xticks(sorted({rate for method, rate, *_ in lines if method not in WHOLE}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)


def write_docs(text):
    """Put the table and the picture between the marks in docs/selection.md."""
    page = DOCS / "selection.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(
        f"{before}{BEGIN}\n\n{text}\n\n![exact match](selection.png)\n\n{END}{after}",
        encoding="utf-8",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=6, help="as examples/demo.toml")
    parser.add_argument("--min_steps", type=int, default=240, help="of training, for small shares")
    parser.add_argument("--clusters", type=int, default=30, help="of the pre-experience")
    parser.add_argument("--per_cluster", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at the same time")
    parser.add_argument("--output_dir", default=str(ROOT / "runs/selection"))
    parser.add_argument(
        "--write_docs",
        action="store_true",
        help="run nothing; write table and picture into docs/selection.md",
    )
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.evaluate:
        return evaluate(options.evaluate)

    path = Path(options.output_dir) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(path, identity(options))
    if not options.write_docs:
        run_missing(options, path, results)
    if not results:
        sys.exit(f"{path}: there are no results yet")
    lines = summary(results)
    draw(lines, DOCS / "selection.png" if options.write_docs else path.with_name("selection.png"))
    if options.write_docs:
        write_docs(table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
