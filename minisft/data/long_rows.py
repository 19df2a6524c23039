"""The beginning of a huge conversation, where only its first tokens can matter.

    messages, note = beginning(row.messages, row.tools, num_tokens=1024)

A row may be a whole book, or hold a million tool calls. Encoding it would take minutes and
gigabytes, to keep `num_tokens` tokens. Characters bound tokens: no token has more than
MAX_CHARACTERS_PER_TOKEN, and every message has at least one. So the rest is removed before the row
is rendered. Rows of at most KEPT_CHARACTERS and KEPT_MESSAGES stay whole.
"""

from typing import Any

from minisft.common.errors import UserError
from minisft.text.messages import Message

MAX_CHARACTERS_PER_TOKEN = 256  # the longest tokens are 128 spaces
KEPT_CHARACTERS = 10**6
# The template writes a conversation anew for each answer, so the time grows with the square.
KEPT_MESSAGES = 1000
MAX_MESSAGES = 4000
NOTE = (
    f"more than {KEPT_CHARACTERS:,} characters or {KEPT_MESSAGES:,} messages. Only their beginning "
    "is read, so they are longer than reported"
)
# Beyond the limit, a conversation still goes on to its next answer. This is how many characters are
# kept of each message before that answer.
REST = 100


def beginning(
    messages: list[Message], tools: list[Any] | None, num_tokens: int
) -> tuple[list[Message], str]:
    """(the messages that the first `num_tokens` tokens can come from, a note if it drops some).

    The result ends with an answer, as the conversation does. UserError if its tools alone are too
    long, or if it has too many messages.
    """
    limit = max(KEPT_CHARACTERS, num_tokens * MAX_CHARACTERS_PER_TOKEN)
    if len(messages) <= KEPT_MESSAGES and count_characters(messages, tools) <= limit:
        return messages, ""
    room = limit - len(str(tools or ""))
    if room < 0:
        raise UserError(f"its tools have more than {limit:,} characters; leave some out")
    kept: list[Message] = []
    for message in messages:
        is_inside = room > 0 and len(kept) < max(KEPT_MESSAGES, num_tokens)
        if not is_inside and kept and kept[-1]["role"] == "assistant":
            break
        kept.append(_first_part(message, max(room, REST) if is_inside else REST))
        room -= count_characters(kept[-1:])
    if len(kept) > MAX_MESSAGES:
        raise UserError(
            f"{len(kept):,} messages may fit into {num_tokens:,} tokens, and {MAX_MESSAGES:,} is "
            "the limit. Split the conversation"
        )
    return kept, NOTE if kept != messages else ""


def count_characters(messages: list[Message], tools: list[Any] | None = None) -> int:
    """The length of all text in the messages and tools."""
    texts = [value for message in messages for name, value in message.items() if name != "role"]
    return sum(len(str(text or "")) for text in [*texts, tools])


def _first_part(message: Message, room: int) -> Message:
    """The message with at most `room` characters, but at least its first tool call."""
    part = dict(message)
    for name, value in message.items():
        if name != "role" and isinstance(value, str):
            part[name] = value if len(value) <= room else value.lstrip()[:room]
            room = max(room - len(part[name]), 1)
    calls = []
    for call in message.get("tool_calls") or []:
        room -= len(str(call))
        if calls and room < 0:
            break
        calls.append(call)
    return part | ({"tool_calls": calls} if calls else {})
