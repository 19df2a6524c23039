"""The forms in which chat templates expect tool calls.

    with_call_form(messages, CallForm(arguments_as_text=True, with_ids=False))

transformers' standard form has the arguments as an object and no ids. Some templates need them as
JSON text, and Mistral's need an id of every call.
"""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallForm:
    """The form in which a template expects tool calls."""

    arguments_as_text: bool  # JSON text instead of an object
    with_ids: bool  # every call has an id, and its result repeats it


def with_call_form(messages: list[dict[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """Messages whose tool calls have the form that a template expects."""
    changed, open_ids, number = [], [], 0
    for message in messages:
        if calls := message.get("tool_calls"):
            new_calls, open_ids = [], []
            for call in calls:
                function = call["function"]
                if form.arguments_as_text:
                    text = json.dumps(function["arguments"], ensure_ascii=False)
                    function = {**function, "arguments": text}
                call = {**call, "function": function}
                if form.with_ids:
                    call.setdefault("id", f"call{number:05}")
                    open_ids.append(call["id"])
                number += 1
                new_calls.append(call)
            message = {**message, "tool_calls": new_calls}
        elif form.with_ids and message["role"] == "tool" and open_ids:
            message = {"tool_call_id": open_ids.pop(0), **message}
        changed.append(message)
    return changed
