"""Progress of long work: a bar in a terminal, a line every 30 seconds in a file or a pipe.

with ProgressBar(5200, "row", done=200) as bar:
    bar.update(8)                               # 208 of 5,200 rows, 7 minutes left
"""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from minisft.common import processes
from minisft.common.words import duration

# Without a terminal, a line of progress comes at most this often.
SECONDS_BETWEEN_LINES = 30


class ProgressBar:
    """Counts the finished units of `total`. Only rank 0 shows them.

    unit: in the singular. title: what is counted, if the unit does not say it. done: units of an
    earlier run. Without a terminal, the first line comes after 30 seconds: short work prints none.
    """

    def __init__(self, total: int, unit: str, title: str = "", done: int = 0) -> None:
        self.total, self.unit, self.title = total, unit, title
        self.done = self.first = done
        is_rank0, is_terminal = processes.rank() == 0, sys.stderr.isatty()
        self._prints_lines = is_rank0 and not is_terminal
        self._bar = tqdm(
            desc=title or None,
            total=total,
            initial=done,
            unit=unit,
            disable=not (is_rank0 and is_terminal),
        )
        self._began = time.monotonic()
        self._next_line = self._began + SECONDS_BETWEEN_LINES

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, note: str) -> None:
        """Show a note after the bar, such as the part of the work that is going on."""
        self._bar.set_postfix_str(note)

    def update(self, count: int) -> None:
        """Count finished units."""
        self.done += count
        self._bar.update(count)
        if not self._prints_lines or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        title = f"{self.title}: " if self.title else ""
        left = time_left(self._began, self.done - self.first, self.total - self.done)
        processes.print_rank0(f"{title}{self.done:,} of {self.total:,} {self.unit}s, {left} left")


def time_left(began: float, num_done: int, num_left: int) -> str:
    """The time of the units to come, at the mean speed so far, as text.

    began: time.monotonic() before the first of the units that are done.
    """
    return duration(num_left * (time.monotonic() - began) / max(1, num_done))
