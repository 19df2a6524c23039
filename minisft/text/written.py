"""Check that a template has written a message: no text of a row is lost on the way to the ids.

    check_written({"role": "user", "content": "Hi"}, "<|im_start|>user\\nHi<|im_end|>\\n", number=1)

A template may trim and indent texts, or write them as JSON. It may remove flags such as /no_think
from system prompts and questions: it follows them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from minisft.common.errors import UserError
from minisft.text.messages import Message

FLAG = re.compile(r"(?<![\w/])/(?:no_think|think|system_override)(?![\w/])")


def check_written(message: Message, text: str, number: int) -> None:
    """UserError if a rendered text does not contain the texts and the calls of message `number`."""
    who = f"message {number} ({message['role']}): the template changes or omits its"
    for name in ("content", "input", "reasoning_content"):
        said = message.get(name)
        if not said or contains(text, said):
            continue
        has_flags = message["role"] in ("system", "user")
        if not (has_flags and contains(FLAG.sub("", text), FLAG.sub("", said))):
            raise UserError(f"{who} {name}: {said.strip()[:40]!r}")
    place = 0
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        found = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)").search(text, place)
        if not found:
            raise UserError(f"{who} call of {name}. Some templates write a single call per answer")
        place = found.end()
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        for value in values_of(arguments):
            if not contains(text[place:], value):
                raise UserError(f"{who} call of {name}: {str(value)[:40]!r} in its arguments")


def contains(text: str, value: Any) -> bool:
    """True if a text contains a string, number or boolean, apart from white space."""
    if isinstance(value, str) and value.strip() in text:
        return True
    compact = "".join(text.split())
    return any("".join(spelled.split()) in compact for spelled in spellings(value))


def spellings(value: Any) -> list[str]:
    """A value as it is, as Python, as JSON, and as JSON inside JSON; without quotes around it."""
    if not isinstance(value, str):
        return [str(value), json.dumps(value)]
    as_json = [json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
    return [
        value,
        repr(value)[1:-1],
        *as_json,
        *(json.dumps(spelled, ensure_ascii=False)[1:-1] for spelled in as_json),
    ]


def values_of(arguments: Any) -> Iterator[Any]:
    """Every key, string, number and boolean of a call's arguments.

    Some templates omit arguments that are null, which mean the same as missing ones.
    """
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            if value is not None:
                yield key
                yield from values_of(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from values_of(value)
    elif arguments is not None:
        yield arguments
