"""What visitors of a page can do with a model: ask, stop, retry, edit, clear, take along.

    page, talk = Page([Assistant("examples/base", "runs/demo")], Sampling()), Talk()
    sampling = (512, 0.95, 50, 0.7, 1.0, False, "")             # as the fields of Sampling
    for chats, notice, box in page.ask(talk, "What is 2 + 2?", "", *sampling):
        print(chats[0][-1]["content"])

Each visitor has a Talk on the server, of which the browser shows a picture: an error, or a page
that is loaded again, loses none of it. web.py shows this with gradio, which is not needed here.
"""

import json
import re
import time
import traceback
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count, zip_longest

from minisft.chat.transcript import Transcript
from minisft.common.errors import UserError
from minisft.generation.generate import Sampling

SECONDS_BETWEEN_VIEWS = 0.05
KEPT_TALKS = 1000  # visitors whose conversation is there when they load the page again
# Blocks between fences, in lists too (an open one goes to the end), and code between backticks.
CODE = re.compile(
    r"(^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})"
    r"[\s\S]*?(?:^[ \t>]*(?P=fence)[`~]*[ \t]*$|\Z)"
    r"|(?P<ticks>(?<!`)`+(?!`))[^\n]+?(?<!`)(?P=ticks)(?!`))",
    re.MULTILINE,
)
JOINER = "\u2060"  # has no width, and behind "<" makes it no tag
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|!(?=\[)")


@dataclass
class Turn:
    """A question and what each model has answered so far."""

    question: str
    answers: list


@dataclass
class Talk:
    """The conversation of one visitor, with each of the models."""

    turns: list = field(default_factory=list)
    number: int = 0  # in the transcript, from 1; 0 before there is anything to write
    system: str = ""
    busy: bool = False
    stopping: bool = False


class Page:
    """One or two Assistants and what visitors can do with them.

    The methods that answer are generators of (chats, notice, box): for each model its messages as
    gradio's Chatbot takes them, a line of Markdown, and the text for the question's box (None: as
    it is). They show errors instead of raising them.
    """

    def __init__(self, assistants, sampling, system="", transcript=None):
        self.assistants, self.sampling, self.system = assistants, sampling, system
        self.transcript, self.numbers = transcript or Transcript(), count(1)
        self.talks = {}  # visitor: Talk, the one who came last at the end

    def come_back(self, visitor):
        """The Talk of a visitor, by a name that nobody else can guess; a new one for a new name.

        An answer that is still being written for the page as it was before ends.
        """
        self.talks[visitor] = talk = self.talks.pop(visitor, None) or Talk()
        talk.busy, talk.stopping = False, True
        while len(self.talks) > KEPT_TALKS:
            self.talks.pop(next(iter(self.talks)))
        return talk

    def ask(self, talk, question, system, *sampling):
        """Answer a question; sampling: the fields of Sampling in their order."""
        return self._answer(talk, talk.turns, question, system, sampling)

    def retry(self, talk, system, *sampling):
        """Answer the last question again."""
        if not talk.turns:
            return iter([self.view(talk, "There is no answer yet to do again.")])
        *earlier, last = talk.turns
        return self._answer(talk, earlier, last.question, system, sampling, box=None)

    def edit(self, talk, index, question, system, *sampling):
        """Ask another question in place of message `index`; what came after it goes.

        The question is as it was edited on the page: with what `shown` has put into it.
        """
        question = question.replace(JOINER, "")
        return self._answer(talk, talk.turns[: index // 2], question, system, sampling, box=None)

    def stop(self, talk):
        """End the answer that is being written; what has come of it stays."""
        talk.stopping = True

    def clear(self, talk):
        """Forget the conversation -> (chats, notice, box)."""
        talk.turns, talk.number, talk.system = [], 0, ""
        return self.view(talk, "")

    def export(self, talk):
        """The conversation as JSON that train.py reads, a row for each model that has answered."""
        rows = [
            {"model": one.name, "messages": self._messages(talk.turns, place, talk.system)}
            for place, one in enumerate(self.assistants)
            if any(turn.answers[place].strip() for turn in talk.turns)
        ]
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n" if rows else ""

    def view(self, talk, notice, box=None):
        """(chats, notice, box) of what has been said."""
        chats = [
            [
                message
                for turn in talk.turns
                for message in (
                    {"role": "user", "content": shown(turn.question)},
                    {"role": "assistant", "content": shown(turn.answers[place]) or "…"},
                )
            ]
            for place in range(len(self.assistants))
        ]
        return chats, notice, box

    def _messages(self, turns, place, system):
        """The conversation with the model at `place`; a question it left unanswered is left out."""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            if turn.answers[place].strip():
                messages += [
                    {"role": "user", "content": turn.question},
                    {"role": "assistant", "content": turn.answers[place]},
                ]
        return messages

    def _answer(self, talk, earlier, question, system, sampling, box=""):
        """Answer `question` after the turns `earlier`; they replace the talk's once it begins."""
        refused = question if box == "" else None  # a question that was typed is given back
        if talk.busy:
            yield self.view(talk, "An answer is still being written: stop it first.", refused)
            return
        talk.busy, talk.stopping, before, notes = True, False, talk.turns, []
        turn = Turn(question, [""] * len(self.assistants))
        turns = talk.turns = [*earlier, turn]
        try:
            with ExitStack() as stack:
                answers = self._begin(earlier, turn, system, sampling, notes)
                talk.system = system
                pieces = [
                    stack.enter_context(closing(one))
                    for one in self._logged(talk, question, answers)
                ]
                yield self.view(talk, " ".join(notes), box)
                yield from self._follow(talk, turns, pieces, answers, notes)
            notes += [self._figures(answers)]
        except UserError as error:
            notes += [f"**{shown(str(error))}**"]
        except Exception as error:  # of the model: the page lives on, the server's log tells where
            traceback.print_exc()
            notes += [
                f"**The model failed: {shown(str(error)) or type(error).__name__}** "
                "The conversation is kept; try again."
            ]
        finally:
            talk.busy = False
            empty = not any(answer.strip() for answer in turn.answers)
            if empty and talk.turns is turns:  # else it has been cleared meanwhile
                talk.turns = before
        yield self.view(talk, " ".join(notes), refused if empty else None)

    def _begin(self, earlier, turn, system, sampling, notes):
        """An Answer from each model; UserError for what cannot be asked."""
        max_new_tokens, temperature, top_k, top_p, penalty, greedy, seed = sampling
        sampling = Sampling(
            int(max_new_tokens), temperature, int(top_k), top_p, penalty, greedy, seed_of(seed)
        )
        question = {"role": "user", "content": turn.question}
        return [
            assistant.stream(
                [*self._messages(earlier, place, system), question],
                sampling,
                say=lambda text: notes.append(f"{text.capitalize()}."),
            )
            for place, assistant in enumerate(self.assistants)
        ]

    def _logged(self, talk, question, answers):
        """The pieces of the answers, with all of the turn in the transcript."""
        talk.number = talk.number or next(self.numbers)
        self.transcript.write(talk.number, "system", talk.system)
        self.transcript.write(talk.number, "user", question)
        return [
            self.transcript.follow(talk.number, answer, model=assistant.name)
            for assistant, answer in zip(self.assistants, answers, strict=True)
        ]

    def _follow(self, talk, turns, pieces, answers, notes):
        """Write all answers side by side, a token of each at a time, and show them as they grow."""
        shown_at = 0.0
        for _ in zip_longest(*pieces):
            turns[-1].answers = [answer.text for answer in answers]
            if talk.stopping or talk.turns is not turns:
                notes.append("Stopped.")
                return
            if time.monotonic() - shown_at > SECONDS_BETWEEN_VIEWS:
                yield self.view(talk, " ".join(notes))
                shown_at = time.monotonic()

    def _figures(self, answers):
        """How fast the answers came, and why they ended if it was not by themselves."""
        parts = []
        for assistant, answer in zip(self.assistants, answers, strict=True):
            name = f"{shown(assistant.name)}: " if len(answers) > 1 else ""
            cut = ", cut because the room for it was used up" if answer.cut_short else ""
            parts.append(name + answer.figures() + cut)
        return " · ".join(parts)


def seed_of(text):
    """The seed that a visitor has typed, None for an empty field."""
    try:
        return int(text) if text and text.strip() else None
    except ValueError as error:
        raise UserError(f"the seed must be a whole number or empty, not '{text}'") from error


def shown(text):
    """Text of anyone as Markdown that is only read: tags stand as they are, images are links.

    What would be markup gets a JOINER, which nobody sees and the page's copies leave out; code is
    left alone. The page's sanitizer and POLICY stand behind this.
    """
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [_marked(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join(parts) + _marked(text[end:])


def _marked(text):
    return MARKUP.sub(lambda found: found[0] + JOINER, text)
