"""A conversation in the form that a chat template reads.

    conversation = prepare(messages, tools, template.facts, tokens)

Tools, their calls and results, and Alpaca's input become text if the template does not support
them. If that would lose something to learn, the conversation is refused.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minisft.common.errors import UserError
from minisft.text.call_form import with_call_form
from minisft.text.control_tokens import ControlTokens
from minisft.text.marks import check_no_marks, texts_of
from minisft.text.messages import (
    Message,
    standard_messages,
    standard_tools,
    with_thoughts_apart,
)
from minisft.text.template_facts import TemplateFacts
from minisft.text.tool_texts import calls_as_text, offer_tools


@dataclass
class Conversation:
    """A conversation in the form that a template renders.

    learned: for every message, True if it is an answer to learn. spells_controls: True if a message
    might spell a control token.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    learned: list[bool]
    spells_controls: bool

    @cached_property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages, without an opening turn that is not learned."""
        opening = opening_turn(self.messages, self.learned)
        return [
            place
            for place, message in enumerate(self.messages)
            if message["role"] == "assistant" and place != opening
        ]


def prepare(
    messages: list[Message],
    tools: list[Any] | None,
    facts: TemplateFacts,
    tokens: ControlTokens,
) -> Conversation:
    """The conversation of a row; UserError for what the template cannot express."""
    messages, learned = standard_messages(messages)
    if facts.knows_thoughts:
        messages = [with_thoughts_apart(message) for message in messages]
    if opening_turn(messages, learned) is not None and not facts.knows_opening:
        messages, learned = opening_as_question(messages, learned)
    offered = standard_tools(tools)
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise UserError("a conversation needs at least one user message")
    if messages[0]["role"] == "system" and messages[0]["content"] and not facts.knows_system:
        raise UserError(
            "message 1 (system): the template supports no system prompt. Put it into the "
            "first question, or choose another --template"
        )
    has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    form = facts.call_form if has_calls and (facts.knows_tools or not offered) else None
    if form is not None:
        messages = with_call_form(messages, form)
    elif has_calls:
        messages, learned = calls_as_text(messages, learned)
    if offered and not facts.knows_tools:
        default_system = facts.default_system if facts.knows_system else None
        messages, learned = offer_tools(messages, learned, offered, default_system)
        offered = None
    for number, message in enumerate(messages, start=1):
        if message.get("input") and not facts.knows_input:
            parts = [message["content"], message.pop("input")]
            message["content"] = "\n".join(filter(None, parts))
        if message.get("reasoning_content") and not facts.knows_thoughts:
            raise UserError(
                f"message {number} has thoughts, and the template does not write them. "
                "Remove them, or choose another --template"
            )
    fields = written_fields(messages)
    texts = "".join(texts_of([fields, offered or []]))
    check_no_marks(texts)
    spells_controls = tokens.could_be_spelled(texts) or any(
        tokens.could_be_part(value)
        for message in fields
        for value in message.values()
        if isinstance(value, str)
    )
    return Conversation(messages, offered or facts.empty_tools, learned, spells_controls)


def opening_turn(messages: list[Message], learned: list[bool]) -> int | None:
    """The place of an assistant's turn before the first question that is not learned, or None."""
    place = 1 if messages and messages[0]["role"] == "system" else 0
    is_opening = len(messages) > place and messages[place]["role"] == "assistant"
    return place if is_opening and not learned[place] else None


def opening_as_question(
    messages: list[Message], learned: list[bool]
) -> tuple[list[Message], list[bool]]:
    """Messages and what is learned, with an opening turn as the beginning of the first question."""
    place = opening_turn(messages, learned)
    if place is None or len(messages) == place + 1 or messages[place + 1]["role"] != "user":
        return messages, learned
    opening, question = messages[place : place + 2]
    question = {**question, "content": f"{opening['content']}\n{question['content']}"}
    return [*messages[:place], question, *messages[place + 2 :]], learned[:place] + learned[
        place + 1 :
    ]


def check_answers(conversation: Conversation) -> None:
    """UserError for an answer to learn that is empty."""
    for place in conversation.answers:
        message = conversation.messages[place]
        is_empty = not message["content"].strip() and not message.get("tool_calls")
        if is_empty and conversation.learned[place]:
            raise UserError(f"message {place + 1} (assistant): the answer is empty")


def written_fields(messages: list[Message]) -> list[Message]:
    """The messages without their roles."""
    return [
        {name: value for name, value in message.items() if name != "role"} for message in messages
    ]
