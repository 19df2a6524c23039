"""The lines at the end of a run: its steps and losses, its speed, how to try the result.

print(run_summary(run))
"""

import resource
import shlex
import sys
import time
from pathlib import Path

import torch

from minisft.common.words import counted, duration
from minisft.training.run import Run


def run_summary(run: Run) -> str:
    """Steps, time, losses, speed, memory, and the command that uses the result. For rank 0."""
    progress = run.progress
    seconds = max(1e-9, time.monotonic() - progress.started)
    parts = [counted(progress.step, "step")]
    if progress.first_step:
        parts[0] += f", {progress.step - progress.first_step} of them since the checkpoint,"
    parts[0] += f" in {duration(seconds)}"
    parts += loss_parts(run)
    speed = (progress.tokens - progress.first_tokens) / seconds
    parts.append(f"{speed:,.0f} tokens/s, peak memory {peak_memory(run.device) / 1e9:.2f} GB")
    return f"Done: {', '.join(parts)}.\nTry it: {next_command(run)}"


def loss_parts(run: Run) -> list[str]:
    """The first and the last loss, and the best evaluation."""
    rows = run.progress.rows()
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    first = f"{losses[0]:.2f} -> " if len(losses) > 1 else ""  # of a short run, one mean is known
    parts = [f"loss {first}{losses[-1]:.2f}"] if losses else []
    if run.best.step:
        parts.append(f"best evaluation {run.best.loss:.2f} at step {run.best.step}")
    return parts


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on its GPU, or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def next_command(run: Run) -> str:
    """The command that uses the result: a chat, or scores with a reward model."""
    options = run.options
    flag = "--adapter" if run.lora_config else "--model_name_or_path"
    model = f"{flag} {shlex.quote(str(Path(options.output_dir)))}"
    if options.quantization_bit:  # the full base may not fit into memory
        model += f" --quantization_bit {options.quantization_bit}"
    if options.stage == "rm":
        words = ["--dataset", str(options.dataset or options.train_dir)]
        if options.dataset_dir != "data":
            words += ["--dataset_dir", str(options.dataset_dir)]
        if options.replace:
            words += ["--replace", options.replace]
        if options.skip_bad_rows:
            words.append("--skip_bad_rows")
        return f"python score.py --mode reward {model} {shlex.join(words)} --output scores.jsonl"
    template = "" if options.stage != "pt" else " --template plain"
    return f"python chat.py {model}{template}"
