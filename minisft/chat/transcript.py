"""The transcript of conversations, on disk as they go, so that a crash loses nothing.

    transcript = Transcript("chat.jsonl")
    transcript.write("1", "user", "What is 2 + 2?")
    for piece in transcript.follow("1", pieces):
        print(piece, end="")

JSON lines: {"time", "conversation", "role", "content"}. An answer that is long in coming is in
several lines, of which the last says in "end" how it came: "complete" or "stopped".
"""

import json
import time
from datetime import UTC, datetime
from threading import Lock

from minisft.common.errors import UserError

SECONDS_BETWEEN_PARTS = 1.0


class Transcript:
    """A file that conversations, of several threads too, are added to; without a path nothing is.

    Raises UserError where the file cannot be written.
    """

    def __init__(self, path=None):
        self.path, self._lock = path, Lock()
        try:
            self._file = open(path, "ab+") if path else None
            if self._file and self._file.tell():
                self._file.seek(-1, 2)
                # Of a line that a crash has cut, the rest is lost, but not the next one.
                self._file.write(b"" if self._file.read() == b"\n" else b"\n")
        except OSError as error:
            raise UserError(f"--log {path}: {error.strerror}") from error

    def write(self, conversation, role, content, **more):
        """Add a line, which is with the operating system when this returns."""
        if not self._file:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "conversation": conversation, "role": role, "content": content, **more}
        try:
            with self._lock:
                # Half of a surrogate pair, which is not text, becomes a question mark.
                text = json.dumps(line, ensure_ascii=False) + "\n"
                self._file.write(text.encode("utf-8", "replace"))
                self._file.flush()
        except OSError as error:
            raise UserError(f"--log {self.path}: {error.strerror}") from error

    def follow(self, conversation, pieces, **more):
        """Yield the pieces of an answer; what has come is written every second and at the end."""
        part, written, end = "", time.monotonic(), "stopped"
        try:
            for piece in pieces:
                part += piece
                if time.monotonic() - written > SECONDS_BETWEEN_PARTS:
                    self.write(conversation, "assistant", part, **more)
                    part, written = "", time.monotonic()
                yield piece
            end = "complete"
        finally:
            self.write(conversation, "assistant", part, **more, end=end)
