"""Tools as text, in the form of Qwen2.5, for templates that do not support them.

messages, learned = calls_as_text(messages, learned)           # calls and results as text
messages, learned = offer_tools(messages, learned, tools, "")  # into the system prompt
"""

import json
from typing import Any

from minisft.text.messages import Message

TOOLS_AS_TEXT = (
    "tools or tool calls, and the template does not know both; they become text, in Qwen2.5's form"
)

OFFER = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def offer_tools(
    messages: list[Message],
    learned: list[bool],
    tools: list[dict[str, Any]],
    default_system: str | None,
) -> tuple[list[Message], list[bool]]:
    """The messages with descriptions of the tools at the end of the system prompt.

    default_system: the template's own system prompt; None if it supports none. Then the
    tools come before the first question.
    """
    lines = "".join(["\n" + json.dumps(tool, ensure_ascii=False) for tool in tools])
    offer = OFFER.replace("{tools}", lines)
    if messages[0]["role"] == "system":
        text = (messages[0]["content"] + offer).lstrip("\n")
        return [{"role": "system", "content": text}, *messages[1:]], learned
    if default_system is not None:
        text = (default_system + offer).lstrip("\n")
        return [{"role": "system", "content": text}, *messages], [False, *learned]
    question = messages[0]
    text = f"{offer.lstrip()}\n\n{question['content']}"
    return [{**question, "content": text}, *messages[1:]], learned


def calls_as_text(messages: list[Message], learned: list[bool]) -> tuple[list[Message], list[bool]]:
    """The messages with calls as text of the answer and results as a user's turn."""
    texts, is_learned = [], []
    for message, learn in zip(messages, learned, strict=True):
        calls = message.get("tool_calls")
        if calls:
            parts = [message["content"], *map(call_text, calls)]
            message = {**message, "content": "\n".join(filter(None, parts))}
            del message["tool_calls"]
        elif message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if texts and texts[-1].get("is_result"):
                texts[-1]["content"] += "\n" + text
                continue
            message = {"role": "user", "content": text, "is_result": True}
        texts.append(message)
        is_learned.append(learn)
    return [
        {name: value for name, value in message.items() if name != "is_result"} for message in texts
    ], is_learned


def call_text(call: dict[str, Any]) -> str:
    """A call as Qwen2.5 writes it."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
