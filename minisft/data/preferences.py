"""Preference rows: one prompt, several answers, best first.

    conversations, tools = parse_preferences({"prompt": "Add 1 2.", "chosen": "3", "rejected": "4"})

A row has the format alpaca, sharegpt or openai, and two more columns, `chosen` and `rejected`:
texts, turns, or lists of turns. Or it is an alpaca row whose `output` is a list of answers, best
first.
"""

from typing import Any

from minisft.common.errors import UserError
from minisft.data.formats import (
    PREFERENCE_COLUMNS,
    Messages,
    Tools,
    alpaca_prompt,
    parse_tools,
    parse_turn,
    parse_turns,
    question,
    turns_column,
    with_system,
)
from minisft.data.row_values import BadRow, check_encodable, check_text_only, object_of
from minisft.data.turn_order import check_order, join_turns, with_opening_as_context
from minisft.text.messages import is_learned


def has_several_answers(record: Any) -> bool:
    """True for a row of preferences."""
    return isinstance(record, dict) and (
        record.keys() >= PREFERENCE_COLUMNS
        or ("instruction" in record and isinstance(record.get("output"), list))
    )


def parse_preferences(
    record: Any, changes: list[str] | None = None
) -> tuple[list[Messages], Tools]:
    """The conversations with each answer, best first, and the tools.

    The conversations begin with the same question. BadRow says what is wrong with the row.
    changes: receives a note on each change that turn_order.py makes.
    """
    changes = [] if changes is None else changes
    record = object_of(record)
    check_text_only(record)
    if record.keys() >= PREFERENCE_COLUMNS:
        answers = {name: _answer(name, record[name]) for name in ("chosen", "rejected")}
        # Instead of answers there may be conversations, which contain the prompt.
        have_prompt = any(messages[0]["role"] != "assistant" for messages in answers.values())
        prompt = [] if have_prompt else _prompt(record)
    elif isinstance(record.get("output"), list) and len(record["output"]) > 1:
        answers = {}
        for number, value in enumerate(record["output"], start=1):
            name = f"answer {number} of output"
            answers[name] = _answer(name, value)
        prompt = alpaca_prompt(record)
    else:
        raise BadRow(
            "there is nothing to compare: --stage rm and dpo need the columns chosen and rejected, "
            "or a list of at least two answers as output"
        )
    tools, conversations = parse_tools(record), []
    prompt = join_turns(prompt, changes)  # an answer is never joined to the prompt
    for name, messages in answers.items():
        conversation = with_system(record, prompt + join_turns(messages, changes))
        try:
            conversation = with_opening_as_context(conversation, changes)
            check_order(conversation)
        except BadRow as error:
            raise BadRow(f"with {name}: {error}") from error
        conversations.append(conversation)
    questions = [_first_question(messages) for messages in conversations]
    if any(first != questions[0] for first in questions):
        raise BadRow("the answers belong to different questions, so they cannot be compared")
    check_encodable([conversations, tools])
    return conversations, tools


def _first_question(messages: Messages) -> Messages:
    return [message for message in messages if message["role"] == "user"][:1]


def _prompt(record: dict[str, Any]) -> Messages:
    """The messages before the answers, in any of the formats."""
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        return parse_turns(record, "prompt")
    if isinstance(prompt, str):
        return [question(prompt)]
    if isinstance(prompt, dict):
        return [parse_turn(prompt)]
    if column := turns_column(record):
        return parse_turns(record, column)
    if "instruction" in record:
        return alpaca_prompt(record)
    raise BadRow(
        "chosen and rejected have no question. Add a column prompt, instruction, conversations or "
        "messages, or make them lists of turns that begin with the user's"
    )


def _answer(name: str, value: Any) -> Messages:
    """The messages of an answer, given as a text, a turn or a list of turns."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise BadRow(f"{name} is empty")
    try:
        messages = [parse_turn(turn) for turn in turns]
        learned = is_learned(messages[-1])
    except UserError as error:
        raise BadRow(f"{name}: {error}") from error
    if not learned:
        raise BadRow(f"{name} is not to be learned (weight, train or mask), so nothing is compared")
    return messages
