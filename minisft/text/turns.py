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
from minisft.text.conversation import Conversation
from minisft.text.jinja_template import JinjaTemplate
from minisft.text.marks import Span, without_marks
from minisft.text.messages import Message
from minisft.text.template_facts import TemplateFacts
from minisft.text.written import check_written

Variables = dict[str, Any]


@dataclass
class Turn:
    """An answer in its conversation: text[:start] is its prompt, text[answer:] the answer.

    Between start and answer there may be an empty think block. message_spans: the spans of message
    texts in the text. blocks: those of {% generation %} blocks; None if the template has none.
    note: how the prompt differs from that of chat.py or of the answer, or "".
    """

    text: str
    start: int
    answer: int
    learned: bool
    has_calls: bool
    message_spans: list[Span]
    blocks: list[Span] | None
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
            begin = answer_start(conversation.messages, place, prompt, text)
            spans = jinja.message_spans(
                prompt, conversation, place, {"add_generation_prompt": True, **variables}
            ) + moved(spans, begin, len(prompt))
            generated, text = moved(generated, begin, len(prompt)), prompt + text[begin:]
        start = answer = len(prompt)
        message, pattern = conversation.messages[place], jinja.facts.empty_thought
        empty_thought = pattern.match(text, start)
        # The row may have its own, which is a part of the answer.
        is_own = "reasoning_content" in message or pattern.match(message["content"])
        if empty_thought and not is_own:
            answer = empty_thought.end()
        check_turn(conversation, place, text, answer)
        learned, has_calls = conversation.learned[place], "tool_calls" in message
        blocks = generated if jinja.has_blocks else None
        note = note_on_prompt(message, prompt, answer > start, jinja.facts) if learned else ""
        turns.append(Turn(text, start, answer, learned, has_calls, spans, blocks, note))
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


def check_turn(conversation: Conversation, place: int, text: str, answer: int) -> None:
    """UserError if a template leaves out or changes an answer, or a message that is new to it."""
    messages = conversation.messages
    check_written(messages[place], text[answer:], place + 1)
    earlier = [other for other in conversation.answers if other < place]
    new = range(earlier[-1] + 1 if earlier else 0, place)
    system = [0] if messages[0]["role"] == "system" else []
    for other in {*system, *new}:
        check_written(messages[other], text[:answer], other + 1)


def check_blocks(turn: Turn, text: str, end: int) -> None:
    """UserError if the template's {% generation %} blocks are not text[turn.answer:end].

    text: the turn's, or with the end token that follows it. The blocks may also contain the end of
    the prompt, and white space after the answer: no model writes these.
    """
    if turn.blocks is None or not turn.learned:
        return
    place = turn.answer
    for begin, stop in sorted(turn.blocks):
        if begin <= place:
            place = max(place, stop)
    if place < end:
        raise UserError(
            f"the template's {{% generation %}} blocks leave out {text[place:end][:40]!r} of an "
            "answer, so a model would not learn to write it. Correct the blocks, or remove them"
        )
    if text[end:place].strip():
        raise UserError(
            f"the template's {{% generation %}} blocks contain {text[end:place][:40]!r} after the "
            "end of an answer, which no model writes. Correct the blocks, or remove them"
        )


def answer_start(messages: list[Message], place: int, prompt: str, text: str) -> int:
    """The index in a text at which the answer messages[place] begins, if its prompt is different.

    Mistral-Nemo writes the system prompt into the last question, and only while it is the last
    message: prompt and text are equal from the question to the answer. UserError if they are not.
    """
    question, answer = (messages[i]["content"].strip() for i in (place - 1, place))
    after_question = prompt[prompt.rfind(question) :] if question else ""
    # The answer may repeat the question.
    answer_place = text.rfind(answer) if answer else len(text)
    begin = text.rfind(after_question, 0, answer_place)
    if begin < 0 or after_question in ("", question) or question not in prompt:
        raise UserError(prompt_mismatch(prompt, text))
    return begin + len(after_question)


def moved(spans: list[Span], start: int, new_start: int) -> list[Span]:
    """The spans at or after `start`, for a text in which `start` has moved to `new_start`."""
    by = new_start - start
    return [(begin + by, end + by) for begin, end in spans if begin >= start]


def prompt_mismatch(prompt: str, text: str) -> str:
    """The message of a UserError: why an answer cannot be learned after its prompt."""
    place = len(commonprefix([prompt, text]))
    return (
        "the template's prompt is not the beginning of its conversation: after "
        f"{prompt[max(0, place - 30) : place]!r} the prompt continues with "
        f"{prompt[place : place + 40]!r}, the conversation with {text[place : place + 40]!r}. So "
        "the answer cannot be learned after its prompt. --template_kwargs may change this; else "
        "choose another --template"
    )
