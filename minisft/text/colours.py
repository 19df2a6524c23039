"""Tokens as text for a terminal, in colour.

print(coloured(tokenizer, example.ids, example.supervised))
"""

from collections.abc import Sequence

from minisft.text.tokenizer import StreamDecoder, Tokenizer

# Control characters, which would change the terminal, are shown as text.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def coloured(tokenizer: Tokenizer, ids: Sequence[int], supervised: Sequence[bool]) -> str:
    """The text of tokens: supervised in green, no control characters."""
    stream = StreamDecoder(tokenizer, skip_special_tokens=False)
    shown, was_learned = "", False
    for id, learned in zip(ids, supervised, strict=True):
        if learned != was_learned:
            shown += "\033[32m" if learned else "\033[0m"
        shown, was_learned = shown + stream.push(id).translate(VISIBLE), learned
    return shown + stream.flush() + ("\033[0m" if was_learned else "")
