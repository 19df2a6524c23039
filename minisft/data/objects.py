"""JSON objects in a file: one after another, as `jq .` writes them, or in an array.

    starts, lines = find_objects("rows.jsonl")      # byte offsets and line numbers

The file is read once, in blocks, to find where each object begins. So it may be larger than memory.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minisft.common.errors import UserError

BLOCK_SIZE = 4 * 2**20  # bytes searched at a time
NEWLINE, QUOTE, COMMA = map(ord, '\n",')
# Byte -> how it changes the number of open brackets; and the bytes that the search looks at.
STEPS = np.zeros(256, np.int32)
STEPS[[ord(bracket) for bracket in "{["]] = 1
STEPS[[ord(bracket) for bracket in "}]"]] = -1
IS_MARK = bytes(byte in b'{}[],"' for byte in range(256))


def find_objects(path: str | Path, in_array: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of the objects and of the file's end (N + 1,), line number of each object (N,)).

    in_array: the objects are the elements of an array, so commas may follow them. UserError if
    brackets do not match, or if there is a comma between objects that are not in an array.
    """
    finder = _Finder(Path(path), level=int(in_array))
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            # Blank out what is escaped: the quotes that are left begin and end strings.
            block = block.replace(rb"\\", b"  ")
            if block.endswith(b"\\"):
                block += file.read(1)
            finder.search(block.replace(rb"\"", b"  "))
    return finder.finish()


@dataclass
class _Finder:
    """The state of the search after a block. level: open brackets around the objects."""

    path: Path
    level: int
    offset: int = 0
    newlines: int = 0
    depth: int = 0  # open brackets
    in_string: bool = False
    starts: list[np.ndarray] = field(default_factory=list)
    lines: list[np.ndarray] = field(default_factory=list)

    def search(self, block: bytes) -> None:
        """Find the objects that begin in a block without escaped quotes."""
        content = np.frombuffer(block, np.uint8)
        # A few bytes of a hundred: most of the work is done for these alone.
        places = np.flatnonzero(np.frombuffer(block.translate(IS_MARK), bool))
        is_quote = content[places] == QUOTE
        quotes = np.cumsum(is_quote) + self.in_string
        places = places[(quotes % 2 == 0) & ~is_quote]  # outside strings
        marks = content[places]
        depth = self.depth + np.cumsum(STEPS[marks])
        line_ends = np.flatnonzero(content == NEWLINE)
        if wrong := places[(depth < 0) | ((depth == 0) & (marks == COMMA))][:1].tolist():
            line = self.newlines + np.searchsorted(line_ends, wrong[0]) + 1
            raise UserError(f"{self.path}, line {line}: not valid JSON between two objects")
        starts = places[(STEPS[marks] > 0) & (depth == self.level + 1)]
        self.starts.append(self.offset + starts)
        self.lines.append(self.newlines + np.searchsorted(line_ends, starts) + 1)
        self.offset, self.newlines = self.offset + len(block), self.newlines + len(line_ends)
        self.depth += int(STEPS[marks].sum())
        self.in_string ^= bool(is_quote.sum() % 2)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The offsets and line numbers of all objects."""
        starts, lines = np.concatenate([*self.starts, [self.offset]]), np.concatenate(self.lines)
        if self.depth > self.level:
            raise UserError(
                f"{self.path}, line {lines[-1]}: the object that begins here has no end"
            )
        if self.depth:
            raise UserError(f"{self.path}: the array has no end. Is the file complete?")
        return starts, lines
