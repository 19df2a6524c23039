"""metrics.jsonl: a line for each record of a run. A full disk does not end the run.

log = MetricsLog("runs/cherry/metrics.jsonl", rows=[])      # replaces the file
problem = log.add({"step": 10, "loss": 0.5})                # None, or why the disk refuses the line
log.rows()                                                  # all rows, on the disk or not
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minisft.common.errors import first_line
from minisft.common.outputs import atomic_write


class MetricsLog:
    """The file of a run that is going on. Lines that do not fit on the disk wait in memory.

    rows: of an earlier part of the run. UserError if not even these can be written.
    """

    def __init__(self, path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
        self.path = Path(path)
        self._waiting: list[bytes] = []
        with atomic_write(self.path, "wb") as file:
            file.writelines(_line(row) for row in rows)
            self._size = file.tell()  # of the complete lines

    def add(self, row: Mapping[str, Any]) -> str | None:
        """Write a row, after those that wait. Returns why they cannot be written, or None."""
        self._waiting.append(_line(row))
        return self.write_waiting()

    def write_waiting(self) -> str | None:
        """Write the rows that wait. Returns why they cannot be written, or None."""
        try:
            with open(self.path, "ab") as file:
                file.truncate(min(self._size, file.tell()))  # the part of a line that did fit
                file.writelines(self._waiting)
                file.flush()
                self._size = file.tell()
        except OSError as error:
            return error.strerror or first_line(error)
        self._waiting.clear()
        return None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the file, and those that wait."""
        on_disk = self.path.read_bytes()[: self._size] if self.path.exists() else b""
        return [json.loads(line) for line in [*on_disk.splitlines(), *self._waiting]]


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that is still being written."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
