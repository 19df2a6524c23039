"""Functions in conversations, in the form of Qwen2.5: offers, calls and results.

    system = offer("Be brief.", [{"name": "add", "parameters": {}}])
    call_text({"name": "add", "arguments": {"left": 1}}, number=2)

All templates use this form. The forms of Llama 3.1 and Mistral are not supported.
"""

import json
from typing import Any

from minisft.common.errors import UserError

TOOLS = """

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


def offer(system: str, tools: list[dict[str, Any]]) -> str:
    """The system prompt, followed by the descriptions of functions (JSON objects)."""
    lines = "".join(["\n" + json.dumps(tool, ensure_ascii=False) for tool in tools])
    return (system + TOOLS.replace("{tools}", lines)).lstrip("\n")


def call_text(call: Any, number: int) -> str:
    """A call `{"name", "arguments"}` in message `number`, as Qwen2.5 writes it."""
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        raise UserError(f"message {number}: a tool call needs a name and arguments")
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    name = json.dumps(call["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def merge_tool_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive results of functions to one turn."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if turns and turns[-1]["role"] == "tool":
                turns[-1]["content"] += "\n" + text
                continue
            message = {**message, "content": text}
        turns.append(message)
    return turns
