"""The records of one file, by number: a JSON array, JSON lines, or lines of plain text.

    records = open_records("alpaca_data.jsonl")
    records[7], records.place(7)        # the eighth object, and "row 8 (line 8)"

Of lines only the offsets are held, eight bytes a row; a record is read when it is asked for, so a
file of any size opens in the time it takes to find its line ends. An array is parsed whole.
"""

import codecs
import os
from pathlib import Path

import numpy as np

from minisft.common.errors import UserError
from minisft.data.formats import BadRow, parse_json

BLOCK_SIZE = 4 * 2**20  # bytes searched for line ends at a time
NEWLINE, SPACE = 10, 32
# From other kinds of file that data sets come as.
WAYS_OUT = dict.fromkeys(
    (".csv", ".parquet"),
    "; convert it, for instance with pandas: "
    "read_csv or read_parquet, then to_json(..., orient='records', lines=True)",
) | dict.fromkeys((".gz", ".xz", ".zip", ".zst"), "; unpack it first")


def open_records(path, plain_text=False):
    """The records of a file, in the format that its content shows: an `Array` or `Lines`.

    plain_text: of a file whose name ends in .txt, each line is a record. Raises UserError for a
    file that cannot be read, is empty or is neither.
    """
    path = Path(path)
    try:
        start = _first_byte(path)
        if start in (b"\xff", b"\xfe"):  # the mark of UTF-16; no byte of UTF-8
            raise UserError(f"{path}: not UTF-8 text; convert the file")
        if plain_text and path.suffix.lower() == ".txt":
            return Lines(path, is_json=False)
        if start == b"{":
            return Lines(path, is_json=True)
        if start == b"[":
            return Array(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    what = "neither a JSON array nor JSON lines (plain text is for --stage pt, in a .txt file)"
    what += WAYS_OUT.get(path.suffix.lower(), "")
    raise UserError(f"{path}: {what if start else 'the file is empty'}")


class Array:
    """A file that is one JSON array, in memory."""

    is_json = True

    def __init__(self, path):
        self.path = path
        content = path.read_bytes()
        self.size = len(content)
        try:
            self.records = parse_json(_decode(path, content))
        except BadRow as error:
            raise UserError(f"{path}, {error}") from error

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        return self.records[number]

    def place(self, number):
        """Where a record stands, for people."""
        return f"row {number + 1}"

    def sizes(self):
        """Bytes of each record, on average."""
        return np.full(len(self), self.size / max(1, len(self)))


class Lines:
    """A file of one record a line, each read when it is asked for. Blank lines do not count.

    Safe to hand to other processes: no open file is held.
    """

    def __init__(self, path, is_json):
        self.path, self.is_json = path, is_json
        self.starts, self.blank = _find_lines(path)
        self.stamp = _stamp(os.stat(path))
        self.size = int(self.starts[-1])

    def __len__(self):
        return len(self.starts) - 1

    def raw(self, number):
        """The bytes of a line, without its end."""
        # Blank lines may follow, up to where the next record starts.
        return self._read(number).split(b"\n", 1)[0].removeprefix(codecs.BOM_UTF8)

    def __getitem__(self, number):
        """The parsed JSON or the text of a line; BadRow where it is neither."""
        content = self.raw(number)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8 text; convert the file") from error
        return parse_json(text, self.line(number)) if self.is_json else text.rstrip("\r")

    def _read(self, number):
        start, end = self.starts[number], self.starts[number + 1]
        try:
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise UserError(f"{self.path}: changed while it was being read; start again")
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error

    def line(self, number):
        """The number of a record's line in the file, from 1."""
        records_before = self.blank - np.arange(len(self.blank))
        return number + 1 + int(np.searchsorted(records_before, number, side="right"))

    def place(self, number):
        """Where a record stands, for people."""
        return f"row {number + 1} (line {self.line(number)})"

    def sizes(self):
        """Bytes of each record."""
        return np.diff(self.starts)


def _find_lines(path):
    """(offsets of the lines with something in them and of the file's end, numbers of the others).

    int64 both; lines are numbered from 0.
    """
    starts, blank, offset, line = [], [], 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            block += file.readline()  # whole lines only
            content = np.frombuffer(block, np.uint8)
            begins = np.append(0, np.flatnonzero(content[:-1] == NEWLINE) + 1)
            filled = np.logical_or.reduceat(content > SPACE, begins)
            starts.append(offset + begins[filled])
            blank.append(line + np.flatnonzero(~filled))
            offset, line = offset + len(block), line + len(begins)
    return np.concatenate([*starts, [offset]]), np.concatenate([*blank, []]).astype(np.int64)


def _stamp(status):
    return status.st_size, status.st_mtime_ns


def _first_byte(path):
    """The first byte that is not white space, b"" if there is none."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            if text := block.removeprefix(codecs.BOM_UTF8).strip():
                return text[:1]
    return b""


def _decode(path, content):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; convert the file") from error
