"""Find the text of messages in a rendered conversation.

A message may spell a control token: "what does <|im_end|> mean?". In the rendered text it looks
like the template's own. So the conversation is rendered a second time, with a mark before and
after each message text, and the marks tell them apart:

    <|im_start|>user\n[what does <|im_end|> mean?]<|im_end|>\n

The marks are inside the white space around a text, because many templates trim it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from minisft.common.errors import UserError
from minisft.text.render_process import GENERATION_END, GENERATION_START

# Unicode noncharacters, reserved for uses such as this.
START, END = "\ufdd2", "\ufdd3"
MARKS = (GENERATION_START, GENERATION_END, START, END)
MARK = re.compile(f"[{''.join(MARKS)}]")

Span = tuple[int, int]


def texts_of(value: Any) -> Iterator[str]:
    """Every string in messages or tools, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def with_marks(value: Any, needs_marks: Any) -> Any:
    """Messages or tools with marks around the strings that need them.

    needs_marks: function of a string. Keys of objects are strings, too.
    """
    if isinstance(value, str) and needs_marks(value):
        core = value.strip()
        before, after = value.split(core, 1) if core else ("", "")
        return f"{before}{START}{core}{END}{after}" if core else value
    if isinstance(value, dict):
        return {
            with_marks(key, needs_marks): with_marks(item, needs_marks)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_marks(item, needs_marks) for item in value]
    return value


def without_marks(text: str) -> tuple[str, list[Span], list[Span]]:
    """(text, spans of message texts in it, spans of {% generation %} blocks in it).

    Marked texts may be nested, such as strings in a tool call's arguments, written as JSON.
    """
    if not any(mark in text for mark in MARKS):  # ten times as fast as the pattern
        return text, [], []
    spans: dict[str, list[Span]] = {START: [], GENERATION_START: []}
    opened: dict[str, list[int]] = {START: [], GENERATION_START: []}
    parts, length, place = [], 0, 0
    for found in MARK.finditer(text):
        parts.append(text[place : found.start()])
        length, place = length + len(parts[-1]), found.end()
        if found[0] in opened:
            opened[found[0]].append(length)
            continue
        kind = START if found[0] == END else GENERATION_START
        if opened[kind]:
            spans[kind].append((opened[kind].pop(), length))
    parts.append(text[place:])
    return "".join(parts), spans[START], spans[GENERATION_START]


def marks_are_paired(text: str) -> bool:
    """True if every mark of a message text has its counterpart.

    A template that cuts a message, as `content.split('</think>')[-1]` does, may lose one of two.
    """
    depth = 0
    for mark in re.findall(f"[{START}{END}]", text):
        depth += 1 if mark == START else -1
        if depth < 0:
            return False
    return depth == 0


def hold_written_texts(spans: list[Span], text: str, written: Iterable[str]) -> bool:
    """True if every span of a text holds one of the written strings, as it is or as JSON.

    Otherwise the template cuts or changes messages, and may write its own words between two marks.
    """
    cores = {core for string in written if (core := string.strip())}
    cores |= {json.dumps(core, ensure_ascii=False)[1:-1] for core in cores}
    return all(text[start:end] in cores for start, end in spans)


def check_no_marks(texts: str) -> None:
    """UserError if the texts of messages contain a mark."""
    for mark in MARKS:
        if mark in texts:
            raise UserError(f"a message contains U+{ord(mark):X}, which is not a character")
