"""Cut a huge text where no token crosses the cut.

    ids = [id for part in parts_of(text) for id in encode(part)]

Tokenizers need a few hundred bytes of memory per character, so they get one part after the other.
Before a single space, and after a single line end, every tokenizer that we read begins a new token:
byte-level ones by their pattern, SentencePiece because its pieces do not continue after a space.
(Mistral-Nemo's pattern goes on from ";" over the line end to a "/", so we do not cut before that.)
A test compares the ids with those of the text in one piece.
"""

import re
from collections.abc import Iterator

from minisft.common.errors import UserError

PART = 2**18  # characters
MAX_WORD = 10**6
CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=[^\s/])")


def check_text(text: str) -> None:
    """UserError if `parts_of` could not cut the text."""
    for _ in parts_of(text):
        pass


def parts_of(text: str) -> Iterator[str]:
    """The text in parts of about PART characters.

    UserError if MAX_WORD characters in a row offer no place to cut.
    """
    start = 0
    while len(text) - start > PART + MAX_WORD:
        place = start + PART
        found = CUT.search(text, place, place + MAX_WORD)
        if not found:
            raise UserError(
                f"{MAX_WORD:,} characters in a row without a single space or line end "
                f"(after character {place:,}). Is it text?"
            )
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
