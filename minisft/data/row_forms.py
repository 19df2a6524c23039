"""Rows in other layouts -> rows in the formats of formats.py.

    changes = []
    standard_record({"prompt": "1 + 2?", "completion": 3}, changes)
    # {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]}

    prompt, completion      trl: texts or turns; only the completion is learned
    input, output           LMFlow's text2text
    input, preferred_output, non_preferred_output       OpenAI's preferences
    messages, functions     OpenAI's old name of tools

An answer that is a number or an object becomes its JSON text. `changes` collects notes for the
user; dataset.py prints each kind once, with its count.
"""

import json
from collections.abc import Collection
from typing import Any

from minisft.data.formats import PREFERENCE_COLUMNS, SPEAKERS, turns_column
from minisft.data.row_values import NOT_FINITE, BadRow, kind_of, string_of, without_nulls

# The ends of notes that begin with "3 of 100 rows".
AS_JSON = "have a number, an object or true/false as an answer: its JSON text is the answer"
COMPLETION = "have answers in the prompt: only the completion is learned"
LABELLED = (
    "have a label that is ignored. If it says that an answer is good or bad (KTO), remove the rows "
    "with bad answers"
)

LABELS = ("label", "kto_tag")  # in trl and in LLaMA-Factory

OPENAI_PREFERENCES = {"input", "preferred_output", "non_preferred_output"}
SPEAKER, CONTENT = {"from", "role"}, {"value", "content", "tool_calls", "function_call"}
ANSWERS = ("output", "target", "completion", "chosen", "rejected")
TURNS = ("conversations", "messages", "prompt", "completion", "chosen", "rejected")


def check_label(record: Any, changes: list[str], columns: Collection[str] | None = None) -> None:
    """BadRow if the row calls its answer good or bad (KTO): bad answers would be learned.

    A number in a format without turns may be a class, so it is only noted. columns: those that an
    entry of dataset_info.json reads. If the label is not among them, it is only noted, too.
    """
    if not isinstance(record, dict) or _has_several_answers(record):
        return
    for name in LABELS:
        value = record.get(name) if name not in (columns or ()) else None
        is_number = type(value) in (int, float) and value in (0, 1)
        if not is_number and str(value).lower() not in ("true", "false"):
            continue
        has_turns = turns_column(record) or record.keys() >= {"prompt", "completion"}
        if columns is not None or (is_number and name == "label" and not has_turns):
            changes.append(LABELLED)
            return
        raise BadRow(
            f"{name} says if the answer is good or bad; rows of such judgements (KTO) cannot be "
            f"learned. Keep the rows with good answers, and remove the column {name}"
        )


def _has_several_answers(record: dict[str, Any]) -> bool:
    given = without_nulls(record).keys()
    is_ranked = isinstance(record.get("output"), list)
    return is_ranked or given >= PREFERENCE_COLUMNS or given >= OPENAI_PREFERENCES


def standard_record(record: Any, changes: list[str]) -> Any:
    """The row in a format that formats.py and preferences.py know; other values as they are."""
    if not isinstance(record, dict):
        return record
    record = without_nulls(record)
    if record.keys() >= OPENAI_PREFERENCES:
        record = _openai_preferences(record)
    record = _answers_as_text(record, changes)
    if "messages" in record and "functions" in record:
        record = {"tools": record["functions"], **record}
    if "instruction" in record or turns_column(record):
        return record
    if record.keys() >= {"prompt", "completion"}:
        return _prompt_and_completion(record, changes)
    if record.keys() >= {"input", "output"} and "kind" not in record and "target" not in record:
        return {**record, "instruction": string_of(record, "input"), "input": None}
    return record


def _answers_as_text(record: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """The row with JSON text for each answer that is a number, an object, or true or false."""
    changed: dict[str, Any] = {}
    for column in ANSWERS:
        value = record.get(column)
        if isinstance(value, list) and column == "output":  # answers to compare
            texts = [_json_text(answer) if _is_data(answer) else answer for answer in value]
            if texts != value:
                changed[column] = texts
        elif _is_data(value):
            changed[column] = _json_text(value)
    num_texts = len(changed)
    for column in TURNS:
        value = record.get(column)
        turns = value if isinstance(value, list) else [value]
        texts = [_turn_as_text(turn) for turn in turns]
        new = [text for text, turn in zip(texts, turns, strict=True) if text is not turn]
        if new:
            changed[column] = texts if isinstance(value, list) else texts[0]
            # The object of a function_call turn is a call, as its JSON text would be.
            num_texts += any(turn.get("from") != "function_call" for turn in new)
    if num_texts:
        changes.append(AS_JSON)
    return {**record, **changed} if changed else record


def _turn_as_text(turn: Any) -> Any:
    """The turn, with JSON text where the assistant's content is data."""
    if not isinstance(turn, dict):
        return turn
    column = "value" if "value" in turn else "content"
    is_assistant = SPEAKERS.get(str(turn.get("from", turn.get("role")))) == "assistant"
    if is_assistant and _is_data(turn.get(column)):
        return {**turn, column: _json_text(turn[column])}
    return turn


def _is_data(value: Any) -> bool:
    """True for a number, true or false, and an object that is not a turn."""
    if isinstance(value, dict):
        return SPEAKER.isdisjoint(value) or CONTENT.isdisjoint(value)
    return isinstance(value, int | float)  # bool is an int


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise BadRow(NOT_FINITE) from error


def _openai_preferences(record: dict[str, Any]) -> dict[str, Any]:
    given = record["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise BadRow('input must be an object with "messages", as in OpenAI\'s preference rows')
    rest = {name: value for name, value in record.items() if name not in OPENAI_PREFERENCES}
    return {
        **rest,
        "prompt": given["messages"],
        "tools": given.get("tools"),
        "chosen": record["preferred_output"],
        "rejected": record["non_preferred_output"],
    }


def _prompt_and_completion(record: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A row with the turns of prompt and completion as its messages."""
    prompt, completion = (_turns(record, name) for name in ("prompt", "completion"))
    context = [_not_learned(turn) for turn in prompt]
    if context != prompt:
        changes.append(COMPLETION)
    rest = {name: value for name, value in record.items() if name != "completion"}
    if not record.keys() >= PREFERENCE_COLUMNS:  # chosen and rejected follow the prompt alone
        del rest["prompt"]
    return {**rest, "messages": context + completion}


def _turns(record: dict[str, Any], column: str) -> list[Any]:
    value = record[column]
    if isinstance(value, str):
        return [{"role": "user" if column == "prompt" else "assistant", "content": value}]
    if not isinstance(value, dict | list):
        raise BadRow(f"{column} must be a string or a list of turns, not {kind_of(value)}")
    return value if isinstance(value, list) else [value]


def _not_learned(turn: Any) -> Any:
    speaker = str(turn.get("from", turn.get("role"))) if isinstance(turn, dict) else ""
    return {**turn, "train": False} if SPEAKERS.get(speaker) == "assistant" else turn
