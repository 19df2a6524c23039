"""Prompts for multiple-choice questions, as plain text or in a chat template.

    builder = PromptBuilder(BENCHMARKS["ceval"], tokenizer, template=None, max_length=2048)
    prompt = builder.build(subject, subject.demonstrations[:5], subject.questions[0])

The tokens of a letter are those after the prompt: Llama 2 has one token `A` for the middle of a
line and another for its beginning.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minisft.common.errors import UserError
from minisft.common.sequences import common_prefix_length
from minisft.evaluation.benchmarks import LETTERS, Benchmark, Question, Subject
from minisft.text.chat_template import ChatTemplate
from minisft.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of each letter as it continues the prompt."""

    ids: list[int]
    options: list[list[int]]  # in the order of LETTERS
    num_fewshot: int  # demonstrations that fitted
    is_cut: bool = False  # whether the question itself lost its beginning


class PromptBuilder:
    """Builds prompts of at most max_length tokens, with the letter that follows.

    template: None for plain text. In a chat template, each demonstration is a turn of the user and
    one of the assistant.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        max_length: int = 2048,
    ):
        self.benchmark, self.tokenizer = benchmark, tokenizer
        self.template, self.max_length = template, max_length

    def build(
        self, subject: Subject, demonstrations: Sequence[Question], question: Question
    ) -> Prompt:
        """The prompt with the first demonstrations, as many as fit.

        A question that is too long even without demonstrations loses its beginning.
        """
        for count in range(len(demonstrations), 0, -1):
            ids, options = self._encode(subject, demonstrations[:count], question)
            if len(ids) <= self._room(options):
                return Prompt(ids, options, count)
        ids, options = self._encode(subject, [], question)
        room = self._room(options)
        if len(ids) <= room:
            return Prompt(ids, options, 0)
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return Prompt(begin + ids[len(ids) - room + len(begin) :], options, 0, is_cut=True)

    def _room(self, options: list[list[int]]) -> int:
        """The longest prompt that fits before the options."""
        # The model reads an option without its last token.
        return self.max_length - max(map(len, options)) + 1

    def _encode(
        self, subject: Subject, demonstrations: Sequence[Question], question: Question
    ) -> tuple[list[int], list[list[int]]]:
        """(ids of the prompt, ids of each letter): the letters are where the texts differ.

        The common end of these texts, such as an end-of-turn token, is left out: it says nothing
        about the letter.
        """
        texts = [self._ids(subject, demonstrations, question, letter) for letter in LETTERS]
        without_letter = self._ids(subject, demonstrations, question, None)
        start = shared_prefix_length([without_letter, *texts])
        endings = [ids[start:] for ids in texts]
        num_shared = shared_prefix_length([ids[::-1] for ids in endings])
        options = [ids[: len(ids) - num_shared] for ids in endings]
        if not all(options) or len(set(map(tuple, options))) < len(options):
            raise UserError(
                "the tokenizer gives some of the letters A, B, C and D the same tokens, so no "
                "model can answer with it. Is it the tokenizer of this checkpoint?"
            )
        return texts[0][:start], options

    def _ids(
        self,
        subject: Subject,
        demonstrations: Sequence[Question],
        question: Question,
        letter: str | None,
    ) -> list[int]:
        """Ids of the prompt with a letter; if it is None, up to where the letter follows."""
        heading = self.benchmark.heading.format(subject=subject.name)
        turns = [(self.benchmark.ask(shown), shown.answer) for shown in demonstrations]
        turns.append((self.benchmark.ask(question), letter))
        if self.template is None:
            text = heading + "\n\n".join(
                asked + (self.benchmark.letter.format(letter=answer) if answer else "")
                for asked, answer in turns
            )
            bos = self.tokenizer.bos_token_id
            begin = [bos] if self.tokenizer.add_bos_token and bos is not None else []
            return begin + self.tokenizer.encode(text)
        messages: list[dict[str, Any]] = []
        for asked, answer in turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        messages[0]["content"] = heading + messages[0]["content"]
        if letter is None:
            return self.template.encode_prompt(messages[:-1])
        return self.template.encode(messages)[-1].ids


def shared_prefix_length(sequences: Sequence[list[int]]) -> int:
    """How many items at the beginning are equal in all lists."""
    # Among sorted lists, the first and the last have the shortest common prefix.
    return common_prefix_length(min(sequences), max(sequences))


def choose_demonstrations(
    subject: Subject, num_fewshot: int, run: int = 0, seed: int = 0
) -> list[Question]:
    """The demonstrations of a repetition: the first ones for run 0, random ones for others."""
    if run == 0:
        return subject.demonstrations[:num_fewshot]
    generator = random.Random(f"{seed} {run} {subject.key}")
    count = min(num_fewshot, len(subject.demonstrations))
    return generator.sample(subject.demonstrations, count)
