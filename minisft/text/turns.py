"""The answers of a conversation, each after the prompt that it has in use.

    for turn in find_turns(conversation, jinja):
        print(turn.text[: turn.start], "->", turn.text[turn.answer :])

The text of a conversation up to an answer must begin with the answer's prompt. Otherwise the answer
cannot be learned, and the error shows where the two texts differ.
"""

from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from minisft.common.errors import UserError
from minisft.text.conversation import Conversation, check_written
from minisft.text.jinja_template import JinjaTemplate
from minisft.text.marks import Span, without_marks
from minisft.text.template_facts import TemplateFacts

Variables = dict[str, Any]


@dataclass
class Turn:
    """An answer in its conversation: text[:start] is its prompt, text[answer:] the answer.

    Between start and answer there may be an empty think block. message_spans: the spans of message
    texts in the text. note: how the prompt differs from that of chat.py or of the answer, or "".
    """

    text: str
    start: int
    answer: int
    learned: bool
    has_calls: bool
    message_spans: list[Span]
    note: str


def find_turns(conversation: Conversation, jinja: JinjaTemplate) -> list[Turn]:
    """Each answer after its prompt; UserError if an answer cannot be learned after its prompt."""
    renders = renders_of(conversation)
    texts = iter(jinja.render(conversation.messages, conversation.tools, renders))
    turns = []
    for place, (_, variables) in zip(conversation.answers, renders[1::2], strict=True):
        prompt, text = without_marks(next(texts))[0], next(texts)
        spans = jinja.message_spans(text, conversation, place + 1, variables)
        text, _, generated = without_marks(text)
        if not text.startswith(prompt):
            prompt_spans = jinja.message_spans(
                prompt, conversation, place, {"add_generation_prompt": True, **variables}
            )
            question = conversation.messages[place - 1]["content"].strip()
            text, spans = behind_other_prompt(question, prompt, prompt_spans, text, spans)
        start = answer = len(prompt)
        message = conversation.messages[place]
        empty_thought = jinja.facts.empty_thought.match(text, start)
        if empty_thought and "reasoning_content" not in message:
            answer = empty_thought.end()
        check_turn(conversation, place, text, answer, generated)
        learned, has_calls = conversation.learned[place], "tool_calls" in message
        note = note_on_prompt(message, prompt, answer > start, jinja.facts) if learned else ""
        turns.append(Turn(text, start, answer, learned, has_calls, spans, note))
    return turns


def renders_of(conversation: Conversation) -> list[tuple[int, Variables]]:
    """(number of messages, variables) of two texts per answer: the prompt; prompt and answer."""
    renders: list[tuple[int, Variables]] = []
    for place in conversation.answers:
        has_thoughts = bool(conversation.messages[place].get("reasoning_content"))
        variables: Variables = {"enable_thinking": True} if has_thoughts else {}
        renders.append((place, {"add_generation_prompt": True, **variables}))
        renders.append((place + 1, variables))
    return renders


def note_on_prompt(
    message: dict[str, Any], prompt: str, has_empty_thought: bool, facts: TemplateFacts
) -> str:
    """What a user has to know about the prompt of an answer; usually "".

    The prompt is that of the answer: with or without thoughts. has_empty_thought: there is an
    empty thought between prompt and answer.
    """
    if message.get("reasoning_content"):
        if facts.asks_for_thoughts:
            return ""
        return (
            "answers with thoughts. They are learned after the prompt that asks for thoughts, but "
            "chat.py and the saved chat template ask for none by default; --enable_thinking true "
            "changes that"
        )
    if has_empty_thought:
        problem = (
            "lets the model think. They are learned after an empty thought, which is itself not "
            "learned"
        )
    elif facts.opens_thoughts(prompt):
        problem = "opens thoughts. The model learns to write these answers as thoughts"
    else:
        return ""
    way_out = facts.option_without_thoughts or "only another --template"
    return f"answers without thoughts after a prompt that {problem}; {way_out} changes that"


def check_turn(
    conversation: Conversation, place: int, text: str, answer: int, generated: list[Span]
) -> None:
    """UserError if a template leaves out or changes an answer or the system prompt."""
    check_written(conversation.messages[place], text[answer:], place + 1)
    if conversation.messages[0]["role"] == "system":
        check_written(conversation.messages[0], text, 1)
    if generated and not any(begin <= answer < end for begin, end in generated):
        raise UserError(
            "the template's {% generation %} blocks do not contain the answer "
            f"{text[answer : answer + 40]!r}"
        )


def behind_other_prompt(
    question: str, prompt: str, prompt_spans: list[Span], text: str, spans: list[Span]
) -> tuple[str, list[Span]]:
    """(the prompt and the answer of a text that begins differently, message spans of both).

    Mistral-Nemo writes the system prompt into the last question, and only while it is the last
    message: prompt and text are equal after the question. UserError if they are not.
    """
    after_prompt, after_text = prompt.rpartition(question)[2], text.rpartition(question)[2]
    has_question = bool(question) and question in prompt and question in text
    if not (has_question and after_prompt and after_text.startswith(after_prompt)):
        raise UserError(where_they_part(prompt, text))
    answer = after_text[len(after_prompt) :]
    start = len(text) - len(answer)
    moved = len(prompt) - start
    in_answer = [(begin + moved, end + moved) for begin, end in spans if begin >= start]
    return prompt + answer, prompt_spans + in_answer


def where_they_part(prompt: str, text: str) -> str:
    """The message of a UserError: why an answer cannot be learned after its prompt."""
    place = len(commonprefix([prompt, text]))
    return (
        "the template's prompt is not the beginning of its conversation: after "
        f"{prompt[max(0, place - 30) : place]!r} the prompt continues with "
        f"{prompt[place : place + 40]!r}, the conversation with {text[place : place + 40]!r}. So "
        "the answer cannot be learned after its prompt. --template_kwargs may change this; else "
        "choose another --template"
    )
