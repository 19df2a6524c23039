"""How soon training starts on a large file, and what the file costs in memory.

    python bench/data.py --model_name_or_path examples/base --gigabytes 1

Writes JSON lines of that size, trains on them by LoRA with train.py, and on ten rows without
workers for comparison. Memory is the largest sum, over the processes, of what each has to itself
and its share of what is shared (PSS); pages of the file that the system keeps are nobody's.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20


def write_rows(path, num_bytes):
    """Alpaca rows of some 600 bytes until the file has `num_bytes`; returns their number."""
    generator, count = random.Random(0), 0
    words = "the a red blue cat dog sat runs on under mat house quickly and then why how".split()
    texts = [" ".join(generator.choices(words, k=generator.randint(5, 200))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            lines = [
                json.dumps(
                    {
                        "instruction": f"{count + number}: {generator.choice(texts)[:80]}",
                        "input": "",
                        "output": generator.choice(texts),
                    }
                )
                + "\n"
                for number in range(1000 if num_bytes > 10**6 else 10)
            ]
            file.write("".join(lines))
            count += len(lines)
    return count


def memory_of(process_id):
    """Proportional set size in bytes of a process and its descendants; those that ended are 0."""
    total, pending = 0, [process_id]
    while pending:
        folder = Path("/proc") / str(pending.pop())
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for thread in (folder / "task").iterdir():
                pending += (thread / "children").read_text().split()
        except OSError:
            continue
    return total


def measure(data, model, folder, workers):
    """Train for a few steps -> (seconds to the first step, seconds to the last, peak bytes)."""
    metrics, began, first, peak = folder / "metrics.jsonl", time.monotonic(), None, 0
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            "--model_name_or_path",
            model,
            "--dataset",
            data,
            "--template",
            "alpaca",
            "--cutoff_len",
            "256",
            "--max_steps",
            str(STEPS),
            "--logging_steps",
            "1",
            "--dataloader_num_workers",
            str(workers),
            "--output_dir",
            folder,
        ],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        if first is None and metrics.exists() and metrics.stat().st_size:
            first = time.monotonic() - began
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    return first, time.monotonic() - began, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", default=ROOT / "examples" / "base")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_rows(folder / "few.jsonl", 1)
        count = write_rows(folder / "many.jsonl", options.gigabytes * 10**9)
        few = measure(folder / "few.jsonl", options.model_name_or_path, folder / "a", 0)
        many = measure(
            folder / "many.jsonl",
            options.model_name_or_path,
            folder / "b",
            options.dataloader_num_workers,
        )
    print(f"{'rows':>12} {'first step':>12} {f'{STEPS} steps':>12} {'peak memory':>14}")
    for rows, (first, last, peak) in ((10, few), (count, many)):
        print(f"{rows:>12,} {first:>10.1f} s {last:>10.1f} s {peak / 2**20:>11,.0f} MiB")
    print(f"the file costs {(many[2] - few[2]) / 2**20:,.0f} MiB and {many[0] - few[0]:.1f} s")


if __name__ == "__main__":
    main()
