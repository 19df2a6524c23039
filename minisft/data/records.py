"""The records of one file, by number: a JSON array, JSON lines, or lines of plain text.

    records = open_records("alpaca_data.jsonl")
    records[7], records.place(7)        # the eighth object, and "row 8 (line 8)"

For JSON lines only the offsets are in memory, eight bytes per row; a record is read when it is
needed. So a file may be larger than memory, and opening it only searches for line ends. A JSON
array is parsed at once.
"""

import codecs
import os
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.common.lfs_pointers import refuse_pointer
from minisft.data.row_values import BadRow, parse_json

BLOCK_SIZE = 4 * 2**20  # bytes searched for line ends at a time
NEWLINE, SPACE = 10, 32
_CONVERT = (
    "; convert it, for instance with pandas: read_csv or read_parquet, then "
    "to_json(..., orient='records', lines=True)"
)
# Suffixes of other kinds of file -> what to do with them.
HINTS = dict.fromkeys((".csv", ".parquet"), _CONVERT)
HINTS |= dict.fromkeys((".gz", ".xz", ".zip", ".zst"), "; unpack it first")


class Array:
    """A file that is one JSON array, in memory."""

    is_json = True

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        self.size = len(content)
        try:
            self.records = parse_json(_decode(path, content))
        except BadRow as error:
            raise UserError(f"{path}, {error}") from error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Any:
        return self.records[number]

    def place(self, number: int) -> str:
        """Where a record is, for messages."""
        return f"row {number + 1}"

    def sizes(self) -> np.ndarray:
        """Bytes of each record (N,): the average."""
        return np.full(len(self), self.size / max(1, len(self)))


class Lines:
    """A file with one record per line, each read when it is needed. Blank lines do not count.

    Holds no open file, so it can be sent to other processes.
    """

    def __init__(self, path: Path, is_json: bool) -> None:
        self.path, self.is_json = path, is_json
        self.starts, self.blank = _find_lines(path)
        self.stamp = _stamp(os.stat(path))
        self.size = int(self.starts[-1])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def raw(self, number: int) -> bytes:
        """The bytes of a record, without the line end."""
        # Blank lines may follow, up to the start of the next record.
        return self._read(number).split(b"\n", 1)[0].removeprefix(codecs.BOM_UTF8)

    def __getitem__(self, number: int) -> Any:
        """The parsed JSON or the text of a line; BadRow if it is neither."""
        content = self.raw(number)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8 text; convert the file") from error
        return parse_json(text, self.line(number)) if self.is_json else text.rstrip("\r")

    def _read(self, number: int) -> bytes:
        start, end = self.starts[number], self.starts[number + 1]
        try:
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise UserError(f"{self.path}: changed while it was being read; start again")
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error

    def line(self, number: int) -> int:
        """The line number of a record, from 1."""
        records_before = self.blank - np.arange(len(self.blank))
        return number + 1 + int(np.searchsorted(records_before, number, side="right"))

    def place(self, number: int) -> str:
        """Where a record is, for messages."""
        return f"row {number + 1} (line {self.line(number)})"

    def sizes(self) -> np.ndarray:
        """Bytes of each record (N,)."""
        return np.diff(self.starts)


def open_records(path: str | Path, plain_text: bool = False) -> Array | Lines:
    """The records of a file. Its first character shows the format.

    plain_text: in a .txt file every line is a record. Raises UserError if the file cannot be read,
    is empty, or has another format.
    """
    path = Path(path)
    try:
        start = _first_byte(path)
        if start in (b"\xff", b"\xfe"):  # the byte order mark of UTF-16
            raise UserError(f"{path}: not UTF-8 text; convert the file")
        if plain_text and path.suffix.lower() == ".txt":
            refuse_pointer(path)
            return Lines(path, is_json=False)
        if start == b"{":
            return Lines(path, is_json=True)
        if start == b"[":
            return Array(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not start:
        raise UserError(f"{path}: the file is empty")
    refuse_pointer(path)
    raise UserError(
        f"{path}: neither a JSON array nor JSON lines (plain text is for --stage pt, in a .txt "
        f"file){HINTS.get(path.suffix.lower(), '')}"
    )


def _find_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the lines that are not blank and of the file's end; numbers of the blank lines.

    Both int64; lines are numbered from 0.
    """
    starts, blank, offset, line = [], [], 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            block += file.readline()  # up to the end of a line
            content = np.frombuffer(block, np.uint8)
            begins = np.append(0, np.flatnonzero(content[:-1] == NEWLINE) + 1)
            is_filled = np.logical_or.reduceat(content > SPACE, begins)
            starts.append(offset + begins[is_filled])
            blank.append(line + np.flatnonzero(~is_filled))
            offset, line = offset + len(block), line + len(begins)
    return np.concatenate([*starts, [offset]]), np.concatenate([*blank, []]).astype(np.int64)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _first_byte(path: Path) -> bytes:
    """The first byte that is not white space, b"" if there is none."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            if text := block.removeprefix(codecs.BOM_UTF8).strip():
                return text[:1]
    return b""


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; convert the file") from error
