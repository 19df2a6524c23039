"""Time until training starts on a large file, and the memory that the file costs.

    python bench/data.py --model_name_or_path examples/base --gigabytes 1

Writes JSON lines of that size and trains LoRA on them with train.py; for comparison, on ten rows
without workers. Memory is the largest sum of proportional set sizes (PSS) over the processes: the
private memory of each, and its share of shared memory.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import ROOT, flags, start  # noqa: E402

NUM_STEPS = 20


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


def main() -> None:
    """Measure both files and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", default=ROOT / "examples" / "base")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    options = parser.parse_args()
    model = options.model_name_or_path
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
    print(f"the file costs {(many[2] - few[2]) / 2**20:,.0f} MiB and {many[0] - few[0]:.1f} s")


if __name__ == "__main__":
    main()
