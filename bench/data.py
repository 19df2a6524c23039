"""Preparing data: encoding next to the bare tokenizer, and a large file before the first step.

    python bench/data.py --model_name_or_path examples/base --gigabytes 1

The first part encodes conversations by a chat template, and the same texts by the tokenizer alone.
It compares processor time, which other programs on the machine hardly change; the process that
renders the template works at the same time and is not counted. The aim is a ratio of 1.5.

The second part writes JSON lines of that size and trains LoRA on them with train.py; for
comparison, on ten rows without workers. Memory is the largest sum of proportional set sizes (PSS)
over the processes: the private memory of each, and its share of shared memory. The aim for 1
GB is a first step within 10 seconds.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
    """Write Alpaca rows of about 600 bytes until the file has `num_bytes`; returns their number."""
    generator, count = random.Random(0), 0
    words = "the a red blue cat dog sat runs on under mat house quickly and then why how".split()
    texts = [" ".join(generator.choices(words, k=generator.randint(5, 200))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            for _ in range(1000 if num_bytes > 10**6 else 10):
                instruction = f"{count}: {generator.choice(texts)[:80]}"
                row = {"instruction": instruction, "input": "", "output": generator.choice(texts)}
                file.write(json.dumps(row) + "\n")
                count += 1
    return count


def encoding_ratios(model: str | Path, template_name: str) -> Iterator[tuple[float, float, float]]:
    """(tokens a row, rows a second, time / time of the bare tokenizer) for rows of some lengths."""
    tokenizer = Tokenizer.load(model)
    template = get_template(template_name, tokenizer)
    source = json.loads((ROOT / "examples/data/train.json").read_text(encoding="utf-8"))
    answers = [row["output"] for row in source]
    for num_answers in (1, 6, 20, 60):
        generator, rows = random.Random(0), []
        for number, row in enumerate(source[:NUM_ROWS]):
            question = {"role": "user", "content": f"{number}: {row['instruction']}"}
            answer = " ".join(generator.choices(answers, k=num_answers))
            rows.append(Row([question, {"role": "assistant", "content": answer}]))
        texts = [template.render(row.messages) for row in rows]
        ours, bare, num_tokens = [], [], 0
        for _ in range(ROUNDS):
            began = time.process_time()
            encode_rows(rows, template, cutoff_len=10**6)
            ours.append(time.process_time() - began)
            began = time.process_time()
            num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
            bare.append(time.process_time() - began)
        yield num_tokens / len(rows), len(rows) / min(ours), min(ours) / min(bare)


def proportional_memory(process_id: int) -> int:
    """PSS in bytes of a process and its descendants; processes that have ended count as 0."""
    total, pending = 0, [str(process_id)]
    while pending:
        folder = Path("/proc") / pending.pop()
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for thread in (folder / "task").iterdir():
                pending += (thread / "children").read_text().split()
        except OSError:
            continue
    return total


def measure(dataset: Path, model: str, folder: Path, num_workers: int) -> tuple[float, float, int]:
    """Train a few steps: (seconds to the first step, seconds to the last, peak bytes)."""
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
    metrics, began, first, peak = folder / "metrics.jsonl", time.monotonic(), 0.0, 0
    process = start("train.py", *words)
    while process.poll() is None:
        peak = max(peak, proportional_memory(process.pid))
        if not first and metrics.exists() and metrics.stat().st_size:
            first = time.monotonic() - began
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    return first, time.monotonic() - began, peak


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", default=ROOT / "examples" / "base")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="0: only encode")
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    add_results_option(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure both files and print a table."""
    options = parse_options()
    model = options.model_name_or_path
    print(f"{'tokens a row':>12} {'rows/s':>10} {'time / bare tokenizer':>22}")
    for num_tokens, speed, ratio in encoding_ratios(model, options.template):
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "few.jsonl", 1)
        count = write_rows(folder / "many.jsonl", options.gigabytes * 10**9)
        few = measure(folder / "few.jsonl", model, folder / "a", 0)
        num_workers = options.dataloader_num_workers
        many = measure(folder / "many.jsonl", model, folder / "b", num_workers)
    print(f"{'rows':>12} {'first step':>12} {f'{NUM_STEPS} steps':>12} {'peak memory':>14}")
    for num_rows, (first, last, peak) in ((10, few), (count, many)):
        print(f"{num_rows:>12,} {first:>10.1f} s {last:>10.1f} s {peak / 2**20:>11,.0f} MiB")
    name = f"first step of {options.gigabytes:g} GB of rows"
    seconds = {"peer_name": "of ten rows", "peer": few[0], "ratio": few[0] / many[0]}
    add_figure(options.results, name, many[0], "s", **seconds)
    print(f"the file costs {(many[2] - few[2]) / 2**20:,.0f} MiB and {many[0] - few[0]:.1f} s")


if __name__ == "__main__":
    main()
