"""The formats of instruction data: one parsed JSON row -> a conversation.

    messages, tools = parse_conversation({"instruction": "Add.", "input": "1 2", "output": "3"})

    alpaca     instruction, input, output, system, history
    sharegpt   conversations: [{"from": "human", "value": ...}, {"from": "gpt", ...}], system, tools
    openai     messages: [{"role": "user", "content": ...}, {"role": "assistant", ...}], tools
    firefly    kind, input, target

The columns of a row show its format; other columns are ignored. row_forms.py turns other layouts
into these. A conversation is a list of
{"role": "system" | "user" | "assistant" | "tool", "content": str}. A user message may carry
Alpaca's "input". An assistant message may carry "tool_calls": [{"name": str, "arguments": dict}],
its thoughts as "reasoning_content", and "weight", "train" or "mask", which say if it is learned.

The tour explains it: docs/tour/01_row.md.
"""

import json
from typing import Any

from minisft.common.errors import UserError
from minisft.common.words import list_names
from minisft.data.row_values import (
    BadRow,
    check_encodable,
    check_text_only,
    kind_of,
    list_of,
    object_of,
    parse_json_or_none,
    string_of,
)
from minisft.data.turn_order import standard_order
from minisft.text.messages import (
    ROLES,
    THOUGHTS_IN_TEXT,
    Message,
    calls_of,
    check_refusal,
    content_text,
    is_learned,
    standard_call,
    thoughts_of,
)

Messages = list[Message]
Tools = list[dict[str, Any]] | None

KNOWN_FORMATS = (
    "alpaca (instruction, input, output), sharegpt (conversations), openai (messages), "
    "firefly (kind, input, target), trl (prompt, completion), text2text (input, output) "
    "and preferences (prompt, chosen, rejected)"
)
PREFERENCE_DATA = (
    "preference data has several answers to compare, not a single answer. Give a file "
    "with one answer per prompt, or use train.py --stage dpo or rm, or score.py --mode reward"
)
PREFERENCE_COLUMNS = {"chosen", "rejected"}
SPEAKERS = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# Fields of a turn that are kept unchanged: whether it is learned, and names that templates write.
KEPT_FIELDS = ("weight", "train", "mask", "name", "tool_call_id")
SHAREGPT_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def parse_conversation(record: Any, changes: list[str] | None = None) -> tuple[Messages, Tools]:
    """The messages and tools of a row. BadRow says what is wrong with it.

    changes: receives a note on each change that turn_order.py makes.
    """
    record = object_of(record)
    if record.keys() >= PREFERENCE_COLUMNS and not has_single_answer(record):
        raise BadRow(PREFERENCE_DATA)
    check_text_only(record)
    if "instruction" in record:
        messages = [*alpaca_prompt(record), alpaca_answer(record)]
    elif column := turns_column(record):
        messages = parse_turns(record, column)
    elif "target" in record or {"kind", "input"} <= record.keys():
        messages = [question(string_of(record, "input")), answer(string_of(record, "target"))]
    else:
        columns = list_names([*map(str, record)], 10) or "none"
        hint = "; plain text is for --stage pt" if "text" in record else ""
        raise BadRow(
            f"no known format has the columns {columns}. Known are {KNOWN_FORMATS}{hint}; other "
            "names can be given in dataset_info.json"
        )
    messages, tools = with_system(record, messages), parse_tools(record)
    messages = standard_order(messages, [] if changes is None else changes)
    check_encodable([messages, tools])
    return messages, tools


def parse_text(record: Any) -> str:
    """The column "text" of a row, for pre-training."""
    record = object_of(record)
    if "text" not in record:
        columns = list_names([*map(str, record)], 10) or "nothing"
        raise BadRow(
            f'there is no column "text", only {columns}; conversations are for --stage sft'
        )
    check_encodable(record["text"])
    return string_of(record, "text")


def to_sharegpt(messages: Messages, tools: Tools = None) -> dict[str, Any]:
    """A conversation as a ShareGPT row: the inverse of parse_conversation.

    Alpaca's input follows the instruction on a separate line; tool calls become JSON text.
    """
    row: dict[str, Any] = {}
    turns = []
    for message in messages:
        content, speaker = message["content"], SHAREGPT_SPEAKERS[message["role"]]
        if message.get("tool_calls"):
            thoughts = content.strip()
            if thoughts and not THOUGHTS_IN_TEXT.fullmatch(thoughts):
                raise BadRow("an answer has text and tool calls; ShareGPT can express only one")
            calls = message["tool_calls"]
            speaker = "function_call"
            written = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
            content = "\n".join(filter(None, [thoughts, written]))
        if message.get("input"):
            content = "\n".join(filter(None, [content, message["input"]]))
        if speaker == "system":
            row["system"] = content
        else:
            kept = ("reasoning_content", *KEPT_FIELDS)
            more = {name: message[name] for name in kept if name in message}
            turns.append({"from": speaker, "value": content, **more})
    row["conversations"] = turns
    if tools:
        row["tools"] = json.dumps(tools, ensure_ascii=False)
    return row


# Parts of a row, also for preferences.py and chat/prompts.py


def has_single_answer(record: dict[str, Any]) -> bool:
    """True if a preference row also has a single answer."""
    turns = record.get("conversations", record.get("messages"))
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        return SPEAKERS.get(str(turns[-1].get("from", turns[-1].get("role")))) == "assistant"
    return bool(record.get("output") or record.get("target"))


def turns_column(record: dict[str, Any]) -> str | None:
    """The column that holds the turns of a ShareGPT or OpenAI row."""
    for column in ("conversations", "messages"):
        if column in record:
            return column
    return None


def alpaca_prompt(record: dict[str, Any]) -> Messages:
    """The messages of an Alpaca row before its answer: history, instruction and input."""
    messages = []
    for pair in list_of(record, "history") or []:
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            raise BadRow("history must be a list of [question, answer] pairs of strings")
        messages += [question(pair[0]), answer(pair[1])]
    return [*messages, question(string_of(record, "instruction"), string_of(record, "input"))]


def alpaca_answer(record: dict[str, Any]) -> Message:
    """The answer of an Alpaca row."""
    if "output" not in record:
        columns = list_names([*map(str, record)], 10)
        raise BadRow(
            f'there is no answer: the columns are {columns}. Alpaca rows need "output"; '
            "dataset_info.json can name another column"
        )
    if isinstance(record["output"], list):
        raise BadRow(PREFERENCE_DATA)
    return answer(string_of(record, "output"))


def question(text: str, input: str = "") -> Message:
    """A user message, with Alpaca's input if there is any."""
    if not text.strip() and not input.strip():
        raise BadRow("there is no question")
    message = {"role": "user", "content": text}
    return {**message, "input": input} if input else message


def answer(text: str) -> Message:
    """An assistant message."""
    if not text.strip():
        raise BadRow("there is no answer")
    return {"role": "assistant", "content": text}


def parse_turns(record: dict[str, Any], column: str) -> Messages:
    """A column of from/value or role/content turns."""
    messages = []
    for number, turn in enumerate(list_of(record, column) or [], start=1):
        try:
            messages.append(parse_turn(turn))
        except BadRow as error:
            raise BadRow(f"turn {number}: {error}") from error
    return messages


def parse_turn(turn: Any) -> Message:
    """One turn as a message."""
    if not isinstance(turn, dict):
        raise BadRow(f"a turn must be a JSON object, not {kind_of(turn)}")
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise BadRow(f"unknown speaker {speaker!r}; known are {', '.join(SPEAKERS)}")
    role = SPEAKERS[speaker]
    check_text_only(turn)
    content = _content(turn, role)
    message: Message = {"role": role, "content": content, **_kept_fields(turn, role)}
    try:
        check_refusal(turn)
        calls = calls_of(turn)
    except UserError as error:
        raise BadRow(f"the {speaker} turn {error}") from error
    if calls:
        if role != "assistant":
            raise BadRow(f"the {speaker} turn has tool_calls; only the assistant calls tools")
        message["tool_calls"] = _tool_calls(calls)
    elif speaker == "function_call":
        thoughts = THOUGHTS_IN_TEXT.match(content)
        place = thoughts.end() if thoughts else 0
        if calls := _calls_in_text(content[place:]):
            message |= {"content": content[:place].rstrip(), "tool_calls": calls}
    # A system prompt or a tool result may be empty; a question or an answer may not.
    needs_text = message["role"] in ("user", "assistant") and "tool_calls" not in message
    if needs_text and not content.strip():
        raise BadRow(f"the {speaker} turn is empty")
    return message


def _content(turn: dict[str, Any], role: str) -> str:
    column = "value" if "value" in turn else "content"
    if role != "tool" and not isinstance(turn.get(column), list):
        return string_of(turn, column)
    try:
        return content_text(turn.get(column), role)
    except UserError as error:
        raise BadRow(str(error)) from error


def _kept_fields(turn: dict[str, Any], role: str) -> Message:
    """The fields of a turn besides its role, text and calls."""
    kept = {name: turn[name] for name in KEPT_FIELDS if turn.get(name) is not None}
    try:
        if thoughts := thoughts_of(turn, role):
            kept["reasoning_content"] = thoughts
        is_learned({**kept, "role": role})
    except UserError as error:
        raise BadRow(str(error)) from error
    return kept


def _calls_in_text(text: str) -> list[dict[str, Any]]:
    """The calls in a text that is the JSON of calls; none for any other text."""
    try:
        return _tool_calls(parse_json_or_none(text))
    except BadRow:
        return []


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """[{"name", "arguments"}], with "id" if it is given, of one call or several."""
    try:
        calls = [standard_call(call) for call in (value if isinstance(value, list) else [value])]
    except UserError as error:
        raise BadRow(f"tool_calls: {error}") from error
    return [call["function"] | ({"id": call["id"]} if "id" in call else {}) for call in calls]


def with_system(record: dict[str, Any], messages: Messages) -> Messages:
    """Put the system prompt of column "system" before the messages; drop blank system prompts."""
    system = {"role": "system", "content": string_of(record, "system")}
    return [
        message
        for message in [system, *messages]
        if message["role"] != "system" or message["content"].strip()
    ]


def parse_tools(record: dict[str, Any]) -> Tools:
    """The tool descriptions in column "tools", None if there are none."""
    tools = list_of(record, "tools") or None
    if tools and not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools must be a list of objects, each describing a function")
    return tools
