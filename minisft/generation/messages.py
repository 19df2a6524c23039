"""Check a conversation before the model answers it: types, empty questions, control characters.

check_messages([{"role": "user", "content": "What is 2 + 2?"}])
"""

import re
from typing import Any

from minisft.common.errors import UserError
from minisft.data.formats import Tools
from minisft.text.messages import Message, standard_messages

# No keyboard types these, and no terminal should print them. Tab, line ends and form feed are text.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def split_conversation(conversation: Any) -> tuple[list[Message], Tools]:
    """(messages, tools) of {"messages": [...], "tools": [...]}, where tools may be missing."""
    if not isinstance(conversation, dict) or "messages" not in conversation:
        raise UserError('not of the form {"messages": [{"role": ..., "content": ...}, ...]}')
    return conversation["messages"], conversation.get("tools")


def check_messages(messages: Any, tools: Any = None) -> list[Message]:
    """The messages in the form that templates read.

    UserError for values of the wrong type, an empty question, or control characters. The template
    checks the order of the roles.
    """
    if not _is_list_of_dicts(messages):
        raise UserError('messages must be a list of {"role": ..., "content": ...}')
    if not _is_list_of_dicts(tools or []):
        raise UserError("tools must be a list of objects, each describing a function")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("tool_calls") or [], list):
            raise UserError(f"message {number}: tool_calls must be a list")
    messages, _ = standard_messages(messages)
    for number, message in enumerate(messages, start=1):
        name = "the message" if number == len(messages) else f"message {number}"
        if message["role"] == "system":
            check_text(message["content"], "the system prompt")
        elif message["role"] == "user":
            if not message.get("input") and not message["content"].strip():
                raise UserError(f"{name} is empty")
            check_text(message["content"], name)
            check_text(message.get("input"), f'the "input" of {name}')
    return messages


def check_text(text: Any, name: str) -> None:
    """Raise UserError if `text` is neither a string nor None, or has a control character."""
    if not isinstance(text or "", str):
        raise UserError(f"{name}: content is not text")
    if match := CONTROL_CHARACTERS.search(text or ""):
        raise UserError(
            f"{name} has the control character U+{ord(match[0]):04X} (character "
            f"{match.start() + 1}). Remove it."
        )


def _is_list_of_dicts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)
