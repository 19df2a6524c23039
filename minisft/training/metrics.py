"""What a run shows and leaves behind: a progress bar, metrics.jsonl, a picture of the loss.

progress = Progress(total_steps=100, path="runs/cherry/metrics.jsonl")
progress.add({"loss": 12.5}, total=10, num_tokens=40)
progress.record(epoch=0.1, learning_rate=1e-4, grad_norm=0.7)
plot_loss("runs/cherry")          # runs/cherry/loss.png
"""

import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from minisft.common import processes


class Progress:
    """Counts a run's steps, losses and tokens. Only the first process shows and writes them.

    `tokens` are all tokens of the rows, without padding; losses and other figures are per
    supervised token, or per row of preferences.
    """

    def __init__(self, total_steps, path, device="cpu", state=None):
        self.is_main = processes.rank() == 0
        self.device = device
        self.step = self.tokens = 0
        self._begin_interval()
        earlier = []
        if state:
            self.step, self.tokens = state["step"], state["tokens"]
            self.sums = Counter(
                {name: value if self.is_main else 0.0 for name, value in state["sums"].items()}
            )
            self.total = state["total"]
        self.file = None
        if self.is_main:
            if state:
                earlier = [row for row in read_metrics(path) if row["step"] <= self.step]
            partial = Path(f"{path}.partial")  # a full disk leaves the log of before
            partial.write_text("".join(json.dumps(row) + "\n" for row in earlier), "utf-8")
            os.replace(partial, path)
            self.file = open(path, "a", encoding="utf-8")
        silent = not (self.is_main and sys.stderr.isatty())
        self.bar = tqdm(total=total_steps, initial=self.step, unit="step", disable=silent)

    def state(self):
        """What `state` takes, to count on from here after an interruption."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "sums": self._all_sums(),
            "total": self.total,
        }

    def _begin_interval(self):
        self.sums, self.total, self.num_tokens = Counter(), 0, 0
        self.began = time.monotonic()

    def _all_sums(self):
        """{figure: sum over all processes} since the last record."""
        values = processes.sum_over_ranks(list(map(float, self.sums.values())), self.device)
        return dict(zip(self.sums, values, strict=True))

    def add(self, sums, total, num_tokens):
        """Count one optimizer step.

        sums: {figure: sum over this process's rows}. total: over how much all processes' sums
        are, in supervised tokens or rows of preferences. num_tokens: of all processes.
        """
        self.step += 1
        self.tokens += num_tokens
        self.sums.update(sums)
        self.total += total
        self.num_tokens += num_tokens
        self.bar.update()

    def record(self, epoch, learning_rate, grad_norm):
        """Write the mean figures and the speed since the last record, over all processes."""
        means = {name: value / max(1, self.total) for name, value in self._all_sums().items()}
        speed = self.num_tokens / max(1e-9, time.monotonic() - self.began)
        self._write(
            step=self.step,
            epoch=epoch,
            **means,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=self.tokens,
            tokens_per_second=speed,
        )
        self.bar.set_postfix_str(
            f"{in_words(means)}, lr {learning_rate:.2e}, {speed:,.0f} tokens/s"
        )
        self._begin_interval()

    def record_evaluation(self, figures, seconds):
        """Write {figure: mean} of an evaluation that took `seconds`, no part of training time."""
        self._write(step=self.step, **{f"eval_{name}": value for name, value in figures.items()})
        self.say(f"step {self.step}: evaluation {in_words(figures)}")
        self.began += seconds

    def say(self, text):
        """Print a line above the bar, at once also where it goes into a file."""
        if self.is_main:
            self.bar.write(text)
            sys.stdout.flush()

    def close(self):
        """Finish the bar and the file."""
        self.bar.close()
        if self.file:
            self.file.close()

    def _write(self, **values):
        if self.file:
            rounded = {name: _rounded(value) for name, value in values.items()}
            self.file.write(json.dumps(rounded, allow_nan=False) + "\n")
            self.file.flush()


def in_words(figures):
    """{"loss": 0.5, "accuracy": 0.75} -> "loss 0.5000, accuracy 75.0 %"."""

    def in_units(name, value):
        """A share in per cent, other figures as they are."""
        if name in ("accuracy", "exact_match"):
            return f"{100 * value:.1f} %"
        return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"

    return ", ".join(
        f"{name.replace('_', ' ')} {in_units(name, value)}" for name, value in figures.items()
    )


def _rounded(value):
    """Six significant digits; None for what JSON has no number for."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def read_metrics(path):
    """The objects of a metrics.jsonl, as a list of dicts; a last line cut off is left out."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_loss(run_dir):
    """Draw loss and evaluation loss over steps to `run_dir/loss.png`; returns its path.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    per = "row" if any("accuracy" in row for row in rows) else "token"
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=f"loss per {per}")
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    right = [
        (row["step"], 100 * row["eval_exact_match"]) for row in rows if "eval_exact_match" in row
    ]
    if right:
        axes.plot([], [], "g^:", label="exact match")  # named in the legend of the losses
        other = axes.twinx()
        other.plot(*zip(*right, strict=True), "g^:")
        other.set(ylabel="exact match, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(run_dir) / "loss.png"
    figure.savefig(path, dpi=120)
    return path
