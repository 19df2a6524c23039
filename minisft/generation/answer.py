"""A streamed answer: iterate over it for the text; its counters are always up to date."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field


@dataclass
class Answer:
    """Yields pieces of text, each of complete characters. The fields describe the text so far.

    started: time.perf_counter() at the question; times are in seconds since then. num_reused:
    tokens at the beginning of the prompt that were in a cache. is_truncated: the answer ended
    because it reached its maximum length.
    """

    started: float
    num_prompt_tokens: int
    pieces: Generator[str, None, None] = field(init=False)
    text: str = ""
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
