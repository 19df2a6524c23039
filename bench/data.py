"""Preparing data: encoding next to the bare tokenizer, and a large file before the first step.

    python bench/data.py --model_name_or_path examples/base --gigabytes 1

The first part encodes conversations by a chat template, and the same texts by the tokenizer alone
(--tokenizer_dir; by default the model's). It compares processor time, which other programs on the
machine hardly change; the process that renders the template works at the same time and is not
counted. The aim is a ratio of 1.5.

The second part writes JSON lines and a JSON array of that size and trains LoRA on them with
train.py; for comparison, on ten rows without workers. The aim for 1 GB is a first step within 10
seconds. The floor is the time to read the file and to parse all of its rows with json.loads, which
train.py does not do. Processor time is that of all processes until the first step. Memory is the
largest sum of proportional set sizes (PSS) over the processes: the private memory of each, and its
share of shared memory.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import ROOT, flags, start  # noqa: E402
from bench.results import add_figure, add_results_option  # noqa: E402
from minisft.data.dataset import Row  # noqa: E402
from minisft.data.encoding import encode_rows  # noqa: E402
from minisft.text.template_choice import get_template  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402

NUM_STEPS = 20
NUM_ROWS, ROUNDS = 400, 5  # of the first part


def write_rows(path: Path, num_bytes: float) -> int:
    """Write Alpaca rows of about 600 bytes until the file has `num_bytes`; returns their number.

    They are a JSON array in a file that ends in .json, else JSON lines.
    """
    generator, count = random.Random(0), 0
    begin, between, end = ("[", ", ", "]") if path.suffix == ".json" else ("", "\n", "\n")
    words = "the a red blue cat dog sat runs on under mat house quickly and then why how".split()
    texts = [" ".join(generator.choices(words, k=generator.randint(5, 200))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            for _ in range(1000 if num_bytes > 10**6 else 10):
                instruction = f"{count}: {generator.choice(texts)[:80]}"
                row = {"instruction": instruction, "input": "", "output": generator.choice(texts)}
                file.write((between if count else begin) + json.dumps(row))
                count += 1
        file.write(end)
    return count


def time_to_parse(path: Path) -> tuple[float, float]:
    """Seconds of processor time to read a file of write_rows, and then to parse all of it."""
    began = time.process_time()
    content = path.read_bytes()
    parts = [content] if path.suffix == ".json" else content.splitlines()
    read = time.process_time()
    for part in parts:
        json.loads(part)
    return read - began, time.process_time() - read


def encoding_ratios(model: str | Path, template_name: str) -> Iterator[tuple[float, float, float]]:
    """(tokens a row, rows a second, time / time of the bare tokenizer) for rows of some lengths."""
    tokenizer = Tokenizer.load(model)
    template = get_template(template_name, tokenizer)
    source = json.loads((ROOT / "examples/data/train.json").read_text(encoding="utf-8"))
    answers = [row["output"] for row in source]
    for num_answers in (1, 6, 20, 60):
        generator, ours, bare, num_tokens = random.Random(0), [], [], 0
        for turn in range(ROUNDS):  # each has other texts, because the template keeps short ones
            rows = []
            for number, row in enumerate(source[:NUM_ROWS]):
                content = f"{turn}.{number}: {row['instruction']}"
                answer = f"{turn}.{number}: {' '.join(generator.choices(answers, k=num_answers))}"
                question = {"role": "user", "content": content}
                rows.append(Row([question, {"role": "assistant", "content": answer}]))
            texts = [template.render(row.messages) for row in rows]
            began = time.process_time()
            encode_rows(rows, template, cutoff_len=10**6)
            ours.append(time.process_time() - began)
            began = time.process_time()
            num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
            bare.append(time.process_time() - began)
        yield num_tokens / NUM_ROWS, NUM_ROWS / min(ours), min(ours) / min(bare)


def usage(process_id: int) -> tuple[int, float]:
    """(PSS in bytes, seconds of processor time) of a process and its descendants.

    Processes that have ended count as 0.
    """
    num_bytes, ticks, pending = 0, 0, [str(process_id)]
    while pending:
        folder = Path("/proc") / pending.pop()
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    num_bytes += int(line.split()[1]) * 1024
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(after_name[11]) + int(after_name[12])  # in user mode, in the kernel
            for thread in (folder / "task").iterdir():
                pending += (thread / "children").read_text().split()
        except OSError:
            continue
    return num_bytes, ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Training:
    """Seconds from the start of a training to its first step, also of processor time, and to its
    end; peak memory in bytes."""

    first_step: float
    first_step_processor: float
    end: float
    peak: int


def measure(dataset: Path, model: str, folder: Path, num_workers: int) -> Training:
    """Train a few steps."""
    words = flags(
        model_name_or_path=model,
        dataset=dataset,
        template="alpaca",
        cutoff_len=256,
        max_steps=NUM_STEPS,
        logging_steps=1,
        dataloader_num_workers=num_workers,
        output_dir=folder,
    )
    metrics, began = folder / "metrics.jsonl", time.monotonic()
    result = Training(0.0, 0.0, 0.0, 0)
    process = start("train.py", *words)
    while process.poll() is None:
        num_bytes, seconds = usage(process.pid)
        result.peak = max(result.peak, num_bytes)
        if not result.first_step and metrics.exists() and metrics.stat().st_size:
            result.first_step = time.monotonic() - began
            result.first_step_processor = seconds
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    result.end = time.monotonic() - began
    return result


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", default=ROOT / "examples" / "base")
    parser.add_argument("--tokenizer_dir", help="for the first part; by default the model's")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="0: only encode")
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    add_results_option(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure both parts and print a table for each."""
    options = parse_options()
    model = options.model_name_or_path
    tokenizer_dir = options.tokenizer_dir or model
    print(f"{'tokens a row':>12} {'rows/s':>10} {'time / bare tokenizer':>22}")
    for num_tokens, speed, ratio in encoding_ratios(tokenizer_dir, options.template):
        print(f"{num_tokens:>12,.0f} {speed:>10,.0f} {ratio:>22.2f}")
        add_figure(
            options.results,
            f"encoding, rows of {num_tokens:.0f} tokens",
            speed,
            "rows/s of processor time",
            peer_name="the tokenizer alone",
            peer=speed * ratio,
            ratio=1 / ratio,
        )
    if not options.gigabytes:
        return
    columns = ("file", "rows", "read", "json.loads", "first step", "(processor)")
    last = (f"{NUM_STEPS} steps", "peak memory")
    print("".join(f"{column:>13}" for column in (*columns, *last)))
    with tempfile.TemporaryDirectory() as temporary:
        few: Training | None = None
        for name in ("few.jsonl", "many.jsonl", "many.json"):
            path = Path(temporary) / name
            count = write_rows(path, options.gigabytes * 10**9 if few else 1)
            read, parse = time_to_parse(path)
            num_workers = options.dataloader_num_workers if few else 0
            run = measure(path, model, Path(temporary) / f"run-{name}", num_workers)
            path.unlink()
            times = (read, parse, run.first_step, run.first_step_processor, run.end)
            seconds = "".join(f"{time:>11.1f} s" for time in times)
            print(f"{name:>13}{count:>13,}{seconds}{run.peak / 2**20:>9,.0f} MiB")
            if few:
                size = f"{options.gigabytes:g} GB of rows in {path.suffix}"
                more = {"peer_name": "ten rows", "peer": few.first_step}
                add_figure(options.results, f"first step of {size}", run.first_step, "s", **more)
            few = few or run


if __name__ == "__main__":
    main()
