"""The log of conversations, written as they go, so that a crash loses nothing.

    transcript = Transcript("chat.jsonl")
    number = transcript.new_conversation()
    transcript.log_question(number, "Be brief.", "What is 2 + 2?")
    for piece in transcript.log_answer(number, answer):
        print(piece, end="")

Every line is JSON: {"time", "conversation", "role", "content"}, and "reasoning_content" for
thoughts. Conversations in one file have different numbers, also those of several runs, one after
another. A slow answer takes several lines; the last of them has "end": "complete", "truncated" if
the answer reached its maximum length, or "stopped".
"""

import json
import re
import time
from collections.abc import Generator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Lock

from minisft.common.errors import UserError
from minisft.generation.answer import Answer, answer_message

SECONDS_BETWEEN_PARTS = 1.0
NUMBER = re.compile(rb'\{"time": "[^"]*", "conversation": (\d+),')  # the beginning of a line


class Transcript:
    """Appends conversations to a file, from any number of threads. path None: writes nothing.

    UserError if the file cannot be written.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path
        self._lock, highest = Lock(), 0
        self._systems: dict[int, str] = {}  # the last one written, by conversation
        try:
            self._file = open(path, "ab+") if path else None
            if self._file and self._file.tell():
                # A crash may have truncated the last line. End it before the next line.
                self._file.seek(-1, 2)
                self._file.write(b"" if self._file.read() == b"\n" else b"\n")
                self._file.seek(0)
                matches = filter(None, map(NUMBER.match, self._file))
                highest = max((int(match[1]) for match in matches), default=0)
        except OSError as error:  # a pipe has no strerror
            raise UserError(f"--log {path}: {error.strerror or error}") from error
        self._numbers = count(highest + 1)

    def new_conversation(self) -> int:
        """The number of a new conversation: from 1, or after those in the file."""
        return next(self._numbers)

    def log_question(self, conversation: int, system: str, question: str) -> None:
        """Log a question, and before it the system prompt if it has changed."""
        if system != self._systems.get(conversation, ""):
            self._systems[conversation] = system
            self._write(conversation, "system", system)
        self._write(conversation, "user", question)

    def log_answer(
        self, conversation: int, answer: Answer, **more: str
    ) -> Generator[str, None, None]:
        """Yield the pieces of an answer, and log them every second and at the end."""
        num_written, num_thoughts, written, end = 0, 0, time.monotonic(), "stopped"

        def write(**more: str) -> None:
            """Write the text that has arrived since the last line."""
            message = answer_message(
                answer.text[num_written:], answer.reasoning_content[num_thoughts:]
            )
            self._write(conversation, **message, **more)

        try:
            for piece in answer:
                if time.monotonic() - written > SECONDS_BETWEEN_PARTS:
                    write(**more)
                    num_written, num_thoughts = len(answer.text), len(answer.reasoning_content)
                    written = time.monotonic()
                yield piece
            end = "truncated" if answer.is_truncated else "complete"
        finally:
            write(**more, end=end)

    def _write(self, conversation: int, role: str, content: str, **more: str) -> None:
        """Append a line and flush it, so that it survives the end of this process."""
        if self._file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "conversation": conversation, "role": role, "content": content, **more}
        text = json.dumps(line, ensure_ascii=False) + "\n"
        try:
            with self._lock:
                # "replace": half of a surrogate pair, which is not text, becomes a question mark.
                self._file.write(text.encode("utf-8", "replace"))
                self._file.flush()
        except OSError as error:
            raise UserError(f"--log {self.path}: {error.strerror}") from error
