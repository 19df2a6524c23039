"""Progress of a run: a progress bar, metrics.jsonl, a plot of the loss.

progress = Progress(total_steps=100, path="runs/cherry/metrics.jsonl")
progress.start()
progress.add({"loss": 12.5}, count=10, num_tokens=40)
progress.add_gradient(torch.tensor(0.7), failed=torch.tensor(False))
progress.record(epoch=0.1, learning_rate=1e-4)
progress.print_line()
plot_loss("runs/cherry")          # runs/cherry/loss.png
"""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.metric_lines import in_words, read_metrics
from minisft.common.outputs import despite_full_disk, save_figure
from minisft.common.progress import SECONDS_BETWEEN_LINES, time_left
from minisft.training.metrics_log import MetricsLog
from minisft.training.reports import Reports


class Progress:
    """Counts the steps, losses and tokens of a run. Only rank 0 shows and writes them.

    A terminal shows a bar; a file or a pipe gets a line now and then.

    Tokens are all tokens of the rows, without padding. The loss and other metrics are means over
    supervised tokens, or over rows if answers are compared.
    """

    def __init__(
        self,
        total_steps: int,
        path: str | Path,
        device: torch.device | str = "cpu",
        reports: Reports | None = None,
        evaluation_note: str = "",
    ) -> None:
        self.total_steps, self.path, self.device = total_steps, Path(path), device
        self.reports = reports
        self.is_rank0 = processes.rank() == 0
        self.step = self.tokens = 0
        self._log: MetricsLog | None = None
        self._log_fails = False  # and the user knows
        self._bar = tqdm(disable=True)
        # Where this process began: a resumed run does not begin at step 0.
        self.first_step, self.first_tokens, self.started = 0, 0, time.monotonic()
        self._first_step_ended = self.started
        self.evaluation_note = evaluation_note  # printed after the figures: which tokens they cover
        self._next_line = -math.inf  # when the next line is due, if there is no bar
        self._recorded_step: int | None = None
        self._figures = ""  # of a record that no line has shown yet
        self._gradients: list[tuple[int, Tensor, Tensor]] = []  # step, norm, failed?
        self._grad_norm = math.nan  # of the last step that was checked
        self._begin_interval()

    def state(self) -> dict[str, Any]:
        """The state for `restore`. Every rank calls it. UserError if a step has failed."""
        self.check_gradients()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "sums": self._sums_of_all_ranks(),
            "total": self._count,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the step of a checkpoint."""
        self.step, self.tokens, self._count = state["step"], state["tokens"], state["total"]
        # The saved sums are over all ranks, so only rank 0 restores them.
        self._sums = {
            name: value if self.is_rank0 else 0.0 for name, value in state["sums"].items()
        }

    def start(self) -> None:
        """Show the bar and open the log. Drops what a resumed run logged after its checkpoint."""
        if not self.is_rank0:
            return
        earlier = read_metrics(self.path) if self.step else []
        self._log = MetricsLog(self.path, (row for row in earlier if row["step"] <= self.step))
        if self.reports:
            self.reports.start(self.step)
        self.first_step, self.first_tokens = self.step, self.tokens
        self.started = self._began = time.monotonic()
        silent = not sys.stderr.isatty()
        self._bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=silent)
        self.say(f"metrics: {self.path}")

    def close(self) -> None:
        """Finish the bar, and the log if the disk has room."""
        self._bar.close()
        if self._log:
            self._log.write_waiting()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log so far, on the disk or not. For rank 0."""
        return self._log.rows() if self._log else read_metrics(self.path)

    def finish_log(self) -> None:
        """Write the rows that a full disk has refused, once everything else is saved."""
        if self._log and (problem := self._log.write_waiting()):
            self.say(f"{self.path} lacks its last rows: {problem}")

    def add(self, sums: Mapping[str, Tensor | float], count: float, num_tokens: int) -> None:
        """Count one optimizer step.

        sums: {metric: sum over this rank's rows}. count: the supervised tokens, or rows if answers
        are compared, of all ranks. num_tokens: all tokens, of all ranks.
        """
        self.step += 1
        self.tokens += num_tokens
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += count
        self._interval_tokens += num_tokens
        self._bar.update()

    def add_gradient(self, norm: Tensor, failed: Tensor) -> None:
        """Keep the gradient norm of the step for the log. UserError if the step has failed.

        failed: True if training cannot go on with this gradient. On a GPU it is read later, in
        check_gradients, because the CPU would have to wait for it.
        """
        self._gradients.append((self.step, norm, failed))
        if failed.is_cpu:
            self.check_gradients()

    def check_gradients(self) -> None:
        """UserError if a step has failed. Comes before all that is written, so nothing bad is."""
        if not self._gradients:
            return
        steps, norms, failed = zip(*self._gradients, strict=True)
        values = torch.stack([torch.stack(norms), torch.stack(failed).to(norms[0])]).tolist()
        for step, norm, is_bad in zip(steps, *values, strict=True):
            if is_bad:
                raise UserError(
                    f"step {step}: the gradient norm is {norm}. No later step is saved. "
                    "Lower --learning_rate, or use --dtype float32 without --pure_bf16."
                )
            self._grad_norm = norm
        self._gradients.clear()

    def record(self, epoch: float, learning_rate: float) -> None:
        """Write the means and the speed since the last record. Every rank calls it.

        Does nothing if there was no step since then.
        """
        if self.step == self._recorded_step:
            return
        self._recorded_step = self.step
        self.check_gradients()
        sums = self._sums_of_all_ranks()
        # A step may have nothing to learn. NaN, because 0 would be a loss.
        means = {name: value / (self._count or math.nan) for name, value in sums.items()}
        speed = self._interval_tokens / max(1e-9, time.monotonic() - self._began)
        self._write(
            step=self.step,
            epoch=epoch,
            **means,
            learning_rate=learning_rate,
            grad_norm=self._grad_norm,
            tokens=self.tokens,
            tokens_per_second=speed,
        )
        text = f"{in_words(means)}, lr {learning_rate:.2e}, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(text)
        self._figures = text
        self._begin_interval()

    def print_line(self) -> None:
        """Without a terminal, print step and time left if the last line is 30 seconds old.

        The figures of a new record are in the line, too. The time is that of the steps after the
        first, which waits for data, compilation and memory.
        """
        num_done, num_left = self.step - self.first_step - 1, self.total_steps - self.step
        if num_done == 0:
            self._first_step_ended = time.monotonic()
        if not self._bar.disable or time.monotonic() < self._next_line:
            return
        parts = [self._figures] if self._figures else []
        if num_done > 0:
            parts.append(f"{time_left(self._first_step_ended, num_done, num_left)} left")
        if not parts:
            return
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self.say(f"step {self.step} of {self.total_steps}: {', '.join(parts)}")
        self._figures = ""

    def record_evaluation(self, metrics: Mapping[str, float], seconds: float) -> None:
        """Write the means of an evaluation. Its time does not count as training time."""
        self.check_gradients()
        self._write(step=self.step, **{f"eval_{name}": value for name, value in metrics.items()})
        self.say(f"step {self.step}: evaluation {in_words(metrics)}{self.evaluation_note}")
        self._began += seconds

    def say(self, text: str) -> None:
        """Print a line above the bar and flush it."""
        if self.is_rank0:
            with despite_full_disk():
                self._bar.write(text)
                sys.stdout.flush()

    def _begin_interval(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._count: float = 0
        self._interval_tokens = 0
        self._began = time.monotonic()

    def _sums_of_all_ranks(self) -> dict[str, float]:
        values = [float(value) for value in self._sums.values()]
        totals = processes.sum_over_ranks(values, self.device)
        return dict(zip(self._sums, totals, strict=True))

    def _write(self, **values: float) -> None:
        if self._log:
            problem = self._log.add({name: _rounded(value) for name, value in values.items()})
            if problem and not self._log_fails:
                self._log_fails = True
                self.say(
                    f"{self.path}: {problem}; training goes on without this log, which follows "
                    "when there is room"
                )
            if self.reports:
                self.reports.log(values)


def _rounded(value: float) -> float | None:
    """Six significant digits; None for infinity and NaN, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def plot_loss(run_dir: str | Path) -> Path:
    """Draw training and evaluation loss to `run_dir/loss.png`. ImportError without matplotlib.

    UserError on a full disk.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    unit = "row" if any("accuracy" in row for row in rows) else "token"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=f"loss per {unit}")
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    matches = [
        (row["step"], 100 * row["eval_exact_match"]) for row in rows if "eval_exact_match" in row
    ]
    if matches:
        axes.plot([], [], "g^:", label="exact match")  # for the legend of the first axes
        right = axes.twinx()
        right.plot(*zip(*matches, strict=True), "g^:")
        right.set(ylabel="exact match, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(run_dir) / "loss.png"
    save_figure(figure, path)
    return path
