"""Measure a GPU in one short run: each figure, its peer, their ratio, the share of the limit.

    bash bench/gpu.sh results.json                     # six minutes at most on one H100
    bash bench/gpu.sh --dry_run results.json           # tiny models on the CPU: finds mistakes
    bash bench/gpu.sh --only "decoding" --minutes 3 results.json

GPU time is scarce, so a run loses as little of it as it can:

- Every line is printed and written to the JSON file as soon as it is measured.
- Every stage is a process of its own with a time limit. A crash, a hang or a lack of memory costs
  the rest of that stage, and no other. Once the minutes are used up, later stages are skipped.
- The process of the next stage imports its libraries while the current one measures.
- Weights are random and drawn on the GPU. The peer uses the same tensors, so that they are held
  once; nothing is written to disk.

The first two lines are the limits of this device: the speed of one large matrix product, and the
bandwidth of a copy. Training and scoring are compared with the first, writing tokens with the
second. What the libraries say goes to a log beside the JSON file.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Stage:
    """A part of the run: a function of gpu_stages.py with its arguments, and a time limit.

    imports: modules that the stage's process loads while the stage before it measures.
    """

    function: str | None
    seconds: float
    imports: tuple = ()
    arguments: tuple = ()


OURS = ("bench.gpu_stages", "minisft.run", "torch._dynamo")
PEER = (*OURS, "transformers.models.llama.modeling_llama")
TRAINER = (*PEER, "transformers.trainer", "peft")
STAGES = {  # in the order of the run
    "limits": Stage("limits", 60),  # most of it the first import of torch, from a cold disk
    "tests": Stage(None, 90),
    "tinyllama lora": Stage("training", 75, TRAINER, ("tinyllama", "lora")),
    "llama3-8b lora": Stage("training", 90, TRAINER, ("llama3-8b", "lora")),
    "tinyllama full": Stage("training", 60, TRAINER, ("tinyllama", "full")),
    "decoding": Stage("decoding", 60, PEER, ("llama3-8b",)),
    "decoding compiled": Stage("compiled_decoding_of_few_layers", 75, PEER, ("llama3-8b",)),
    "scoring": Stage("scoring", 45, PEER, ("tinyllama",)),
    "k-means": Stage(None, 0),
    "decoding compiled, all layers": Stage("compiled_decoding", 90, OURS, ("llama3-8b",)),
}
# What has no GPU path, and so nothing to measure here.
ON_THE_CPU = {"k-means": "has no GPU path; bench/kmeans.py measures it on a CPU"}


def work(name, dry_run):
    """A stage's process: import, wait for the word to go, send lines as JSON to standard output."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is for the log
    stage = STAGES[name]
    for module in stage.imports:
        with contextlib.suppress(ImportError):  # a line says what is missing, when it is needed
            importlib.import_module(module)

    def say(line):
        print(json.dumps(line), file=said, flush=True)

    word = sys.stdin.readline()
    if not word:  # nobody waits for this stage any more
        return
    try:
        from bench import gpu_stages

        bench = gpu_stages.Bench(dry_run, json.loads(word))
        for line in getattr(gpu_stages, stage.function)(bench, *stage.arguments):
            say(line)
    except Exception as error:
        traceback.print_exc()  # into the log
        say(
            {
                "name": name,
                "skipped"
                if isinstance(error, ImportError)
                else "failed": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0],
            }
        )


class Results:
    """The lines so far: printed, and in the JSON file, as soon as they are there."""

    def __init__(self, path, about):
        self.path, self.began = Path(path), time.monotonic()
        self.content = {**about, "lines": []}
        self.write()

    def seconds(self):
        """Since the run began."""
        return time.monotonic() - self.began

    def add(self, line):
        """A line of the same name takes the place of the earlier one."""
        line["second"] = round(self.seconds(), 1)
        kept = [one for one in self.content["lines"] if one["name"] != line["name"]]
        self.content["lines"] = [*kept, line]
        self.write()
        print(f"{line['second']:5.0f} s  {in_words(line)}", flush=True)

    def write(self):
        """Beside the place, then renamed: whoever reads the file finds all lines so far."""
        partial = Path(f"{self.path}.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def in_words(line):
    """A line for people."""
    if "figure" not in line:
        word = "failed" if "failed" in line else "skipped"
        return f"{line['name']:<44} {word.upper()}: {line[word]}"
    words = [f"{line['name']:<44} {line['figure']:10,.1f} {line['unit']}"]
    if "peer" in line:
        words.append(f"{line['peer_name']} {line['peer']:,.1f}, ratio {line['ratio']:.2f}")
    if "share" in line:
        words.append(f"{line['share']:.1%} of the {line['limit']}")
    if "peak_gib" in line:
        peer = line.get("peer_peak_gib")
        words.append(f"peak {line['peak_gib']:.1f} GiB" + (f" (peer {peer:.1f})" if peer else ""))
    if "took" in line:
        words.append(f"took {line['took']:.0f} s")
    return " | ".join([*words, *filter(None, [line.get("note")])])


def start(name, dry_run, log):
    """The process of a stage, which imports and then waits for `finish`."""
    if name == "tests":
        words = [
            "-m",
            "pytest",
            "-v",
            "--tb=short",
            "--durations=8",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests/repository/test_cuda.py"),
        ]
    else:
        words = [str(ROOT / "bench/gpu.py"), "--stage", name, *["--dry_run"] * dry_run]
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def end(process):
    """End a stage's process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process, word, seconds):
    """Give the word to go; yield what the process says until it ends or `seconds` have passed."""
    timer = threading.Timer(seconds, end, [process])
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(word + "\n")
            process.stdin.close()
        yield from process.stdout
        process.wait()
    finally:
        timer.cancel()


def run_tests(process, seconds, log):
    """Yield the line of tests/repository/test_cuda.py: how many passed, and which did not."""
    counts, bad, began = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0), [], time.time()
    errors = []
    for text in finish(process, "", seconds):
        log.write(text)
        errors += [text[1:].strip()] * text.startswith("E  ")
        found = re.match(r"(\S+) (PASSED|FAILED|ERROR|SKIPPED)", text)
        if found:
            counts[found[2]] += 1
            bad += [found[1].rpartition("::")[2]] * (found[2] in ("FAILED", "ERROR"))
    told = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)
    line = {"name": "tests/repository/test_cuda.py", "note": told, "took": time.time() - began}
    if process.returncode == -signal.SIGKILL:
        yield {**line, "failed": f"stopped after {seconds:.0f} s: {told or 'no test ended'}"}
    elif process.returncode or bad:
        why = " | ".join([told or "did not run, see the log", *bad[:5], *errors[:3]])
        yield {**line, "failed": why}
    else:
        yield {**line, "figure": counts["PASSED"], "unit": "passed"}


def run_stage(name, process, measured, seconds):
    """Yield the lines of a stage; the last says so where it was stopped or broke down."""
    for text in finish(process, json.dumps(measured), seconds):
        yield json.loads(text)
    if process.returncode == -signal.SIGKILL:
        yield {"name": name, "failed": f"stopped after {seconds:.0f} s"}
    elif process.returncode:
        yield {"name": name, "failed": f"ended with status {process.returncode}, see the log"}


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="?", help="JSON file for the lines; a log goes beside it")
    parser.add_argument("--dry_run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="for the whole run")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages, and the limits")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.results or options.stage):
        parser.error("name a JSON file for the results")
    return options


def main():
    options = parse_options()
    if options.stage:
        work(options.stage, options.dry_run)
        return
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results(
        options.results,
        {
            "python": sys.version.split()[0],
            "date": time.strftime("%F"),
            "dry_run": options.dry_run,
            **versions(),
        },
    )
    print(
        *(f"{name} {value}" for name, value in results.content.items() if name != "lines"),
        sep=", ",
        flush=True,
    )
    names = [name for name in STAGES if not options.only or name in ("limits", *options.only)]
    measured, processes = {}, {}
    with open(f"{options.results}.log", "w", encoding="utf-8") as log:
        try:
            for name, later in zip(names, [*names[1:], None], strict=True):
                left = 60 * options.minutes - results.seconds()
                if left < 5:
                    results.add({"name": name, "skipped": "no time is left"})
                    continue
                if name in ON_THE_CPU:
                    results.add({"name": name, "skipped": ON_THE_CPU[name]})
                    continue
                for one in filter(None, (name, later)):
                    waits = one != name  # for the word to go, and imports meanwhile
                    if one not in processes and (STAGES[one].function or not waits):
                        processes[one] = start(one, options.dry_run, log)
                seconds = min(left, STAGES[name].seconds)
                lines = (
                    run_tests(processes[name], seconds, log)
                    if name == "tests"
                    else run_stage(name, processes[name], measured, seconds)
                )
                for line in lines:
                    results.add(line)
                    if "per_second" in line:
                        measured[line["name"]] = line["per_second"]
        finally:
            for process in processes.values():
                if process.poll() is None:
                    end(process)
    failed = [line["name"] for line in results.content["lines"] if "failed" in line]
    print(f"{results.seconds():5.0f} s  " + (f"FAILED: {'; '.join(failed)}" if failed else "done"))
    sys.exit(bool(failed))


def versions():
    """{package: version} of what is compared, without importing it."""
    found = {}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    main()
