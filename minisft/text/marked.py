"""Tokens as text, with marks around those that the model learns: green, or brackets in a file.

marks = supervised_marks(sys.stdout)
print(marked(tokenizer, example.ids, example.supervised, marks), marks.meaning)
"""

from collections.abc import Sequence
from typing import NamedTuple, TextIO

from minisft.common.colours import has_colours
from minisft.text.tokenizer import StreamDecoder, Tokenizer

# Control characters, which would change the terminal, are shown as text.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Marks(NamedTuple):
    """What stands before and after supervised text, and the words that explain it."""

    begin: str
    end: str
    meaning: str


GREEN = Marks("\033[32m", "\033[0m", "in green")
BRACKETS = Marks("[[", "]]", "between [[ and ]]")


def supervised_marks(stream: TextIO) -> Marks:
    """Green for a terminal with colours, brackets for anything else."""
    return GREEN if has_colours(stream) else BRACKETS


def marked(
    tokenizer: Tokenizer, ids: Sequence[int], supervised: Sequence[bool], marks: Marks
) -> str:
    """The text of tokens: marks around supervised text, no control characters."""
    stream = StreamDecoder(tokenizer, skip_special_tokens=False)
    shown, was_learned = "", False
    for id, learned in zip(ids, supervised, strict=True):
        if learned != was_learned:
            shown += marks.begin if learned else marks.end
        shown, was_learned = shown + stream.push(id).translate(VISIBLE), learned
    return shown + stream.flush() + (marks.end if was_learned else "")
