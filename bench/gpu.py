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
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Operations and bytes a second that these cards reached elsewhere: much less is a card in trouble.
EXPECTED = {"H100": (790e12, 3.3e12), "H200": (790e12, 4.3e12)}
MATMUL, COPY = "matrix product, bfloat16", "memory copy"
GPU_ONLY = {  # sizes on a GPU; ROWS is a step of 4,096 tokens, SHORT the layers that are compiled
    "tinyllama": "tinyllama", "llama3-8b": "llama3-8b", "rows": 16, "length": 256, "steps": 6,
    "new_tokens": 64, "capacity": 1024, "short": 8, "scored": 1024, "reference": 32,
    "batch_tokens": 32768, "workers": 4, "matrix": None}
DRY = {"tinyllama": "tiny", "llama3-8b": "tiny", "rows": 2, "length": 32, "steps": 1,
       "new_tokens": 4, "capacity": 32, "short": 1, "scored": 12, "reference": 2,
       "batch_tokens": 2048, "workers": 0, "matrix": 256}


class Bench:
    """What a stage is given: the device, the sizes and the limits measured before it."""

    def __init__(self, dry_run, limits):
        import torch

        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype, self.sizes, self.limits = torch.bfloat16, DRY if dry_run else GPU_ONLY, limits

    def share(self, per_second, limit):
        """{"share", "limit"} of a line, or nothing where the limit was not measured."""
        if not self.limits.get(limit):
            return {}
        return {"share": per_second / self.limits[limit], "limit": limit}


def attempt(function):
    """(function(), None), or (None, why it failed): what fails costs one line, not the stage."""
    try:
        return function(), None
    except Exception as error:
        print_traceback()
        return None, reason(error)
    finally:
        gc.collect()


def reason(error):
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, ImportError) else f"{type(error).__name__}: {lines[0]}"


def print_traceback():
    import traceback

    traceback.print_exc()  # into the log


def beside(name, figure, unit, peer_name, peer, why_not, **more):
    """A line with its peer; where that failed, with the reason."""
    if peer is None:
        return {"name": name, "figure": figure, "unit": unit,
                "note": f"{peer_name}: {why_not}", **more}
    return {"name": name, "figure": figure, "unit": unit, "peer_name": peer_name, "peer": peer,
            "ratio": figure / peer, **more}


def limits(bench):
    """The speed of a large matrix product and the bandwidth of a copy."""
    import torch

    from bench.limits import bandwidth, matrix_speed

    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    expected = next((one for card, one in EXPECTED.items() if card in name), (None, None))
    for line, measure, unit, scale, usual in (
            (MATMUL, lambda: matrix_speed(bench.device, bench.dtype, bench.sizes["matrix"]),
             "TFLOP/s", 1e12, expected[0]),
            (COPY, lambda: bandwidth(bench.device), "GB/s", 1e9, expected[1])):
        speed = measure()
        usual = usual and usual / scale
        yield {**beside(line, speed / scale, unit, "usual", usual, "not known for this device"),
               "per_second": speed, "device": name}


def training(bench, size, finetuning_type):
    """Padded, packed, and packed and compiled, next to transformers' Trainer (with peft)."""
    import numpy as np
    import torch

    from bench import train
    from bench.limits import forget_peak
    from bench.shapes import random_model, transformers_twin
    from minisft import plan
    from minisft.lora import LoraConfig, add_lora

    shape, rows = bench.sizes[size], bench.sizes["rows"]
    is_full, length = finetuning_type == "full", bench.sizes["length"]
    # Rows of a step are of similar length, as after sorting; together they have 4,096 tokens.
    lengths = np.linspace(0.75 * length, 1.25 * length, rows * bench.sizes["steps"]).astype(int)
    data = train.synthetic_rows(shape, lengths.tolist())
    # Trained weights are float32 on both sides, frozen ones bfloat16; products are in bfloat16.
    model = random_model(shape, None, torch.float32 if is_full else bench.dtype, bench.device)

    def options_of(side, *flags):
        options = train.parse_options([
            "--side", side, "--folder", folder, "--batch_size", str(rows), "--dtype", "bfloat16",
            "--device", bench.device.type, "--finetuning_type", finetuning_type, *flags])
        forget_peak(bench.device)
        return options

    def trainer():
        twin = transformers_twin(model, shape)
        options, names["attention"] = options_of("best"), twin.config._attn_implementation
        twin.requires_grad_(is_full)
        return train.second_epoch(train.train_with_trainer(options, twin, data))

    def ours(*arguments):
        options = options_of(*arguments)
        return train.second_epoch(train.train_minisft(options, model, lora_config, data))

    with tempfile.TemporaryDirectory() as folder:
        names = {}
        peer, why_not = attempt(trainer)
        peer_speed, peer_peak, _ = peer or (None, None, None)
        peer_name = "Trainer" if is_full else "Trainer + peft"
        peer_name += f" ({names['attention']})" if names else ""
        lora_config = None
        if is_full:
            model.requires_grad_(True)
        else:
            lora_config = LoraConfig()
            add_lora(model, lora_config)
        operations = plan.operations_per_token(model, length, False)
        variants = {"padded": ["minisft"], "packed": ["packed"],
                    "packed, compiled": ["packed", "--compile"]}
        for variant, arguments in variants.items():
            name = f"{size} {finetuning_type}, {variant}"
            began = time.monotonic()
            found, failed = attempt(lambda: ours(*arguments))  # noqa: B023
            if found is None:
                yield {"name": name, "failed": failed}
                continue
            speed, peak, padding = found
            yield beside(name, speed, "tokens/s", peer_name, peer_speed, why_not,
                         peak_gib=peak / 2**30, peer_peak_gib=peer_peak and peer_peak / 2**30,
                         padding=padding, took=time.monotonic() - began,
                         **bench.share(speed * operations, MATMUL))


def writing_speed(function, written, bench, repeats):
    """Tokens a second of a function that writes so many; its first call prepares kernels."""
    from bench.limits import seconds_of

    function()
    return written / statistics.median(seconds_of(function, bench.device) for _ in range(repeats))


def decoding(bench, size, num_layers=None, is_compiled=False, with_peer=True):
    """Greedy tokens a second at batch 1 and 8, or at batch 1 compiled, next to transformers."""
    from bench import generate
    from bench.shapes import random_model, transformers_twin
    from minisft.compiled import CompiledDecoder

    shape = bench.sizes[size]
    model = random_model(shape, num_layers, bench.dtype, bench.device)
    twin, no_twin = None, "not measured"
    if with_peer:
        twin, no_twin = attempt(lambda: transformers_twin(model, shape))
    options = generate.parse_options(["--max_new_tokens", str(bench.sizes["new_tokens"])])
    repeats = 1 if bench.device.type == "cpu" else 3
    peer_name = "generate, static cache" if is_compiled else "generate"
    depth = f", {num_layers} layers" if num_layers else ""
    for batch_size in (1,) if is_compiled else (1, 8):
        name = f"{size}{depth} decoding, batch {batch_size}" + ", compiled" * is_compiled
        began, decoder = time.monotonic(), None
        if is_compiled:
            decoder = CompiledDecoder(model, bench.sizes["capacity"])
        ours, theirs = generate.both_sides(model, twin, batch_size, options, bench.device, decoder)
        written = batch_size * options.max_new_tokens
        speed = writing_speed(ours, written, bench, repeats)
        positions = options.prompt_length + options.max_new_tokens // 2  # those in the middle
        positions = bench.sizes["capacity"] if decoder else positions
        read = generate.bytes_per_step(model.config, positions, bench.dtype, batch_size)
        more = {"took": time.monotonic() - began, **bench.share(speed / batch_size * read, COPY)}
        if twin and decoder:  # which may not live to see its peer compiled
            yield beside(name, speed, "tokens/s", peer_name, None, "to follow", **more)
        peer, why_not = None, no_twin
        if twin:
            peer, why_not = attempt(lambda: writing_speed(theirs, written, bench, repeats))  # noqa: B023
        yield beside(name, speed, "tokens/s", peer_name, peer, why_not, **more)


def scoring(bench, size):
    """IFD of rows a second, next to the reference way, which scores fewer of them."""
    from bench import score
    from bench.shapes import random_model, transformers_twin
    from minisft import dataset, plan
    from minisft.template import get_template
    from minisft.tokenizer import Tokenizer

    shape, sizes = bench.sizes[size], bench.sizes
    model = random_model(shape, None, bench.dtype, bench.device)
    options = score.parse_options([
        "--num_rows", str(sizes["scored"]), "--reference_rows", str(sizes["reference"]),
        "--batch_tokens", str(sizes["batch_tokens"]), "--workers", str(sizes["workers"]),
        "--rounds", "1"])
    texts = [row["instruction"] + " " + row["input"] for row in
             json.loads((ROOT / "examples/data/train.json").read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps([
            {"instruction": " ".join(texts[number : number + 4]),
             "output": " ".join(texts[number + 4 : number + 12])}
            for number in range(sizes["scored"])]), encoding="utf-8")
        result = score.compare(options, model, transformers_twin(model, shape),
                               dataset.open_rows(str(path), skipped=[]),
                               get_template("alpaca", Tokenizer.load(ROOT / "examples/base")))
    ours, theirs = (statistics.median(one[0] for one in result["speeds"][side])
                    for side in ("ours", "theirs"))
    operations = result["tokens"] * plan.forward_operations(model, result["tokens"] / 2)
    yield beside(f"{size} scoring", ours, "rows/s", "reference way", theirs, None,
                 tokens_per_row=result["tokens"], difference=result["difference"],
                 **bench.share(ours * operations, MATMUL))


def clustering(bench):
    """k-means has no GPU path: there is nothing of it to measure here."""
    yield {"name": "k-means", "skipped": "it has no GPU path; bench/kmeans.py measures it on a CPU"}


# In the order of the run; seconds that each may take, its imports not counted.
STAGES = {
    "limits": (limits, 30),
    "tests": (None, 90),
    "tinyllama lora": (lambda bench: training(bench, "tinyllama", "lora"), 75),
    "llama3-8b lora": (lambda bench: training(bench, "llama3-8b", "lora"), 90),
    "tinyllama full": (lambda bench: training(bench, "tinyllama", "full"), 60),
    "decoding": (lambda bench: decoding(bench, "llama3-8b"), 60),
    "decoding compiled": (lambda bench: decoding(
        bench, "llama3-8b", bench.sizes["short"], is_compiled=True), 75),
    "scoring": (lambda bench: scoring(bench, "tinyllama"), 45),
    "k-means": (clustering, 5),
    "decoding compiled, all layers": (lambda bench: decoding(
        bench, "llama3-8b", is_compiled=True, with_peer=False), 90),
}


def work(name, dry_run):
    """A stage's process: import, wait for the word to go, send lines as JSON to standard output."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is for the log
    with contextlib.suppress(ImportError):  # a line says what is missing, when it is needed
        import peft  # noqa: F401
        import transformers
        from transformers import AutoModelForCausalLM, LlamaConfig, Trainer  # noqa: F401

        transformers.utils.logging.set_verbosity_error()
    with contextlib.suppress(ImportError):
        import minisft.ifd  # noqa: F401
        import minisft.run  # noqa: F401

    def say(line):
        print(json.dumps(line), file=said, flush=True)

    word = sys.stdin.readline()
    if not word:  # nobody waits for this stage any more
        return
    try:
        for line in STAGES[name][0](Bench(dry_run, json.loads(word))):
            say(line)
    except Exception as error:
        print_traceback()
        say({"name": name, "skipped" if isinstance(error, ImportError) else "failed":
             reason(error)})


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
        words = ["-m", "pytest", "-v", "--tb=short", "--durations=8", "-p", "no:cacheprovider",
                 str(ROOT / "tests/test_cuda.py")]
    else:
        words = [str(ROOT / "bench/gpu.py"), "--stage", name, *["--dry_run"] * dry_run]
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=log, text=True, start_new_session=True)


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
    """Yield the line of tests/test_cuda.py: how many passed, and which did not."""
    counts, bad, began = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0), [], time.time()
    for text in finish(process, "", seconds):
        log.write(text)
        found = re.match(r"(\S+) (PASSED|FAILED|ERROR|SKIPPED)", text)
        if found:
            counts[found[2]] += 1
            bad += [found[1].rpartition("::")[2]] * (found[2] in ("FAILED", "ERROR"))
    told = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)
    line = {"name": "tests/test_cuda.py", "note": told, "took": time.time() - began}
    if process.returncode == -signal.SIGKILL:
        yield {**line, "failed": f"stopped after {seconds:.0f} s: {told or 'no test ended'}"}
    elif process.returncode or bad:
        yield {**line, "failed": f"{told or 'did not run, see the log'}: {' '.join(bad)}"}
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
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results(options.results, {"python": sys.version.split()[0],
                                        "date": time.strftime("%F"), "dry_run": options.dry_run,
                                        **versions()})
    print(*(f"{name} {value}" for name, value in results.content.items() if name != "lines"),
          sep=", ", flush=True)
    names = [name for name in STAGES if not options.only or name in ("limits", *options.only)]
    measured, processes = {}, {}
    with open(f"{options.results}.log", "w", encoding="utf-8") as log:
        try:
            for name, later in zip(names, [*names[1:], None], strict=True):
                left = 60 * options.minutes - results.seconds()
                if left < 5:
                    results.add({"name": name, "skipped": "no time is left"})
                    continue
                for one in filter(None, (name, later)):
                    if one not in processes and (one != "tests" or one == name):
                        processes[one] = start(one, options.dry_run, log)
                seconds = min(left, STAGES[name][1])
                lines = (run_tests(processes[name], seconds, log) if name == "tests" else
                         run_stage(name, processes[name], measured, seconds))
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
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    main()
