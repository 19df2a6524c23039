"""Messages in the form that chat templates read.

    messages, learned = standard_messages([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Add 1 and 2."}]},
        {"role": "assistant", "content": "3", "weight": 0},
    ])

Data sets spell messages in many ways. Here they become transformers' form: `content` is text,
`tool_calls` are {"type": "function", "function": {"name", "arguments": dict}}, thoughts are
`reasoning_content`. Anything that cannot be expressed is refused by name.
"""

import json
import re
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import TOO_DEEP, is_too_deep

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
THOUGHTS_IN_TEXT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
# The arguments of a call are called so by OpenAI, Llama 3, LangChain and Anthropic.
ARGUMENTS = ("arguments", "parameters", "args", "input")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Fields that only we read, or that the standard form spells differently.
CONSUMED = {"role", "content", "weight", "train", "mask", "function_call", "tool_calls", *THOUGHTS}


def standard_messages(messages: list[Message]) -> tuple[list[Message], list[bool]]:
    """(messages in the standard form, True for those whose answer is learned).

    An answer is not learned if it says `"weight": 0`, `"train": false` or `"mask": true`.
    Raises UserError, naming the message, for what cannot be expressed.
    """
    standard, learned = [], []
    for number, message in enumerate(messages, start=1):
        try:
            standard.append(_standard(message))
            learned.append(is_learned(message) and standard[-1]["role"] == "assistant")
        except UserError as error:
            role = message.get("role") if isinstance(message, dict) else None
            raise UserError(f"message {number} ({role}): {error}") from error
    return standard, learned


def is_learned(message: Message) -> bool:
    """True if `weight`, `train` and `mask` allow an answer to be learned."""
    weight, train, mask = message.get("weight"), message.get("train"), message.get("mask")
    if weight is not None and weight not in (0, 1):
        raise UserError(f"weight is {weight!r}; only 0 (not learned) and 1 are possible")
    for name, value in (("train", train), ("mask", mask)):
        if not isinstance(value, bool | None):
            raise UserError(f"{name} is {value!r}; it must be true or false")
    if message["role"] != "assistant" and (weight == 1 or train is True):
        asked = "train is true" if train is True else "weight is 1"
        raise UserError(f"{asked}; only answers of the assistant can be learned")
    return weight != 0 and train is not False and mask is not True


def standard_tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """Tools as {"type": "function", "function": {"name", ...}}; None for no tools."""
    if not tools:
        return None
    standard = []
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise UserError(f"tool {number} is not a JSON object")
        if "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        try:
            check_json(tool)
        except UserError as error:
            raise UserError(f"tool {number}: {error}") from error
        standard.append(tool)
    return standard


def check_json(value: Any) -> None:
    """UserError for anything that JSON cannot express."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            continue
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise UserError(f"the key {key!r} of an object is not a string")
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif not isinstance(item, int | float | None):
            raise UserError(f"a value of type {type(item).__name__} is not JSON")


def check_refusal(message: Message) -> None:
    """UserError for OpenAI's field `refusal`, which no template writes."""
    if message.get("refusal"):
        raise UserError("has a refusal, which no template writes; put its text into content")


def _standard(message: Any) -> Message:
    if not isinstance(message, dict):
        raise UserError("not a JSON object")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    role, content = ROLES[role], message.get("content")
    if len(message) == 2 and isinstance(content, str):  # most messages; nothing else to check
        return {"role": role, "content": content}
    for name in MEDIA:
        if message.get(name):
            raise UserError(f"has {name}; only text can be learned")
    check_refusal(message)
    check_json(message)
    standard: Message = {"role": role, "content": content_text(content, role)}
    standard |= {name: value for name, value in message.items() if name not in CONSUMED}
    if thoughts := thoughts_of(message, role):
        standard["reasoning_content"] = standard["thinking"] = thoughts
    if calls := calls_of(message):
        if role != "assistant":
            raise UserError("only the assistant calls tools")
        standard["tool_calls"] = [standard_call(call) for call in calls]
    return standard


def thoughts_of(message: Message, role: str) -> str | None:
    """The thoughts of a message, in any spelling. UserError unless they are an assistant's text."""
    thoughts = next((message[name] for name in THOUGHTS if message.get(name)), None)
    if thoughts and (role != "assistant" or not isinstance(thoughts, str)):
        raise UserError("reasoning_content must be the text of an assistant's thoughts")
    return thoughts


def calls_of(message: Message) -> list[Any]:
    """The tool calls of a message, as they are; also the call of the legacy function_call."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if calls and legacy:
        raise UserError("has tool_calls and function_call; give its calls in tool_calls")
    calls = calls or legacy or []
    return calls if isinstance(calls, list) else [calls]


def with_thoughts_apart(message: Message) -> Message:
    """Move <think>...</think> at the beginning of an answer to its reasoning_content."""
    found = THOUGHTS_IN_TEXT.match(message["content"])
    if message["role"] != "assistant" or message.get("reasoning_content") or not found:
        return message
    thoughts, message = found[1].strip(), {**message, "content": message["content"][found.end() :]}
    return message | ({"reasoning_content": thoughts, "thinking": thoughts} if thoughts else {})


def without_thoughts(message: Message) -> Message:
    """A copy of a message without its thoughts."""
    return {name: value for name, value in message.items() if name not in THOUGHTS}


def content_text(content: Any, role: str) -> str:
    """The content of a message as text. A tool's result may be any JSON value."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict | str) for part in content):
        texts = [_part_text(part) for part in content]
        if None not in texts:
            return "".join(text for text in texts if text is not None)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    parts = content if isinstance(content, list) else []
    for kind in (part.get("type") for part in parts if isinstance(part, dict)):
        if isinstance(kind, str) and kind != "text":
            raise UserError(f"content has a part of type {kind}; only text can be learned")
    raise UserError("content is neither text nor a list of text parts")


def _part_text(part: Any) -> str | None:
    """The text of a part of a content; None if it is something else."""
    if isinstance(part, str):
        return part
    text = part.get("text")
    return text if part.get("type", "text") == "text" and isinstance(text, str) else None


def standard_call(call: Any) -> dict[str, Any]:
    """A tool call; its arguments may be an object, a JSON string, empty, null or missing.

    UserError if it has fields in their place that we do not know.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError("a tool call needs a name and arguments")
    arguments = next((function[key] for key in ARGUMENTS if function.get(key) is not None), None)
    unknown = function.keys() - {*ARGUMENTS, "name", "id", "type", "index"}
    if arguments is None and unknown:
        raise UserError(f"the call of {function['name']} has {min(unknown)} in place of arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise UserError(f"the arguments of {function['name']} are not JSON: {error}") from error
        except RecursionError as error:
            raise UserError(f"the arguments of {function['name']} {TOO_DEEP}") from error
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of {function['name']} must be a JSON object")
    if is_too_deep(arguments):
        raise UserError(f"the arguments of {function['name']} {TOO_DEEP}")
    standard = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call.get("id"), str):
        standard["id"] = call["id"]
    return standard
