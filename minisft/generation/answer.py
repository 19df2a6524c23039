"""Answers of a model.

answer = assistant.stream(messages)
for piece in answer:                    # while it is written
    print(piece, end="")
print(answer.reasoning_content, answer.statistics())
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from minisft.text.messages import Message


@dataclass(frozen=True)
class Response:
    """A complete answer. score: the mean log-probability of its tokens; 0 means certain."""

    text: str
    reasoning_content: str
    score: float


def answer_message(text: str, reasoning_content: str = "") -> Message:
    """A message of the assistant; a chat template decides whether it shows the thoughts."""
    message: Message = {"role": "assistant", "content": text}
    return message | ({"reasoning_content": reasoning_content} if reasoning_content else {})


@dataclass
class Answer:
    """A streamed answer: yields pieces of text, each of complete characters.

    A piece is empty while the model thinks; its thoughts are in `reasoning_content`. The fields
    describe the text so far. started: time.perf_counter() at the question; times are in seconds
    since then. num_reused: tokens at the beginning of the prompt that were in a cache.
    is_truncated: the answer ended because it reached its maximum length.
    """

    started: float
    num_prompt_tokens: int
    pieces: Generator[str, None, None] = field(init=False)
    text: str = ""
    reasoning_content: str = ""
    num_reused: int = 0
    num_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    is_truncated: bool = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.text += piece
        return piece

    @property
    def message(self) -> Message:
        """The answer as a message, with its thoughts if it has any."""
        return answer_message(self.text, self.reasoning_content)

    def close(self) -> None:
        """Stop the answer. The cache keeps what has been computed."""
        self.pieces.close()

    def count_token(self) -> None:
        """Count a new token."""
        self.num_tokens += 1
        self.seconds = time.perf_counter() - self.started
        if self.num_tokens == 1:
            self.seconds_to_first_token = self.seconds

    def statistics(self) -> str:
        """Length, speed and reused tokens, on one line."""
        if not self.num_tokens:
            return "no answer"
        parts = [f"{self.num_tokens} tokens, the first after {self.seconds_to_first_token:.2f} s"]
        if self.num_tokens > 1:
            seconds = max(1e-9, self.seconds - self.seconds_to_first_token)
            parts.append(f"then {(self.num_tokens - 1) / seconds:,.1f} tokens/s")
        parts.append(f"{self.num_reused} of {self.num_prompt_tokens} prompt tokens were cached")
        return ", ".join(parts)
