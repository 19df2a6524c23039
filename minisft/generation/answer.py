"""An answer while it is written: iterate over it for its text, and read its figures at any time."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field


@dataclass
class Answer:
    """Yields pieces of text, each of complete characters. The fields are about the text so far.

    started: the time of the question by time.perf_counter. Times are in seconds since then. Of the
    prompt, the first `num_reused` tokens were in a cache. cut_short: the answer ended because it
    reached its maximum length.
    """

    started: float
    num_prompt_tokens: int
    pieces: Generator[str, None, None] = field(init=False)
    text: str = ""
    num_reused: int = 0
    num_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    cut_short: bool = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop writing. The cache keeps what has been computed."""
        self.pieces.close()

    def count_token(self) -> None:
        """Note that another token has come."""
        self.num_tokens += 1
        self.seconds = time.perf_counter() - self.started
        if self.num_tokens == 1:
            self.seconds_to_first_token = self.seconds

    def figures(self) -> str:
        """One line about length, speed and reused tokens."""
        if not self.num_tokens:
            return "no answer"
        parts = [f"{self.num_tokens} tokens, the first after {self.seconds_to_first_token:.2f} s"]
        if self.num_tokens > 1:
            seconds = max(1e-9, self.seconds - self.seconds_to_first_token)
            parts.append(f"then {(self.num_tokens - 1) / seconds:,.1f} tokens/s")
        parts.append(f"{self.num_reused} of {self.num_prompt_tokens} prompt tokens were known")
        return ", ".join(parts)
