"""The formats of instruction data: one parsed JSON row -> a conversation.

    messages, tools = conversation({"instruction": "Add.", "input": "1 2", "output": "3"})

    alpaca     instruction, input, output, system, history
    sharegpt   conversations: [{"from": "human", "value": ...}, {"from": "gpt", ...}], system, tools
    openai     messages: [{"role": "user", "content": ...}, {"role": "assistant", ...}], tools
    firefly    kind, input, target

    conversations, tools = ranking({"prompt": "Add 1 2.", "chosen": "3", "rejected": "4"})

Rows of preferences have one of the first three forms, and beside it `chosen` and `rejected` (texts,
turns, or lists of turns), or in alpaca's a list of answers as `output`, the best first. An answer
that is there besides is that of `conversation`.

Which format a row has, its columns say; other columns are not read. A conversation is a list of
{"role": "system" | "user" | "assistant" | "tool", "content": str}. A user message may carry
Alpaca's "input", an assistant message "tool_calls": [{"name": str, "arguments": dict}].
"""

import json

from minisft.common.errors import UserError

KNOWN_FORMATS = (
    "alpaca (instruction, input, output), sharegpt (conversations), openai (messages) "
    "and firefly (kind, input, target)"
)
PREFERENCE_DATA = (
    "preference data (several answers to compare) do not say which single answer is meant; give a "
    "file with one answer to a prompt, or use train.py --stage dpo or rm, score.py --mode reward"
)
NO_PREFERENCE = (
    "there is nothing to prefer: --stage rm and dpo need the columns chosen and "
    "rejected, or a list of at least two answers as output"
)
JUDGED = {"chosen", "rejected"}  # the columns of two answers to compare
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


class BadRow(UserError):
    """What is wrong with a row; the caller adds the file and the number of the row."""


def parse_json(text, first_line=1):
    """`json.loads`, with the line and column of an error in the BadRow it raises."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        place = f"line {line} column {error.colno}"
        raise BadRow(f"{place}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"line {first_line}: JSON that cannot be read: {error}") from error


def conversation(record):
    """One parsed row -> (messages, tools or None); BadRow says why it cannot be learned from."""
    record = _columns(record)
    if record.keys() >= JUDGED and not _has_answer(record):
        raise BadRow(PREFERENCE_DATA)
    if "instruction" in record:
        messages = _alpaca(record)
    elif "conversations" in record or "messages" in record:
        messages = _turns(record, "conversations" if "conversations" in record else "messages")
    elif "target" in record or {"kind", "input"} <= record.keys():
        messages = _exchange(_string(record, "input"), "", _string(record, "target"))
    else:
        raise BadRow(_unknown_columns(record))
    messages, tools = _with_system(record, messages), _tools(record)
    _check_order(messages)
    _check_unicode([messages, tools])
    return messages, tools


def ranking(record):
    """One parsed row of preferences -> (conversations, the best first, and tools or None).

    Each is a list of messages; they differ in their last answer, or in all that follows a common
    beginning. BadRow says why there is nothing to compare.
    """
    record = _columns(record)
    if record.keys() >= JUDGED:
        answers = {name: _answer(name, record[name]) for name in ("chosen", "rejected")}
        # The chosen conversation may be given whole; what stands in "prompt" is then in it.
        whole = any(answer[0]["role"] != "assistant" for answer in answers.values())
        prompt = [] if whole else _prompt(record)
    elif isinstance(record.get("output"), list) and len(record["output"]) > 1:
        names = [f"answer {number} of output" for number in range(1, 1 + len(record["output"]))]
        answers = {
            name: _answer(name, one) for name, one in zip(names, record["output"], strict=True)
        }
        prompt = _alpaca_prompt(record)
    else:
        raise BadRow(NO_PREFERENCE)
    tools, conversations = _tools(record), []
    for name, answer in answers.items():
        messages = _with_system(record, prompt + answer)
        try:
            _check_order(messages)
        except BadRow as error:
            raise BadRow(f"with {name}: {error}") from error
        conversations.append(messages)
    questions = [[one for one in turns if one["role"] == "user"][:1] for turns in conversations]
    if questions.count(questions[0]) < len(questions):
        raise BadRow("the answers are to different questions, so neither is the better one")
    _check_unicode([conversations, tools])
    return conversations, tools


def _has_answer(record):
    """Whether a row has an answer beside those to compare."""
    turns = record.get("conversations", record.get("messages"))
    if not (isinstance(turns, list) and turns and isinstance(turns[-1], dict)):
        return bool(record.get("output") or record.get("target"))
    return ROLES.get(str(turns[-1].get("from", turns[-1].get("role")))) == "assistant"


def _prompt(record):
    """The messages before the answers, in any of the formats."""
    given = record.get("prompt")
    if isinstance(given, list):
        return _turns(record, "prompt")
    if isinstance(given, str):
        return [_question(given, "")]
    if "conversations" in record or "messages" in record:
        return _turns(record, "conversations" if "conversations" in record else "messages")
    if "instruction" in record:
        return _alpaca_prompt(record)
    raise BadRow(
        "chosen and rejected have no question: there is none of the columns prompt, "
        "instruction, conversations and messages, and they are not lists of turns that "
        "begin with the user's"
    )


def _answer(name, value):
    """The messages of an answer: from a text, a turn or a list of turns."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise BadRow(f"{name} is empty")
    try:
        return [_message(turn) for turn in turns]
    except BadRow as error:
        raise BadRow(f"{name}: {error}") from error


def sharegpt(messages, tools=None):
    """A conversation as a row in the sharegpt format: the inverse of `conversation`.

    Alpaca's second field follows the first on a line of its own; calls of functions are JSON.
    """
    row, turns = {}, []
    for message in messages:
        content, speaker = message["content"], SPEAKERS[message["role"]]
        if message.get("tool_calls"):
            if content.strip():
                raise BadRow("an answer that also calls a function, which sharegpt cannot say")
            calls = message["tool_calls"]
            speaker = "function_call"
            content = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
        if message.get("input"):
            content = "\n".join(filter(None, [content, message["input"]]))
        if speaker == "system":
            row["system"] = content
        else:
            turns.append({"from": speaker, "value": content})
    row["conversations"] = turns
    if tools:
        row["tools"] = json.dumps(tools, ensure_ascii=False)
    return row


def text_of(record):
    """One parsed row -> its column "text", for pre-training; BadRow if there is none."""
    record = _columns(record)
    if "text" not in record:
        raise BadRow(f'there is no column "text", only {", ".join(record) or "nothing"}')
    _check_unicode(record["text"])
    return _string(record, "text")


def _columns(record):
    if not isinstance(record, dict):
        raise BadRow(f"a row is a JSON object with named columns, not {_kind(record)}")
    return record


def _unknown_columns(record):
    found = f"the columns ({', '.join(map(str, record)) or 'none'}) are those of no known format"
    plain = "; plain text is for --stage pt" if "text" in record else ""
    return f"{found}: {KNOWN_FORMATS}{plain}; other names can be given in dataset_info.json"


def _alpaca(record):
    if isinstance(record.get("output"), list):
        raise BadRow(PREFERENCE_DATA)
    return [*_alpaca_prompt(record), _reply(_string(record, "output"))]


def _alpaca_prompt(record):
    """The messages before the answer."""
    messages = []
    for pair in _list(record, "history") or []:
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            raise BadRow("history must be a list of [question, answer] pairs of strings")
        messages += _exchange(pair[0], "", pair[1])
    return [*messages, _question(_string(record, "instruction"), _string(record, "input"))]


def _exchange(question, more, answer):
    """The two messages of a question and its answer."""
    return [_question(question, more), _reply(answer)]


def _question(question, more):
    if not question.strip() and not more.strip():
        raise BadRow("there is no question")
    user = {"role": "user", "content": question}
    return {**user, "input": more} if more else user


def _reply(answer):
    if not answer.strip():
        raise BadRow("there is no answer")
    return {"role": "assistant", "content": answer}


def _turns(record, column):
    """A list of from/value or role/content turns -> messages."""
    messages = []
    for number, turn in enumerate(_list(record, column) or [], start=1):
        try:
            messages.append(_message(turn))
        except BadRow as error:
            raise BadRow(f"turn {number}: {error}") from error
    return messages


def _message(turn):
    if not isinstance(turn, dict):
        raise BadRow(f"a turn is a JSON object, not {_kind(turn)}")
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise BadRow(f"the speaker {speaker!r} is none of {', '.join(ROLES)}")
    content = _string(turn, "value" if "value" in turn else "content")
    message = {"role": ROLES[speaker], "content": content}
    if speaker == "function_call":
        calls = _tool_calls(_json_or_none(content))
        if calls:
            message.update(content="", tool_calls=calls)
    elif turn.get("tool_calls"):
        if message["role"] != "assistant":
            raise BadRow(f"the {speaker} turn has tool_calls, which only an answer can have")
        message["tool_calls"] = _tool_calls(turn["tool_calls"])
        if not message["tool_calls"]:
            raise BadRow("tool_calls must be a list of calls, each with name and arguments")
    # A system prompt and what a tool returned may be nothing; a question or an answer may not.
    speaks = message["role"] in ("user", "assistant") and "tool_calls" not in message
    if speaks and not content.strip():
        raise BadRow(f"the {speaker} turn is empty")
    return message


def _tool_calls(value):
    """[{"name", "arguments"}] from one call or several, in either spelling; None if unreadable."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json_or_none(arguments)
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": call["name"], "arguments": arguments})
    return calls


def _with_system(record, messages):
    """The messages behind the system prompt of the column "system"; a blank one is as none."""
    system = {"role": "system", "content": _string(record, "system")}
    return [
        message
        for message in [system, *messages]
        if message["role"] != "system" or message["content"].strip()
    ]


def _tools(record):
    """The descriptions of functions in the column "tools", None where there are none."""
    tools = _list(record, "tools") or None
    if tools and not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools must be a list of objects, each the description of a function")
    return tools


def _check_order(messages):
    """[system], then user or tool, then assistant, in turn; a turn may bring several results."""
    if not messages:
        raise BadRow("the conversation is empty")
    previous = "assistant"
    for message in messages[1:] if messages[0]["role"] == "system" else messages:
        role = message["role"]
        expected = ("assistant",) if previous in ("user", "tool") else ("user", "tool")
        if role not in expected and not role == previous == "tool":
            raise BadRow(f"{role} speaks where {' or '.join(expected)} should")
        previous = role
    if messages[-1]["role"] != "assistant":
        raise BadRow("there is no answer: the last turn is not the assistant's")


def _check_unicode(value):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadRow("half of a surrogate pair, which is not text") from error


def _string(record, name):
    """The string in a column, "" where it is absent or null."""
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a string, not {_kind(value)}")
    return value


def _list(record, name):
    """The list in a column, as JSON or as the text of it; None where it is absent or empty."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except BadRow as error:
            raise BadRow(f"in {name}, {error}") from error
    if value is not None and not isinstance(value, list):
        raise BadRow(f"{name} must be a list, not {_kind(value)}")
    return value


def _json_or_none(text):
    try:
        return parse_json(text)
    except BadRow:
        return None


def _kind(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "nothing" if value is None else "a number")
