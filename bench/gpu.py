"""Measure a GPU in one short run: each figure beside the peer's and the limit of the device.

    bash bench/gpu.sh results.json                     # six minutes at most on one H100
    bash bench/gpu.sh --dry_run results.json           # tiny models on the CPU: finds mistakes
    bash bench/gpu.sh --only "decoding" --minutes 3 results.json

GPU time is scarce, so a run wastes as little of it as possible:

- Every line is printed and written to the JSON file as soon as it is measured.
- Every stage is a process with a time limit. A crash, a hang or a lack of memory ends only that
  stage. When the minutes are used up, the remaining stages are skipped.
- The process of the next stage imports its libraries while the current stage measures.
- Weights are random, drawn on the GPU and shared with the peer. They are not written to disk.

The first two lines are the limits of the device: the speed of a large matrix product, and the
bandwidth of a copy. Training and scoring are compared with the first, decoding with the second. The
output of the libraries goes to a log beside the JSON file.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import ROOT, reason_of  # noqa: E402
from bench.results import PACKAGES, Line  # noqa: E402

StageProcess = subprocess.Popen[str]


@dataclass
class Stage:
    """A part of the run: a function of gpu_stages.py with its arguments, and a time limit.

    function: "" for a stage that is not in gpu_stages.py. imports: modules that the process of the
    stage loads while the stage before it measures.
    """

    function: str
    seconds: float
    imports: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


OURS = ("bench.gpu_stages", "minisft.training.run", "torch._dynamo")
PEER = (*OURS, "transformers.models.llama.modeling_llama")
TRAINER = (*PEER, "transformers.trainer", "peft")
STAGES = {  # in the order of the run
    "limits": Stage("limits", 60),  # most of the time: the first import of torch, from a cold disk
    "tinyllama lora": Stage("training", 75, TRAINER, ("tinyllama", "lora")),
    "llama3-8b lora": Stage("training", 90, TRAINER, ("llama3-8b", "lora")),
    "tinyllama full": Stage("training", 60, TRAINER, ("tinyllama", "full")),
    "decoding": Stage("decoding", 60, PEER, ("llama3-8b",)),
    "decoding compiled": Stage("compiled_decoding_of_few_layers", 75, PEER, ("llama3-8b",)),
    "scoring": Stage("scoring", 60, PEER, ("tinyllama",)),
    "scoring 8b": Stage("scoring", 60, PEER, ("llama3-8b",)),
    "llama3-8b full": Stage("low_memory_training", 60, OURS, ("llama3-8b",)),
    "tests": Stage("", 90),
    "k-means": Stage("", 0),
    "decoding compiled, all layers": Stage("compiled_decoding", 90, OURS, ("llama3-8b",)),
}
# Stages that have no GPU path -> the note for their line.
CPU_ONLY = {"k-means": "has no GPU path; bench/kmeans.py measures it on a CPU"}
REQUIRED = ("gguf", "jinja2", "safetensors", "sentencepiece", "tokenizers", "tqdm")
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def run_in_own_process(name: str, dry_run: bool) -> None:
    """The process of a stage: import, wait for a line of input, print the lines as JSON."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    stage = STAGES[name]
    for module in stage.imports:
        with contextlib.suppress(ImportError):  # reported in a line when the module is needed
            importlib.import_module(module)
    measured = sys.stdin.readline()
    if not measured:  # the run has ended
        return
    try:
        # A failure to import them is reported as well.
        from bench import gpu_lines, gpu_stages

        bench = gpu_lines.Bench(dry_run, json.loads(measured))
        for line in getattr(gpu_stages, stage.function)(bench, *stage.arguments):
            print(json.dumps(line), file=output, flush=True)
    except Exception as error:
        traceback.print_exc()  # goes to the log
        outcome = "skipped" if isinstance(error, ImportError) else "failed"
        print(json.dumps({"name": name, outcome: reason_of(error)}), file=output, flush=True)


class Results:
    """The lines so far, which are printed and written to a JSON file at once."""

    def __init__(self, path: str | Path, about: dict[str, Any]):
        self.path, self.began = Path(path), time.monotonic()
        self.about = about
        self.lines: list[Line] = []
        self.write()

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def add(self, line: Line) -> None:
        """Add a line, or replace the line of the same name."""
        line["second"] = round(self.seconds(), 1)
        self.lines = [*(other for other in self.lines if other["name"] != line["name"]), line]
        self.write()
        print(f"{line['second']:5.0f} s  {in_words(line)}", flush=True)

    def write(self) -> None:
        """Write the file. A rename replaces the old file, so a reader always finds all lines."""
        partial = Path(f"{self.path}.partial")
        content = {**self.about, "lines": self.lines}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def in_words(line: Line) -> str:
    """A line for the terminal."""
    if "figure" not in line:
        outcome = "failed" if "failed" in line else "skipped"
        return f"{line['name']:<44} {outcome.upper()}: {line[outcome]}"
    words = [f"{line['name']:<44} {line['figure']:10,.1f} {line['unit']}"]
    if "peer" in line:
        words.append(f"{line['peer_name']} {line['peer']:,.1f}, ratio {line['ratio']:.2f}")
    if "share" in line:
        words.append(f"{line['share']:.1%} of the {line['limit']}")
    if "share_of_peak" in line:
        words.append(f"{line['share_of_peak']:.1%} of the peak by {line['counted']}")
    if "peak_gib" in line:
        peer = line.get("peer_peak_gib")
        words.append(f"peak {line['peak_gib']:.1f} GiB" + (f" (peer {peer:.1f})" if peer else ""))
    if line.get("waits") is not None:
        words.append(f"{line['waits']} waits in a step")
    if "minutes_of_alpaca" in line:
        words.append(f"52,000 rows in {line['minutes_of_alpaca']:.1f} min")
    if "took" in line:
        words.append(f"took {line['took']:.0f} s")
    return " | ".join([*words, *filter(None, [line.get("note")])])


def start(name: str, dry_run: bool, log: IO[str]) -> StageProcess:
    """Start the process of a stage, which imports its modules and then waits for `finish`."""
    if name == "tests":
        words = "-m pytest -v --tb=short --durations=8 -p no:cacheprovider".split()
        words.append("tests/repository/test_cuda.py")
    else:
        words = ["bench/gpu.py", "--stage", name, *["--dry_run"] * dry_run]
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


def kill(process: StageProcess) -> None:
    """Kill the process of a stage and its descendants."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: StageProcess, word: str, seconds: float) -> Iterator[str]:
    """Let a stage measure: send it a line of input and yield its output. Kill it in time."""
    assert process.stdin and process.stdout
    timer = threading.Timer(seconds, kill, [process])
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(word + "\n")
            process.stdin.close()
        yield from process.stdout
        process.wait()
    finally:
        timer.cancel()


def run_tests(process: StageProcess, seconds: float, log: IO[str]) -> Iterator[Line]:
    """Yield the line of tests/repository/test_cuda.py: how many passed, and which failed."""
    counts, failed_tests, errors = dict.fromkeys(OUTCOMES, 0), [], []
    began = time.time()
    for text in finish(process, "", seconds):
        log.write(text)
        if text.startswith("E  "):
            errors.append(text[1:].strip())
        if match := re.match(rf"(\S+) ({'|'.join(OUTCOMES)})", text):
            test, outcome = match.groups()
            counts[outcome] += 1
            if outcome in ("FAILED", "ERROR"):
                failed_tests.append(test.rpartition("::")[2])
    summary = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items() if count)
    line: Line = {
        "name": "tests/repository/test_cuda.py",
        "note": summary,
        "took": time.time() - began,
    }
    if process.returncode == -signal.SIGKILL:
        yield {**line, "failed": f"stopped after {seconds:.0f} s: {summary or 'no test ended'}"}
    elif process.returncode or failed_tests:
        reasons = [summary or "did not run, see the log", *failed_tests[:5], *errors[:3]]
        yield {**line, "failed": " | ".join(reasons)}
    else:
        yield {**line, "figure": counts["PASSED"], "unit": "passed"}


def run_stage(
    name: str, process: StageProcess, measured: dict[str, float], seconds: float
) -> Iterator[Line]:
    """Yield the lines of a stage; if it is stopped or crashes, a last line says so."""
    for text in finish(process, json.dumps(measured), seconds):
        yield json.loads(text)
    if process.returncode == -signal.SIGKILL:
        yield {"name": name, "failed": f"stopped after {seconds:.0f} s"}
    elif process.returncode:
        yield {"name": name, "failed": f"ended with status {process.returncode}, see the log"}


def run_stages(options: Namespace, results: Results, log: IO[str]) -> None:
    """Run the stages in order, and start the process of each while the stage before it runs."""
    names = [name for name in STAGES if not options.only or name in ("limits", *options.only)]
    measured: dict[str, float] = {}
    running: dict[str, StageProcess] = {}
    try:
        for name, next_name in zip(names, [*names[1:], None], strict=True):
            time_left = 60 * options.minutes - results.seconds()
            if time_left < 5:
                results.add({"name": name, "skipped": "no time is left"})
                continue
            if name in CPU_ONLY:
                results.add({"name": name, "skipped": CPU_ONLY[name]})
                continue
            if name not in running:
                running[name] = start(name, options.dry_run, log)
            # The tests would not wait, so they do not start early.
            if next_name and next_name not in running and STAGES[next_name].function:
                running[next_name] = start(next_name, options.dry_run, log)
            seconds = min(time_left, STAGES[name].seconds)
            print(f"{results.seconds():5.0f} s  {name}: at most {seconds:.0f} s", flush=True)
            if name == "tests":
                lines = run_tests(running[name], seconds, log)
            else:
                lines = run_stage(name, running[name], measured, seconds)
            for line in lines:
                results.add(line)
                if "per_second" in line:
                    measured[line["name"]] = line["per_second"]
    finally:
        for process in running.values():
            if process.poll() is None:
                kill(process)


def parse_options() -> Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="?", help="JSON file for the lines; a log goes beside it")
    parser.add_argument("--dry_run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="time of the whole run")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages, and the limits")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.results and not Path(options.results).absolute().parent.is_dir():
        parser.error(f"there is no folder for {options.results}")
    if not (options.results or options.stage):
        parser.error("name a JSON file for the results")
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        parser.error(f"{', '.join(missing)} not installed: pip install -r requirements.txt")
    return options


def main() -> None:
    """Run all stages, or a single stage if this is the process of one."""
    options = parse_options()
    if options.stage:
        run_in_own_process(options.stage, options.dry_run)
        return
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    about = {
        "python": sys.version.split()[0],
        "date": time.strftime("%F"),
        "dry_run": options.dry_run,
        **installed_versions(),
    }
    print(*(f"{name} {value}" for name, value in about.items()), sep=", ", flush=True)
    results = Results(options.results, about)
    with open(f"{options.results}.log", "w", encoding="utf-8") as log:
        run_stages(options, results, log)
    failed = [line["name"] for line in results.lines if "failed" in line]
    print(f"{results.seconds():5.0f} s  " + (f"FAILED: {'; '.join(failed)}" if failed else "done"))
    sys.exit(bool(failed))


def installed_versions() -> dict[str, str | None]:
    """{package: version} of minisft's peers and torch; nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


if __name__ == "__main__":
    main()
