"""The context of a model, divided between a conversation and its answer.

    context = Context(template, max_length=2048)
    kept = context.fit(messages, max_new_tokens=512)    # drops the oldest turns if needed

Dropping one turn whenever room is needed would change the beginning of every prompt, and the KV
cache would be useless. So the number of dropped tokens is rounded up to a multiple of half the room
for turns: the beginning stays the same until that much new text has been added.
"""

import math
from bisect import bisect_left
from typing import Any

from minisft.common.errors import UserError
from minisft.data.formats import Tools
from minisft.data.long_rows import MAX_CHARACTERS_PER_TOKEN, count_characters
from minisft.generation.messages import check_text
from minisft.text.chat_template import ChatTemplate
from minisft.text.messages import Message


class Context:
    """max_length tokens for prompt and answer; the answer gets at most half of them."""

    def __init__(self, template: ChatTemplate, max_length: int):
        self.template, self.max_length = template, max_length

    def fit(
        self, messages: list[Message], max_new_tokens: int, tools: Tools = None
    ) -> list[Message]:
        """The messages, without their oldest turns if they leave no room for max_new_tokens.

        messages: from check_messages. The system prompt stays. UserError if the last turn alone is
        too long.
        """
        limit = self._prompt_limit(max_new_tokens)
        if self._excess(messages, limit, tools) is None:
            return messages
        num_system = 1 if messages and messages[0].get("role") == "system" else 0
        system, turns = messages[:num_system], messages[num_system:]
        questions = [place for place, turn in enumerate(turns) if turn.get("role") == "user"]
        last = system + turns[max(questions, default=0) :]
        if system:
            self.check_system(system[0].get("content"), max_new_tokens)
        name = "the message with the system prompt" if system else "the message"
        self._check_length(last, limit, name, tools)

        total = self._num_tokens(messages, tools)
        room = limit - self._num_tokens(system + [{"role": "user", "content": "x"}], tools)
        half = max(1, room // 2)
        target = total - half * math.ceil((total - limit) / half)

        def is_short_enough(start: int) -> bool:
            """True if the turns from `start` on fit into `target` tokens."""
            return self._num_tokens(system + turns[start:], tools) <= target

        # The first question from which the rest of the conversation is short enough.
        place = bisect_left(questions, True, key=is_short_enough)
        return system + turns[questions[place] :] if place < len(questions) else last

    def check_system(self, text: Any, max_new_tokens: int, name: str = "the system prompt") -> None:
        """UserError if a system prompt leaves no room for a question."""
        check_text(text, name)
        shortest = [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
        self._check_length(shortest, self._prompt_limit(max_new_tokens), name)

    def answer_limit(self, prompt: list[int], max_new_tokens: int) -> int:
        """The maximum length of the answer to a prompt of token ids."""
        return min(max_new_tokens, self.max_length - len(prompt))

    def _prompt_limit(self, max_new_tokens: int) -> int:
        return self.max_length - min(max_new_tokens, self.max_length // 2)

    def _num_tokens(self, messages: list[Message], tools: Tools) -> int:
        return len(self.template.encode_prompt(messages, tools))

    def _excess(self, messages: list[Message], limit: int, tools: Tools = None) -> str | None:
        """The length of messages in words if it is over the limit; else None."""
        # No text has that many characters per token, so it is refused without encoding it.
        if (length := count_characters(messages, tools)) > limit * MAX_CHARACTERS_PER_TOKEN:
            return f"{length:,} characters"
        length = self._num_tokens(messages, tools)
        return f"{length} tokens with its template" if length > limit else None

    def _check_length(
        self, messages: list[Message], limit: int, name: str, tools: Tools = None
    ) -> None:
        if excess := self._excess(messages, limit, tools):
            raise UserError(
                f"{name} is too long: {excess}, the limit is {limit} tokens (of "
                f"{self.max_length}, the rest is for the answer). Shorten it, or lower "
                "--max_new_tokens."
            )
