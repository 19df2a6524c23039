"""What visitors of the web page can do: ask, stop, retry, edit, clear, download.

    page, talk = Page([Assistant("examples/base", "runs/demo")], Sampling()), Talk()
    values = (512, 0.95, 50, 0.7, 1.0, False, "")       # the fields of Sampling, the seed as text
    for chats, notice, box in page.ask(talk, "What is 2 + 2?", "", *values):
        print(chats[0][-1]["content"])

The server keeps a Talk for each visitor, and the browser shows a view of it. So neither an error
nor loading the page again loses anything. web.py shows the views with gradio.
"""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from minisft.chat.markup import JOINER as JOINER
from minisft.chat.markup import original, shown
from minisft.chat.transcript import Transcript
from minisft.common.errors import UserError
from minisft.data.formats import Message
from minisft.generation.answer import Answer, answer_message
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling

SECONDS_BETWEEN_VIEWS = 0.05
KEPT_TALKS = 1000  # visitors who find their conversation when they load the page again

# (the messages of each chat, a line of Markdown, the text of the question's box or None to keep it)
View = tuple[list[list[Message]], str, str | None]


@dataclass
class Turn:
    """A question, and the answer and the thoughts of each model so far."""

    question: str
    answers: list[str]
    thoughts: list[str]


@dataclass
class Talk:
    """The conversation of one visitor with all models."""

    turns: list[Turn] = field(default_factory=list)
    number: int = 0  # in the transcript; 0 before the first question
    system: str = ""
    busy: bool = False
    stopping: bool = False


class Page:
    """One model, or two side by side. Methods that answer yield views, of errors too."""

    def __init__(
        self,
        assistants: list[Assistant],
        sampling: Sampling,
        system: str = "",
        transcript: Transcript | None = None,
    ):
        self.assistants, self.sampling, self.system = assistants, sampling, system
        self.transcript = transcript or Transcript()
        self.talks: dict[str, Talk] = {}  # by visitor; the latest to load the page is the last

    def come_back(self, visitor: str) -> Talk:
        """The Talk of a visitor who loads the page, by a name that nobody else can guess.

        If an answer was being written for the page as it was before, it stops.
        """
        talk = self.talks.pop(visitor, None) or Talk()
        self.talks[visitor] = talk
        talk.busy, talk.stopping = False, True
        while len(self.talks) > KEPT_TALKS:
            self.talks.pop(next(iter(self.talks)))
        return talk

    def ask(self, talk: Talk, question: str, system: str, *values: Any) -> Iterator[View]:
        """Answer a question. values: the fields of Sampling in their order."""
        return self._answer(talk, talk.turns, question, system, values, is_typed=True)

    def retry(self, talk: Talk, system: str, *values: Any) -> Iterator[View]:
        """Answer the last question again."""
        if not talk.turns:
            return iter([self.view(talk, "There is no answer yet to repeat.")])
        *earlier, last = talk.turns
        return self._answer(talk, earlier, last.question, system, values)

    def edit(
        self, talk: Talk, index: int, question: str, system: str, *values: Any, place: int = 0
    ) -> Iterator[View]:
        """Replace the question in message `index` of a chat and drop everything after it.

        question: as edited in the browser, with the marks of `shown`. place: of the chat.
        """
        before = self.view(talk, "")[0][place][:index]
        earlier = talk.turns[: sum(message["role"] == "user" for message in before)]
        return self._answer(talk, earlier, original(question), system, values)

    def stop(self, talk: Talk) -> None:
        """Stop the answer; the text so far stays."""
        talk.stopping = True

    def clear(self, talk: Talk) -> View:
        """Forget the conversation."""
        talk.turns, talk.number, talk.system = [], 0, ""
        return self.view(talk, "")

    def export(self, talk: Talk) -> str:
        """The conversation as JSON that train.py reads, a row for each model that has answered."""
        rows = [
            {"model": assistant.name, "messages": self._messages(talk.turns, place, talk.system)}
            for place, assistant in enumerate(self.assistants)
            if any(turn.answers[place].strip() for turn in talk.turns)
        ]
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n" if rows else ""

    def view(self, talk: Talk, notice: str, box: str | None = None) -> View:
        """The conversation as it is now."""
        chats = []
        for place in range(len(self.assistants)):
            messages = []
            for turn in talk.turns:
                messages.append({"role": "user", "content": shown(turn.question)})
                if thoughts := turn.thoughts[place]:
                    # gradio shows a block with a title; it is closed once its status is "done".
                    is_done = bool(turn.answers[place]) or not talk.busy
                    block = {"title": "Thoughts", "status": "done" if is_done else "pending"}
                    message = {"role": "assistant", "content": shown(thoughts), "metadata": block}
                    messages.append(message)
                answer = shown(turn.answers[place]) or "…"
                messages.append({"role": "assistant", "content": answer})
            chats.append(messages)
        return chats, notice, box

    def _messages(self, turns: list[Turn], place: int, system: str) -> list[Message]:
        """The conversation with the model at `place`, without questions it has not answered."""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            if turn.answers[place].strip():
                messages.append({"role": "user", "content": turn.question})
                messages.append(answer_message(turn.answers[place], turn.thoughts[place]))
        return messages

    def _answer(
        self,
        talk: Talk,
        earlier: list[Turn],
        question: str,
        system: str,
        values: tuple[Any, ...],
        is_typed: bool = False,
    ) -> Iterator[View]:
        """Answer `question` after the turns `earlier`; both replace the turns of the talk.

        values: the fields of Sampling. is_typed: the question is in the box, which is emptied; a
        refused question stays there.
        """
        refused, accepted = (question, "") if is_typed else (None, None)
        if talk.busy:
            yield self.view(talk, "An answer is still being written: stop it first.", refused)
            return
        previous, notes = talk.turns, []
        turn = Turn(question, [""] * len(self.assistants), [""] * len(self.assistants))
        turns = talk.turns = [*earlier, turn]
        talk.busy, talk.stopping = True, False
        try:
            answers = self._begin(earlier, question, system, values, notes)
            talk.system = system
            talk.number = talk.number or self.transcript.new_conversation()
            self.transcript.write_question(talk.number, system, question)
            with ExitStack() as stack:
                pieces = [
                    stack.enter_context(
                        closing(self.transcript.follow(talk.number, answer, model=assistant.name))
                    )
                    for assistant, answer in zip(self.assistants, answers, strict=True)
                ]
                yield self.view(talk, " ".join(notes), accepted)
                last_view = 0.0
                for _ in zip_longest(*pieces):  # a token of each answer in turn
                    turn.answers = [answer.text for answer in answers]
                    turn.thoughts = [answer.reasoning_content for answer in answers]
                    if talk.stopping or talk.turns is not turns:
                        notes.append("Stopped.")
                        break
                    if time.monotonic() - last_view > SECONDS_BETWEEN_VIEWS:
                        yield self.view(talk, " ".join(notes))
                        last_view = time.monotonic()
            notes.append(self._figures(answers))
        except UserError as error:
            notes.append(f"**{shown(str(error))}**")
        except Exception as error:  # an error of the model must not end the page
            traceback.print_exc()
            reason = shown(str(error)) or type(error).__name__
            notes.append(f"**The model failed: {reason}** The conversation is kept; try again.")
        finally:
            talk.busy = False
            is_empty = not any(answer.strip() for answer in turn.answers)
            if is_empty and talk.turns is turns:  # not if the visitor has cleared it meanwhile
                talk.turns = previous
        yield self.view(talk, " ".join(notes), refused if is_empty else None)

    def _begin(
        self,
        earlier: list[Turn],
        question: str,
        system: str,
        values: tuple[Any, ...],
        notes: list[str],
    ) -> list[Answer]:
        """The answer of each model, to be written. UserError if the question cannot be asked."""
        max_new_tokens, temperature, top_k, top_p, penalty, greedy, seed = values
        sampling = Sampling(
            int(max_new_tokens), temperature, int(top_k), top_p, penalty, greedy, parse_seed(seed)
        )
        answers = []
        for place, assistant in enumerate(self.assistants):
            messages = self._messages(earlier, place, system)
            messages.append({"role": "user", "content": question})
            answers.append(
                assistant.stream(
                    messages, sampling, say=lambda text: notes.append(f"{text.capitalize()}.")
                )
            )
        return answers

    def _figures(self, answers: list[Answer]) -> str:
        """How fast the answers were, and which of them were cut."""
        parts = []
        for assistant, answer in zip(self.assistants, answers, strict=True):
            name = f"{shown(assistant.name)}: " if len(answers) > 1 else ""
            cut = ", cut because it reached its maximum length" if answer.cut_short else ""
            parts.append(name + answer.figures() + cut)
        return " · ".join(parts)


def parse_seed(text: str | None) -> int | None:
    """The seed in a visitor's text field, None for an empty field."""
    try:
        return int(text) if text and text.strip() else None
    except ValueError as error:
        raise UserError(f"the seed must be a whole number or empty, not '{text}'") from error
