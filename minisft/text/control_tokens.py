"""Rendered text to token ids: control tokens by id, the text between them in one piece.

    tokens = ControlTokens(tokenizer)
    matches = tokens.find("<|im_start|>user\nHi<|im_end|>", message_spans=[(17, 19)])
    ids = tokens.encode(text, 0, len(text), matches)

The ids are those of transformers for the same text, except that a control token which a message
spells stays text.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from minisft.text.marks import Span
from minisft.text.tokenizer import Tokenizer

MAX_WORDS, MAX_KEPT = 40, 1000  # characters and texts whose ids are kept


class Match(NamedTuple):
    """A control token in a text.

    start and end include the white space that it swallows, token_start and token_end do not.
    """

    start: int
    end: int
    id: int
    token_start: int
    token_end: int


class ControlTokens:
    """The special tokens of a tokenizer, as they are spelled in text.

    ids: {spelling: id}. spellings: {id: spelling}.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._ids_of_words: dict[tuple[str, bool], list[int]] = {}
        texts = {id: tokenizer.token_text(id) for id in tokenizer.special_ids}
        self.spellings = {id: text for id, text in texts.items() if text}
        self.ids = {text: id for id, text in self.spellings.items()}
        # The longest first: <|end_of_text|> before <|end|>.
        patterns = []
        for text in sorted(self.ids, key=len, reverse=True):
            strips_left, strips_right = tokenizer.engine.strips.get(self.ids[text], (False, False))
            patterns.append(r"\s*" * strips_left + re.escape(text) + r"\s*" * strips_right)
        self.pattern = re.compile("|".join(patterns)) if patterns else None
        self._all = "\0".join(self.ids)
        self._edges = {text[0] for text in self.ids} | {text[-1] for text in self.ids}

    def could_be_spelled(self, text: str) -> bool:
        """True if a text holds the first or the last character of a control token."""
        return any(edge in text for edge in self._edges)

    def could_be_part(self, text: str) -> bool:
        """True if a text holds such a character, or is a middle part of a control token."""
        return self.could_be_spelled(text) or (bool(core := text.strip()) and core in self._all)

    def spelled_by(self, written: Sequence[str], text: str) -> str | None:
        """A control token in `text` that one of the written strings may have spelled, or None.

        A string may contain the token, or begin or end with a part of it.
        """
        for string in written:
            if matches := self.find(string):
                return self.spellings[matches[0].id]
        for token in dict.fromkeys(self.spellings[match.id] for match in self.find(text)):
            parts = range(1, len(token))
            heads, tails = tuple(token[:n] for n in parts), tuple(token[n:] for n in parts)
            for string in map(str.strip, written):
                if string.endswith(heads) or string.startswith(tails):
                    return token
        return None

    def find(self, text: str, message_spans: Sequence[Span] = ()) -> list[Match]:
        """The control tokens in a text that do not touch a message's text."""
        if self.pattern is None:
            return []
        matches: list[Match] = []
        place = 0
        while found := self.pattern.search(text, place):
            spelled, token_start = found[0], found.start()
            if spelled not in self.ids:  # white space around it
                spelled = spelled.strip()
                token_start += found[0].index(spelled)
            token_end = token_start + len(spelled)
            if message_spans and any(a < token_end and token_start < b for a, b in message_spans):
                place = token_start + 1
            else:
                matches.append(Match(*found.span(), self.ids[spelled], token_start, token_end))
                place = token_end
        return matches

    def encode(self, text: str, start: int, end: int, matches: Sequence[Match]) -> list[int]:
        """The ids of text[start:end], as they follow text[:start].

        matches: the control tokens of the text, from `find`. They swallow no white space beyond
        start and end.
        """
        if start >= end:
            return []
        ids, place = [], start
        first = bisect_left(matches, start, key=attrgetter("token_start"))
        before = matches[max(first - 1, 0) : first]  # no earlier one can reach to `start`
        after_control = any(match.token_end <= start <= match.end for match in before)
        for number in range(first, len(matches)):
            match = matches[number]
            if match.token_end > end:
                break
            if place < match.start:
                ids += self._run(text, place, match.start, after_control)
            ids.append(match.id)
            place, after_control = match.end, True
        if place < end:
            ids += self._run(text, place, end, after_control)
        return ids

    def _run(self, text: str, start: int, end: int, after_control: bool) -> list[int]:
        prefixed = start == 0 or (after_control and self.tokenizer.prefix_after_special)
        part = text[start:end]
        if len(part) > MAX_WORDS:
            return self.tokenizer.encode(part, continuation=not prefixed)
        # Probably the template's words, which are the same in every conversation.
        if (part, prefixed) not in self._ids_of_words:
            if len(self._ids_of_words) == MAX_KEPT:
                self._ids_of_words.clear()
            self._ids_of_words[part, prefixed] = self.tokenizer.encode(part, not prefixed)
        return self._ids_of_words[part, prefixed]
