"""Separate thoughts from the answer while the model writes them.

    decoder = AnswerDecoder(template, prompt_ids)
    for id in ids:
        thoughts, answer = decoder.push(id)     # new text of either
    thoughts, answer = decoder.flush()

Models that think write their thoughts first, between marks that are known from the chat template:

    <think>                                     Qwen3 writes it, the prompt of DeepSeek R1 has it
    Two and two ...
    </think>
    4
"""

from collections.abc import Sequence

from minisft.text.chat_template import ChatTemplate
from minisft.text.template_facts import ANSWER
from minisft.text.thoughts import ThoughtMarks
from minisft.text.tokenizer import StreamDecoder

# The number of tokens at the end of a prompt that may hold the mark that opens thoughts.
NUM_LAST_TOKENS = 64


class AnswerDecoder:
    """The ids of an answer to new text of (thoughts, answer).

    The pieces join to the text without control tokens, without the marks, and without white space
    around the thoughts.
    """

    def __init__(self, template: ChatTemplate, prompt_ids: Sequence[int]):
        self._tokenizer = template.tokenizer
        before_answer = (template.facts.answer or "").partition(ANSWER)[0]
        self._strips_space = before_answer.startswith(" ")  # some templates write the mark there
        self._splitter: ThoughtSplitter | None = None
        marks, after_answer = template.facts.thought_marks, end_with_words(template)
        if marks or after_answer:
            marks = marks or ThoughtMarks("", "")
            prompt_end = self._tokenizer.decode(
                prompt_ids[-NUM_LAST_TOKENS:], skip_special_tokens=False
            )
            is_open = bool(marks.opening) and prompt_end.rstrip().endswith(marks.opening)
            self._splitter = ThoughtSplitter(marks, is_open, before_answer.strip(), after_answer)
        # The marks may be control tokens.
        self._stream = StreamDecoder(self._tokenizer, skip_special_tokens=self._splitter is None)

    def push(self, id: int) -> tuple[str, str]:
        """The text that this id completes."""
        text = self._stream.push(id)
        if self._splitter is None:
            return "", self._stripped(text)
        thoughts, answer = self._splitter.push(text, id in self._tokenizer.special_ids)
        return thoughts, self._stripped(answer)

    def flush(self) -> tuple[str, str]:
        """The rest of the text."""
        text = self._stream.flush()
        if self._splitter is None:
            return "", self._stripped(text)
        thoughts, answer = self._splitter.push(text)
        more_thoughts, more_answer = self._splitter.flush()
        return thoughts + more_thoughts, self._stripped(answer + more_answer)

    def _stripped(self, answer: str) -> str:
        if self._strips_space:
            answer = answer.lstrip(" ")
            self._strips_space = not answer
        return answer


def decode_answer(
    template: ChatTemplate, prompt_ids: Sequence[int], ids: Sequence[int]
) -> tuple[str, str]:
    """(thoughts, text) of an answer."""
    decoder = AnswerDecoder(template, prompt_ids)
    thoughts, text = zip(*map(decoder.push, ids), decoder.flush(), strict=True)
    return "".join(thoughts), "".join(text)


def end_with_words(template: ChatTemplate) -> str:
    """What the template writes after an answer, if it has words between control tokens.

    Kimi K3 closes the answer with `<|close|>response<|sep|>`; the words are not part of the answer.
    Without the last token, at which generation may stop. "" if there are no such words.
    """
    after = (template.facts.answer or "").rpartition(ANSWER)[2]
    matches = template.tokens.find(after)
    if not matches or matches[0].start:
        return ""
    places = zip(matches, matches[1:], strict=False)
    has_words = any(after[first.end : second.start].strip() for first, second in places)
    return after[: matches[-1].start] if has_words else ""


class ThoughtSplitter:
    """Text in pieces of any length to new text of (thoughts, answer).

    is_open: the prompt has opened the thoughts. before_answer: a mark before answers without
    thoughts, if there is one. after_answer: control tokens and words that end an answer, if there
    are any.
    """

    def __init__(
        self, marks: ThoughtMarks, is_open: bool, before_answer: str = "", after_answer: str = ""
    ):
        self._marks, self._before_answer, self._after_answer = marks, before_answer, after_answer
        self._is_thinking: bool | None = True if is_open else None  # None: not known yet
        self._strips_left = is_open
        self._buffer = ""
        self._is_control: list[bool] = []  # for every character of the buffer

    def push(self, text: str, is_control: bool = False) -> tuple[str, str]:
        """New text that cannot be part of a mark. is_control: the piece is a control token."""
        self._buffer += text
        self._is_control += [is_control] * len(text)
        return self._split(is_end=False)

    def flush(self) -> tuple[str, str]:
        """The rest of the text; the beginning of an incomplete mark is text."""
        return self._split(is_end=True)

    def _split(self, is_end: bool) -> tuple[str, str]:
        thoughts = answer = ""
        if self._is_thinking is None:
            self._is_thinking = self._begin(is_end)
        if self._is_thinking:
            thoughts = self._think(is_end)
        if self._is_thinking is False:
            answer = self._answer()
        return thoughts, answer

    def _begin(self, is_end: bool) -> bool | None:
        """True if the text begins with thoughts; None if that is not certain yet."""
        text = self._buffer.lstrip()
        marks = {self._marks.opening: True, self._before_answer: False}
        for mark, is_thinking in marks.items():
            if mark and text.startswith(mark):
                self._drop(len(self._buffer) - len(text) + len(mark))
                return is_thinking
        if not is_end and any(mark.startswith(text) for mark in marks if mark):
            return None
        return False

    def _think(self, is_end: bool) -> str:
        """New thoughts; the answer begins after the closing mark."""
        closing, place = self._marks.closing, self._buffer.find(self._marks.closing)
        if place >= 0:
            thoughts = self._take(place).rstrip()
            self._drop(len(closing))
            self._is_thinking = False
            return thoughts
        kept = len(self._buffer)
        if not is_end:
            kept -= longest_overlap(self._buffer, closing)
        return self._take(len(self._buffer[:kept].rstrip()))

    def _answer(self) -> str:
        """New text of the answer. The rest stays in the buffer if it ends the answer, or may.

        A message may spell the end, so it has to begin with a control token.
        """
        end, text = self._after_answer, self._buffer
        place = text.find(end) if end else -1
        if place < 0:
            place = len(text) - longest_overlap(text, end)
        is_end = place < len(text) and self._is_control[place]
        return self._take(place if is_end else len(text))

    def _drop(self, count: int) -> None:
        """Remove a mark from the buffer, and the white space after it."""
        self._cut(count)
        self._strips_left = True

    def _take(self, count: int) -> str:
        """The first characters of the buffer, without control tokens."""
        text, is_control = self._cut(count)
        kept = [char for char, control in zip(text, is_control, strict=True) if not control]
        text = "".join(kept)
        if self._strips_left:
            text = text.lstrip()
            self._strips_left = not text
        return text

    def _cut(self, count: int) -> tuple[str, list[bool]]:
        text, is_control = self._buffer[:count], self._is_control[:count]
        self._buffer, self._is_control = self._buffer[count:], self._is_control[count:]
        return text, is_control


def longest_overlap(text: str, mark: str) -> int:
    """The number of characters at the end of a text with which the mark might begin."""
    lengths = range(min(len(mark), len(text)), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)
