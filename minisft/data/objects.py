"""JSON objects one after another, each over any number of lines, as `jq .` writes them.

    starts, lines = find_objects("rows.jsonl")      # byte offsets and line numbers

The file is read once, in blocks, to find where each object begins. So it may be larger than memory.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minisft.common.errors import UserError

BLOCK_SIZE = 4 * 2**20  # bytes searched at a time
NEWLINE, SPACE, QUOTE, BACKSLASH = (ord(character) for character in '\n "\\')
OPENING, CLOSING = ([ord(character) for character in pair] for pair in ("{[", "}]"))


def find_objects(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of the objects and of the file's end (N + 1,), line number of each object (N,)).

    UserError if brackets do not match, or if there is something else between the objects.
    """
    finder = _Finder(Path(path))
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            finder.search(np.frombuffer(block, np.uint8))
    return finder.finish()


@dataclass
class _Finder:
    """The state of the search after a block."""

    path: Path
    offset: int = 0
    newlines: int = 0
    depth: int = 0  # open brackets
    in_string: bool = False
    backslashes: int = 0  # at the end of the block
    starts: list[np.ndarray] = field(default_factory=list)
    lines: list[np.ndarray] = field(default_factory=list)

    def search(self, block: np.ndarray) -> None:
        """Find the objects that begin in a block of bytes (N,)."""
        in_string = self._in_string(block)
        opens = np.isin(block, OPENING) & ~in_string
        closes = np.isin(block, CLOSING) & ~in_string
        depth = self.depth + np.cumsum(opens.astype(np.int32) - closes)
        line_ends = np.flatnonzero(block == NEWLINE)
        between = (depth == 0) & ~closes & (block > SPACE)
        before_text = max(0, 3 - self.offset)  # a byte order mark may be there
        between[:before_text] &= block[:before_text] < 0x80
        if wrong := np.flatnonzero((depth < 0) | between)[:1].tolist():
            line = self.newlines + np.searchsorted(line_ends, wrong[0]) + 1
            raise UserError(f"{self.path}, line {line}: not valid JSON between two objects")
        starts = np.flatnonzero(opens & (depth == 1))
        self.starts.append(self.offset + starts)
        self.lines.append(self.newlines + np.searchsorted(line_ends, starts) + 1)
        self.offset, self.newlines = self.offset + len(block), self.newlines + len(line_ends)
        self.depth = int(depth[-1])

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The offsets and line numbers of all objects."""
        starts, lines = np.concatenate([*self.starts, [self.offset]]), np.concatenate(self.lines)
        if self.depth:
            raise UserError(
                f"{self.path}, line {lines[-1]}: the object that begins here has no end"
            )
        return starts, lines

    def _in_string(self, block: np.ndarray) -> np.ndarray:
        """bool (N,): True from the opening quote of a string to before its closing quote."""
        # An odd number of backslashes before a quote makes it part of the string.
        numbers = np.arange(len(block))
        others = np.where(block == BACKSLASH, -1 - self.backslashes, numbers)
        last_other = np.maximum.accumulate(np.append(-1 - self.backslashes, others))
        before = numbers - 1 - last_other[:-1]  # backslashes that end before each byte
        is_quote = (block == QUOTE) & (before % 2 == 0)
        in_string = (np.cumsum(is_quote) + self.in_string) % 2 == 1
        self.in_string = bool(in_string[-1])
        self.backslashes = int(len(block) - 1 - last_other[-1])
        return in_string
