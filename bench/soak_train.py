"""Does training survive many kills? 30 minutes with 50 SIGKILLs at random times, on a CPU.

    python bench/soak_train.py                       # about an hour: an undisturbed run, too
    python bench/soak_train.py --minutes 1 --kills 3
    python bench/soak_train.py --write_docs          # also the table of docs/benchmarks.md

Trains examples/base twice, with as many steps as an undisturbed run makes in the given time, less
what the kills cost: once undisturbed, and once in processes that are killed and resumed. A kill
comes up to a second after a random step, so some hit a checkpoint that is being saved. Then
compares the weights and the metrics of every step, which must be equal, and the memory of the
processes, which must not grow. Exits with 1 if something is lost, and then writes no table.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import MAX_GROWTH, ROOT, early_and_late, flags, resident_memory  # noqa: E402
from bench.tables import markdown, update  # noqa: E402
from minisft.common.metric_lines import read_metrics  # noqa: E402

HEAD = ["steps", "kills", "minutes", "weights", "losses", "memory of a process", "temporary files"]
CALIBRATION_STEPS = 40
MIN_STEPS, SAVE_STEPS = 200, 20


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--write_docs", action="store_true", help="the table of docs/benchmarks.md")
    return parser.parse_args()


def command(output_dir: Path, max_steps: int) -> list[str]:
    """The command that trains, or resumes, in a folder."""
    words = flags(
        config="examples/demo.toml",
        output_dir=output_dir,
        max_steps=max_steps,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=10,
        resume_from_checkpoint="auto",
        device="cpu",
        dtype="float32",
    )
    return [sys.executable, "train.py", *words]


def train(
    output_dir: Path, max_steps: int, kill: tuple[int, float] | None = None
) -> tuple[bool, list[int]]:
    """(True if the run ended by itself, its memory over time).

    kill: a step, and how many seconds after it the process is killed.
    """
    killed_at, used = None, []
    with open(output_dir.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            command(output_dir, max_steps),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # the same sums on a busy machine, too
        )
    while process.poll() is None:
        used.append(resident_memory(process.pid))
        if kill and killed_at is None and last_step(output_dir) >= kill[0]:
            killed_at = time.monotonic() + kill[1]
        if killed_at is not None and time.monotonic() >= killed_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return False, used
        time.sleep(0.05)
    if process.returncode != 0:
        sys.exit(f"train.py ended with {process.returncode}; see {output_dir.with_suffix('.log')}")
    return True, used


def last_step(output_dir: Path) -> int:
    """The last step that a run has logged, 0 before the first."""
    rows = read_metrics(output_dir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def losses(output_dir: Path) -> dict[int, float]:
    """{step: loss} of a run."""
    rows = read_metrics(output_dir / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def main() -> None:
    """Train undisturbed, train with kills, compare."""
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    train(folder / "start", 1)
    start_seconds = time.monotonic() - began
    began = time.monotonic()
    train(folder / "calibration", CALIBRATION_STEPS)
    step_seconds = (time.monotonic() - began - start_seconds) / CALIBRATION_STEPS
    # A kill costs a start, and on average half of the steps between two checkpoints.
    lost = options.kills * (start_seconds + SAVE_STEPS / 2 * step_seconds)
    max_steps = max(MIN_STEPS, int((60 * options.minutes - lost) / step_seconds))
    print(f"{max_steps:,} steps; {step_seconds:.3f} s a step, {start_seconds:.1f} s a start")
    _, used = train(folder / "undisturbed", max_steps)
    early, late = early_and_late(used)
    growth = late / early
    print(f"undisturbed: memory x{growth:.3f} from the second quarter to the last")
    is_flat = growth <= MAX_GROWTH

    generator, killed, peaks = random.Random(options.seed), 0, []
    began, has_ended = time.monotonic(), False
    steps = sorted(
        generator.choices(range(SAVE_STEPS, max_steps - 3 * SAVE_STEPS), k=options.kills)
    )
    while not has_ended:
        kill = (steps[killed], generator.random()) if killed < options.kills else None
        has_ended, used = train(folder / "killed", max_steps, kill)
        killed += not has_ended
        peaks.append(max(used))
    minutes = (time.monotonic() - began) / 60
    resumed = peaks[1:]  # the first process read no checkpoint, so it needed less
    half = (len(resumed) + 1) // 2
    is_flat &= max(resumed[half:], default=0) <= MAX_GROWTH * max(resumed[:half], default=0)
    names = ("adapter_model.safetensors", "metrics.jsonl")
    first, second = (folder / name for name in ("undisturbed", "killed"))
    same_weights = (first / names[0]).read_bytes() == (second / names[0]).read_bytes()
    same_losses = losses(first) == losses(second)
    left = [str(path) for path in second.rglob("*.partial*")]
    memory = f"{min(peaks) / 2**20:,.0f} to {max(peaks) / 2**20:,.0f} MiB, "
    memory += f"x{growth:.2f} in the undisturbed run" if is_flat else "GROWS"
    equal = {True: "equal", False: "DIFFERENT"}
    row = [f"{max_steps:,}", killed, f"{minutes:.1f}", equal[same_weights], equal[same_losses]]
    row += [memory, ", ".join(left) or "none"]
    print(markdown(HEAD, [row]))
    print(f"kept in {folder}")
    if not (same_weights and same_losses and is_flat and killed == options.kills and not left):
        sys.exit(1)
    if options.write_docs:
        update("benchmarks.md", "soak_train", HEAD, [row], order=[row[0]])


if __name__ == "__main__":
    main()
