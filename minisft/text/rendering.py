"""Text from a chat template and a conversation.

    renderer = Renderer(template)
    [text] = renderer.render(messages, tools=None, variables={"bos_token": "<s>"}, now=now)

The template runs in a separate process, `render_process.py`, which has limits on time and memory.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from minisft.common.errors import UserError
from minisft.text import render_process
from minisft.text.render_process import MAX_SECONDS

# Bytes of a request that `begin` sends. Two of them fit into a pipe, so that writing never waits.
MAX_AHEAD = 6000


class TemplateError(UserError):
    """A chat template fails, or refuses a conversation."""


class Renderer:
    """Renders a chat template in a second process, which starts when it is first needed.

    max_seconds: processor time for a call of render. Threads may share a Renderer. After a fork, or
    in another process, it starts its own process. A conversation that is passed to `begin` first is
    rendered while this process does something else:

        renderer.begin(following, ...)
        texts = renderer.render(current, ...)
        use(texts)                              # meanwhile the other process renders `following`
        texts = renderer.render(following, ...)
    """

    def __init__(self, template: str, max_seconds: float = MAX_SECONDS) -> None:
        self.template, self.max_seconds = template, max_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that started it
        self._waiting: deque[bytes] = deque()  # requests without an answer so far
        self._replies: dict[bytes, dict[str, Any]] = {}  # answers that render has not fetched

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template, "max_seconds": self.max_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        now: str,
        renders: Sequence[tuple[int | None, dict[str, Any]]] = ((None, {}),),
    ) -> list[str]:
        """The texts of `renders`: (how many of the messages, more variables).

        now: the date and time for strftime_now, in ISO format. Raises TemplateError with the
        template's own message and line.
        """
        line = request_line(messages, tools, variables, now, renders)
        with self._lock:
            reply = self._ask(line)
        if "error" in reply:
            where = f", line {reply['line']}" if reply.get("line") else ""
            raise TemplateError(f"the chat template{where}: {reply['error']}")
        return reply["texts"]

    def begin(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        now: str,
        renders: Sequence[tuple[int | None, dict[str, Any]]],
    ) -> None:
        """Start a render ahead of time; `render` with the same arguments returns the result."""
        line = request_line(messages, tools, variables, now, renders)
        with self._lock:
            self._running()
            if len(line) <= MAX_AHEAD and len(self._waiting) < 2:
                self._send(line)

    @property
    def process_id(self) -> int | None:
        """The id of the process that renders; None if there is none now."""
        return self._process.pid if self._process is not None else None

    def _ask(self, line: bytes) -> dict[str, Any]:
        self._running()
        while line not in self._replies:
            if not self._waiting:
                self._send(line)
            self._collect()
        return self._replies.pop(line)

    def _send(self, line: bytes) -> None:
        self._write(self._running(), line)
        self._waiting.append(line)

    def _write(self, process: subprocess.Popen, line: bytes) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # without a process there is no answer

    def _collect(self) -> None:
        """Read the answer to the oldest request."""
        line, process = self._waiting.popleft(), self._running()
        assert process.stdout is not None
        reply = process.stdout.readline()
        if reply.endswith(b"\n"):
            self._replies[line] = json.loads(reply)
        else:
            status = self.close()
            message = f"it ended the process that rendered it (status {status})"
            if status == -getattr(signal, "SIGPROF", 0):
                message = f"it needs more than {self.max_seconds:g} seconds of processor time"
            self._replies[line] = {"error": message}
        while len(self._replies) > 2:
            del self._replies[next(iter(self._replies))]

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-I", render_process.__file__, str(self.max_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._waiting, self._replies = deque(), {}
            self._write(self._process, json.dumps(self.template).encode() + b"\n")
        return self._process

    def __del__(self) -> None:
        self.close()

    def close(self) -> int | None:
        """End the process, and return its status."""
        process, self._process = self._process, None
        self._waiting.clear()
        if process is None or self._owner != os.getpid():
            return None
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.stdout.close()
        return process.wait()


def request_line(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
    now: str,
    renders: Sequence[tuple[int | None, dict[str, Any]]],
) -> bytes:
    """A request as render_process.py reads it."""
    request = {
        "messages": messages,
        "tools": tools,
        "renders": renders,
        "variables": variables,
        "now": now,
    }
    return json.dumps(request).encode() + b"\n"
