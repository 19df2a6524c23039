"""The actions of a visitor of the web page: ask, stop, retry, edit, clear, download.

    page = Page([Assistant("examples/base", "runs/demo")], Sampling())
    session = page.load_session("a name that is hard to guess")
    values = (512, 0.95, 50, 0.7, 1.0, False, "")   # the fields of Sampling, with the seed as text
    for chats, notice, box in page.ask(session, "What is 2 + 2?", "", *values):
        print(chats[0][-1]["content"])

The server keeps a Session for each visitor, and the browser shows a view of it, so errors and page
reloads lose nothing. web.py shows the views with gradio.
"""

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import zip_longest
from threading import Lock
from typing import Any

from minisft.chat.markup import escape, unescape
from minisft.chat.model_thread import ModelThread
from minisft.chat.transcript import Transcript
from minisft.common.errors import UserError
from minisft.common.words import valid_text
from minisft.generation.answer import Answer, answer_message
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.text.messages import Message

SECONDS_BETWEEN_VIEWS = 0.05
MAX_SESSIONS = 1000  # conversations that survive a reload of the page; older ones are dropped

# (the messages of each chat, a notice in Markdown, the new text of the question box or None)
View = tuple[list[list[Message]], str, str | None]


@dataclass
class Turn:
    """A question, and the answer and the thoughts of each model so far."""

    question: str
    answers: list[str]
    thoughts: list[str]


@dataclass
class Session:
    """The conversation of one visitor with all models."""

    turns: list[Turn] = field(default_factory=list)
    number: int = 0  # in the transcript; 0 before the first question
    system: str = ""
    answering: Turn | None = None  # the turn whose answer is in progress
    stopped_at: float = -math.inf  # by time.monotonic: questions sent before that are not answered


class Page:
    """One model, or two side by side. Methods that answer yield views, even for errors.

    thread: computes the answers; the one that has loaded the models is the fastest.
    """

    def __init__(
        self,
        assistants: list[Assistant],
        sampling: Sampling,
        system: str = "",
        transcript: Transcript | None = None,
        thread: ModelThread | None = None,
    ):
        self.assistants, self.sampling, self.system = assistants, sampling, system
        self.transcript, self.thread = transcript or Transcript(), thread or ModelThread()
        self.sessions: dict[str, Session] = {}  # by visitor, the latest last
        self.closed_at = -math.inf
        self._claiming = Lock()

    def load_session(self, visitor: str) -> Session:
        """The session of a visitor who loads or reloads the page. Stops an answer in progress.

        visitor: a name that others cannot guess.
        """
        session = self.sessions.pop(visitor, None) or Session()
        self.sessions[visitor] = session
        session.answering = None
        self.stop(session)
        while len(self.sessions) > MAX_SESSIONS:
            self.sessions.pop(next(iter(self.sessions)))
        return session

    def ask(
        self,
        session: Session,
        question: str,
        system: str,
        *values: Any,
        sent_at: float | None = None,
    ) -> Iterator[View]:
        """Answer a question. values: the fields of Sampling in their order.

        sent_at: the time.monotonic() at which the visitor sent it, by default now. A question may
        have waited in a queue; a Stop since then counts.
        """
        return self._answer(
            session, session.turns, question, system, values, sent_at, is_typed=True
        )

    def retry(
        self, session: Session, system: str, *values: Any, sent_at: float | None = None
    ) -> Iterator[View]:
        """Answer the last question again."""
        if not session.turns:
            return iter([self.view(session, "There is no answer yet to repeat.")])
        *earlier, last = session.turns
        return self._answer(session, earlier, last.question, system, values, sent_at)

    def edit(
        self,
        session: Session,
        index: int,
        question: str,
        system: str,
        *values: Any,
        place: int = 0,
        sent_at: float | None = None,
    ) -> Iterator[View]:
        """Replace the question in message `index` of a chat and drop everything after it.

        question: as edited in the browser, with the joiners of `escape`. place: the number of the
        chat on the page.
        """
        before = self.view(session, "")[0][place][:index]
        earlier = session.turns[: sum(message["role"] == "user" for message in before)]
        return self._answer(session, earlier, unescape(question), system, values, sent_at)

    def stop(self, session: Session) -> None:
        """Stop the answer, also that of a question in the queue; the text so far stays."""
        session.stopped_at = time.monotonic()

    def close(self) -> None:
        """Stop the answers of all visitors."""
        self.closed_at = time.monotonic()

    def clear(self, session: Session) -> View:
        """Forget the conversation."""
        session.turns, session.number, session.system = [], 0, ""
        return self.view(session, "")

    def export(self, session: Session) -> str:
        """The conversation as JSON rows for train.py, one for each model; "" without answers."""
        rows = [
            {
                "model": assistant.name,
                "messages": self._messages(session.turns, place, session.system),
            }
            for place, assistant in enumerate(self.assistants)
            if any(turn.answers[place].strip() for turn in session.turns)
        ]
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n" if rows else ""

    def view(self, session: Session, notice: str, box: str | None = None) -> View:
        """The conversation as it is now."""
        chats = []
        for place in range(len(self.assistants)):
            messages: list[Message] = []
            for turn in session.turns:
                messages.append({"role": "user", "content": escape(turn.question)})
                if thoughts := turn.thoughts[place]:
                    # gradio shows a block with a title; it is closed once its status is "done".
                    is_done = bool(turn.answers[place]) or session.answering is None
                    block = {"title": "Thoughts", "status": "done" if is_done else "pending"}
                    message = {"role": "assistant", "content": escape(thoughts), "metadata": block}
                    messages.append(message)
                answer = escape(turn.answers[place]) or "…"
                messages.append({"role": "assistant", "content": answer})
            chats.append(messages)
        return chats, notice, box

    def _messages(self, turns: list[Turn], place: int, system: str) -> list[Message]:
        """The conversation with the model at `place`, without unanswered questions."""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            if turn.answers[place].strip():
                messages.append({"role": "user", "content": turn.question})
                messages.append(answer_message(turn.answers[place], turn.thoughts[place]))
        return messages

    def _answer(
        self,
        session: Session,
        earlier: list[Turn],
        question: str,
        system: str,
        values: tuple[Any, ...],
        sent_at: float | None = None,
        is_typed: bool = False,
    ) -> Iterator[View]:
        """Answer `question` after the turns `earlier`; both replace the turns of the session.

        values: the fields of Sampling. sent_at: as in `ask`. is_typed: the question is in the
        question box. The box is cleared if the question is accepted.
        """
        sent_at = time.monotonic() if sent_at is None else sent_at
        # No response could carry a lone surrogate. An API call may leave out a text.
        question, system = valid_text(question or ""), valid_text(system or "")
        refused, accepted = (question, "") if is_typed else (None, None)
        if self._is_stopped(session, sent_at):
            yield self.view(session, "Stopped.", refused)
            return
        turn = Turn(question, [""] * len(self.assistants), [""] * len(self.assistants))
        if not self._claim(session, turn):
            yield self.view(session, "An answer is in progress. Stop it first.", refused)
            return
        previous, notes = session.turns, []
        turns = session.turns = [*earlier, turn]
        try:
            answers = self._begin(earlier, question, system, values, notes)
            session.system = system
            session.number = session.number or self.transcript.new_conversation()
            self.transcript.log_question(session.number, system, question)
            yield self.view(session, " ".join(notes), accepted)
            yield from self._grow(session, answers, notes, sent_at)
            notes.append(self._statistics(answers))
        except UserError as error:
            notes.append(f"**{escape(str(error))}**")
        except Exception as error:  # an error of the model must not end the page
            traceback.print_exc()
            reason = escape(str(error)) or type(error).__name__
            notes.append(f"**The model failed: {reason}** The conversation is kept. Try again.")
        finally:
            if session.answering is turn:  # a reload of the page may have let in another one
                session.answering = None
            is_empty = not any(answer.strip() for answer in turn.answers)
            if is_empty and session.turns is turns:  # unless the visitor has cleared it meanwhile
                session.turns = previous
        yield self.view(session, " ".join(notes), refused if is_empty else None)

    def _claim(self, session: Session, turn: Turn) -> bool:
        """Note that `turn` is being answered; False if another one is. Threads may call it."""
        with self._claiming:
            if session.answering:
                return False
            session.answering = turn
            return True

    def _grow(
        self, session: Session, answers: list[Answer], notes: list[str], sent_at: float
    ) -> Iterator[View]:
        """Generate the answers of the last turn, a token of each at a time, and show them."""
        turns, turn, last_view = session.turns, session.turns[-1], 0.0
        with ExitStack() as stack:
            pieces = [
                stack.enter_context(
                    closing(
                        self.transcript.log_answer(session.number, answer, model=assistant.name)
                    )
                )
                for assistant, answer in zip(self.assistants, answers, strict=True)
            ]
            for _ in self.thread.iterate(zip_longest(*pieces)):
                turn.answers = [answer.text for answer in answers]
                turn.thoughts = [answer.reasoning_content for answer in answers]
                if self._is_stopped(session, sent_at) or session.turns is not turns:
                    notes.append("Stopped.")
                    break
                if time.monotonic() - last_view > SECONDS_BETWEEN_VIEWS:
                    yield self.view(session, " ".join(notes))
                    last_view = time.monotonic()

    def _is_stopped(self, session: Session, sent_at: float) -> bool:
        """True if the visitor or the end of the page has stopped a question sent at that time."""
        return max(session.stopped_at, self.closed_at) >= sent_at

    def _begin(
        self,
        earlier: list[Turn],
        question: str,
        system: str,
        values: tuple[Any, ...],
        notes: list[str],
    ) -> list[Answer]:
        """An Answer of each model, not started yet. UserError if the question is not valid."""
        max_new_tokens, temperature, top_k, top_p, penalty, greedy, seed = values
        try:
            length, top_k = int(max_new_tokens), int(top_k)
            temperature, top_p, penalty = float(temperature), float(top_p), float(penalty)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError("a setting under the question box is not a number") from error
        sampling = Sampling(
            length, temperature, top_k, top_p, penalty, bool(greedy), parse_seed(seed)
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

    def _statistics(self, answers: list[Answer]) -> str:
        """The speed of the answers, and which of them were truncated."""
        parts = []
        for assistant, answer in zip(self.assistants, answers, strict=True):
            name = f"{escape(assistant.name)}: " if len(answers) > 1 else ""
            end = ", truncated at its maximum length" if answer.is_truncated else ""
            parts.append(name + answer.statistics() + end)
        return " · ".join(parts)


def parse_seed(text: str | None) -> int | None:
    """The seed in a visitor's text field, None for an empty field."""
    try:
        return int(text) if text and text.strip() else None
    except ValueError as error:
        raise UserError(
            f"the seed must be a whole number or empty, not '{valid_text(text or '')}'"
        ) from error
