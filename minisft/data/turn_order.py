"""The order of turns: [system], then questions and answers in turn.

    messages = standard_order(messages, changes)    # or BadRow

Data sets also have several turns of one speaker in a row, a greeting of the assistant before the
first question, and a last question without an answer. These rows are usable; `changes` lists the
changes to them.
"""

from minisft.data.row_values import BadRow
from minisft.text.messages import Message, is_learned

# The ends of notes that begin with "3 of 100 rows".
JOINED = "have consecutive turns of one speaker: they are joined by a line break"
OPENING = (
    "begin with the assistant: its opening turn is context and is not learned; if the template has "
    "no place for it, it begins the first question"
)
UNANSWERED = "end without an answer: what follows the last answer is left out"
NO_ANSWER = "there is no answer: the last turn is not the assistant's"


def standard_order(messages: list[Message], changes: list[str]) -> list[Message]:
    """The messages in the order that check_order accepts. BadRow if there is no such order."""
    messages = with_opening_as_context(join_turns(messages, changes), changes)
    last = max((k for k, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    trailing = [message["role"] for message in messages[last + 1 :]]
    is_usable = any(message["role"] in ("user", "tool") for message in messages[: max(last, 0)])
    if is_usable and trailing and "system" not in trailing:
        messages = messages[: last + 1]
        changes.append(UNANSWERED)
    check_order(messages)
    return messages


def join_turns(messages: list[Message], changes: list[str]) -> list[Message]:
    """The messages with consecutive turns of one speaker as one. Tool results stay apart."""
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if joined and message["role"] == joined[-1]["role"] != "tool":
            try:
                joined[-1] = _joined(joined[-1], message)
            except BadRow as error:
                raise BadRow(f"messages {number - 1} and {number}: {error}") from error
            if JOINED not in changes:
                changes.append(JOINED)
        else:
            joined.append(message)
    return joined


def _joined(first: Message, second: Message) -> Message:
    """Two turns of one speaker as one. BadRow if that would change which text is learned."""
    role = first["role"]
    if first == second and role == "system":  # in a column and in a turn
        return first
    if role == "assistant" and is_learned(first) != is_learned(second):
        raise BadRow("two answers follow each other, and only one of them is supervised")
    if second.get("reasoning_content"):
        raise BadRow("two answers follow each other, and the second has its own thoughts")
    if first.get("name") != second.get("name"):
        raise BadRow(f"two {role} turns with different names follow each other")
    if first.get("tool_calls") and (second["content"] or not second.get("tool_calls")):
        raise BadRow("unexpected assistant turn after tool calls; expected tool")
    content = "\n".join(filter(None, [first["content"], second["content"]]))
    calls = [*first.get("tool_calls", []), *second.get("tool_calls", [])]
    return {**first, "content": content, **({"tool_calls": calls} if calls else {})}


def with_opening_as_context(messages: list[Message], changes: list[str]) -> list[Message]:
    """The messages, with an answer before the first question marked as not learned."""
    place = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) <= place + 1 or messages[place]["role"] != "assistant":
        return messages
    if OPENING not in changes:
        changes.append(OPENING)
    opening = {**messages[place], "train": False}
    return [*messages[:place], opening, *messages[place + 1 :]]


def check_order(messages: list[Message]) -> None:
    """[system], then user or tool and assistant in turn; several tool results may follow a call.

    The assistant may begin, with a turn that is not learned. The last turn is the assistant's.
    """
    if not messages:
        raise BadRow("the conversation is empty")
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise BadRow("there is no question" if messages[-1]["role"] == "assistant" else NO_ANSWER)
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if turns[0]["role"] == "assistant" and not is_learned(turns[0]):
        turns = turns[1:]
    previous = "assistant"
    for message in turns:
        role = message["role"]
        expected = ("assistant",) if previous in ("user", "tool") else ("user", "tool")
        if role not in expected and not role == previous == "tool":
            raise BadRow(f"unexpected {role} turn; expected {' or '.join(expected)}")
        previous = role
    if messages[-1]["role"] != "assistant":
        raise BadRow(NO_ANSWER)
