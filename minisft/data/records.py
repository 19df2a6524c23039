"""The records of one file, by number.

    records = open_records("alpaca_data.jsonl")
    records[7], records.place(7)        # the eighth object, and "row 8 (line 8)"

A file is a JSON array, JSON lines, JSON objects over several lines each, or lines of plain text;
unpack.py adds compressed files, parquet and Arrow. Only the offsets are in memory, eight or sixteen
bytes per row; a record is read when it is needed. So a file may be larger than memory, and opening
it only searches for line ends or brackets. An array of up to PARSED_BYTES is parsed at once.
"""

import codecs
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.common.lfs_pointers import refuse_pointer
from minisft.data.formats import turns_column
from minisft.data.objects import BLOCK_SIZE, NEWLINE, find_objects
from minisft.data.row_values import BadRow, parse_json
from minisft.data.unpack import is_columnar, is_packed, unpack

MAX_ROW_BYTES = 64 * 2**20  # parsing takes ten times as much memory
SPACE = ord(" ")
PARSED_BYTES = 64 * 2**20  # in a larger array, only the offsets of the rows are kept
# Suffixes of other kinds of file -> what to do with them.
HINTS = {".csv": "; convert it, for instance with pandas: read_csv, then to_parquet"}
HINTS |= dict.fromkeys((".md", ".html", ".text"), "; plain text is for --stage pt, in a .txt file")
HINTS |= {".npy": "; the rows that score.py has scored are those of its --dataset"}
HINTS |= dict.fromkeys((".bz2", ".xz", ".zip"), "; unpack it first")
# The kinds of LMFlow's {"type": ..., "instances": [...]} that minisft reads.
LMFLOW_TYPES = ("text_only", "text2text", "conversation")


class Array:
    """The records of a JSON array, in memory.

    content: the JSON text, of an array or of an object with an array of rows.
    """

    is_json = True

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.size = path, len(content)
        try:
            records = parse_json(_decode(path, content))
        except BadRow as error:
            raise UserError(f"{path}, {error}") from error
        self.records = records if isinstance(records, list) else unwrap(path, records) or []

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

    Holds no open file, so it can be sent to other processes. unpacked: the file to read, where
    `path` is packed; has_lines: False if the lines are not those of `path`.
    """

    def __init__(
        self, path: Path, is_json: bool, unpacked: Path | None = None, has_lines: bool = True
    ) -> None:
        self.path, self.is_json, self.has_lines = path, is_json, has_lines
        self.file = StoredBytes(unpacked or path)
        self.starts, blank = _find_lines(self.file.path)
        self.records_before_blank = blank - np.arange(len(blank))  # (blank lines,)
        self.size = int(self.starts[-1])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def raw(self, number: int) -> bytes:
        """The bytes of a record, without the line end."""
        # Blank lines may follow, up to the start of the next record.
        content = self.file.read(self.starts[number], self.starts[number + 1])
        return content.split(b"\n", 1)[0].removeprefix(codecs.BOM_UTF8)

    def __getitem__(self, number: int) -> Any:
        """The parsed JSON or the text of a line; BadRow if it is neither, or too long."""
        _check_size(self.starts, number)
        text = _text(self.raw(number))
        return parse_json(text, self.line(number)) if self.is_json else text.rstrip("\r")

    def line(self, number: int) -> int:
        """The line number of a record, from 1."""
        return number + 1 + int(np.searchsorted(self.records_before_blank, number, side="right"))

    def place(self, number: int) -> str:
        """Where a record is, for messages."""
        return f"row {number + 1}" + (f" (line {self.line(number)})" if self.has_lines else "")

    def sizes(self) -> np.ndarray:
        """Bytes of each record (N,)."""
        return np.diff(self.starts)


class Objects:
    """A file of JSON objects, one after another or in an array, over any lines; see Lines."""

    is_json = True

    def __init__(self, path: Path, unpacked: Path | None = None, in_array: bool = False) -> None:
        self.path, self.file = path, StoredBytes(unpacked or path)
        self.starts, self.lines = find_objects(self.file.path, in_array)
        self.size = int(self.starts[-1])

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> Any:
        """The parsed JSON of an object; BadRow if it is not JSON, or too long."""
        _check_size(self.starts, number)
        content = self.file.read(self.starts[number], self.starts[number + 1])
        # After an object of an array there is a comma, after the last one a bracket.
        return parse_json(_text(content).rstrip(",] \t\r\n"), int(self.lines[number]))

    def place(self, number: int) -> str:
        """Where a record is, for messages."""
        return f"row {number + 1} (line {self.lines[number]})"

    def sizes(self) -> np.ndarray:
        """Bytes of each record (N,)."""
        return np.diff(self.starts)


class StoredBytes:
    """Parts of a file that must not change."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, _stamp(os.stat(path))

    def read(self, start: int, end: int) -> bytes:
        """The bytes from start to end."""
        try:
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise UserError(f"{self.path}: changed while it was being read; start again")
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error


Records = Array | Lines | Objects


def open_records(path: str | Path, plain_text: bool = False) -> Records:
    """The records of a file. Its first bytes show the format.

    plain_text: in a .txt file every line is a record. Raises UserError if the file cannot be read,
    is empty, or has another format.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # /dev/stdin, or bash's <(...)
            raise UserError(
                f"{path} is not a file, and rows are read in any order. Write them to a file first."
            )
        unpacked = unpack(path) if is_packed(path) else path
        if unpacked != path and is_columnar(path):
            if not unpacked.stat().st_size:
                raise UserError(f"{path}: the file has no rows")
            return Lines(path, is_json=True, unpacked=unpacked, has_lines=False)
        start = _first_bytes(unpacked)
        if start.startswith((b"\xff", b"\xfe")):  # the byte order mark of UTF-16
            raise UserError(f"{path}: not UTF-8 text; convert the file")
        name = path.name if unpacked == path else path.stem
        if plain_text and name.lower().endswith(".txt"):
            refuse_pointer(path)
            return Lines(path, is_json=False, unpacked=unpacked)
        if start.startswith(b"{"):
            return _open_objects(path, unpacked)
        if start == b"[{" and unpacked.stat().st_size > PARSED_BYTES:
            return Objects(path, unpacked, in_array=True)
        if start.startswith(b"["):
            return Array(path, unpacked.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not start:
        raise UserError(f"{path}: the file is empty")
    refuse_pointer(path)
    if name.lower().endswith(".txt"):
        raise UserError(
            f"{path} is plain text, which train.py --stage pt reads. Conversations are a JSON "
            "array or JSON lines; see docs/data.md."
        )
    raise UserError(
        f"{path}: neither a JSON array nor JSON lines{HINTS.get(path.suffix.lower(), '')}"
    )


def _open_objects(path: Path, unpacked: Path) -> Records:
    """The records of a file that begins with a JSON object."""
    first, second = _first_lines(unpacked)
    try:
        record = parse_json(_text(first))
    except BadRow:
        # A broken line is a broken row; the next line begins with an object of its own.
        goes_on = second and not (first.endswith(b"}") or second.startswith(b"{"))
        if goes_on or _holds_several(first):
            return _open_several(path, unpacked)
    else:
        if not second and unwrap(path, record) is not None:
            return Array(path, unpacked.read_bytes())
    return Lines(path, is_json=True, unpacked=unpacked)


def _open_several(path: Path, unpacked: Path) -> Array | Objects:
    """The records of a file of objects that are not one in a line."""
    objects = Objects(path, unpacked)
    if len(objects) == 1:
        with suppress(BadRow):
            if unwrap(path, objects[0]) is not None:
                return Array(path, unpacked.read_bytes())
    return objects


def _holds_several(line: bytes) -> bool:
    """True if an object in a line is followed by another."""
    try:
        text = _text(line)
        return text[json.JSONDecoder().raw_decode(text)[1] :].lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def unwrap(path: Path, record: Any) -> list[Any] | None:
    """The rows of {"data": [...]} and of LMFlow's {"type": ..., "instances": [...]}.

    None for any other object. UserError for LMFlow's other types.
    """
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("instances"), list):
        type = record.get("type", LMFLOW_TYPES[0])
        if type not in LMFLOW_TYPES:
            raise UserError(
                f"{path}: minisft does not read LMFlow's type {type!r}, only "
                f"{', '.join(LMFLOW_TYPES)}; convert the file"
            )
        return record["instances"]
    rows, is_row = record.get("data"), turns_column(record) or "instruction" in record
    is_wrapper = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return rows if is_wrapper and not is_row else None


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


def _check_size(starts: np.ndarray, number: int) -> None:
    """BadRow if a record has more than MAX_ROW_BYTES."""
    size = int(starts[number + 1] - starts[number])
    if size > MAX_ROW_BYTES:
        raise BadRow(f"it has {size:,} bytes, and {MAX_ROW_BYTES:,} is the limit. Split it")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _first_lines(path: Path) -> tuple[bytes, bytes]:
    """The first two lines that are not blank, without white space around them."""
    with open(path, "rb") as file:
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
        filled = filter(None, lines)
        return next(filled, b""), next(filled, b"")


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8 text; convert the file") from error


def _first_bytes(path: Path) -> bytes:
    """The first two bytes that are not white space, or fewer if there are fewer."""
    first = b""
    with open(path, "rb") as file:
        while len(first) < 2 and (block := file.read(BLOCK_SIZE)):
            words = block.removeprefix(codecs.BOM_UTF8).split(maxsplit=2)
            first += b"".join(word[:2] for word in words)
    return first[:2]


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; convert the file") from error
