"""Functions in conversations: how they are offered, called and answered, as Qwen2.5 has it.

    system = offer("Be brief.", [{"name": "add", "parameters": {}}])
    call_text({"name": "add", "arguments": {"left": 1}}, number=2)

All templates use these words; the ones of Llama 3.1 and Mistral for functions are not known here.
"""

import json

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


def offer(system, tools):
    """The system prompt with the descriptions of functions (JSON objects) behind it."""
    lines = "".join(["\n" + json.dumps(tool, ensure_ascii=False) for tool in tools])
    return (system + TOOLS.replace("{tools}", lines)).lstrip("\n")


def call_text(call, number):
    """A call of a function, `{"name", "arguments"}`, as Qwen2.5 writes it."""
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        raise UserError(f"message {number}: a tool call needs a name and arguments")
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    name = json.dumps(call["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def merge_tool_messages(messages):
    """What functions returned, one or several in a row, is one user turn (as in Qwen2.5)."""
    turns = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if turns and turns[-1]["role"] == "tool":
                turns[-1]["content"] += "\n" + text
                continue
            message = {**message, "content": text}
        turns.append(message)
    return turns
