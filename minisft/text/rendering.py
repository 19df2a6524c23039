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

# Bytes of a request that `begin` sends. A pipe takes two of them at once (Linux 64 KiB, macOS
# 16 KiB), so writing them never waits for the other process.
MAX_AHEAD = 6000


class TemplateError(UserError):
    """A chat template fails, or refuses a conversation."""


class TemplateTimeout(UserError):
    """A chat template needs too much time. Another try with it would cost as much."""


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
        self._process: RenderProcess | None = None

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
        template's own message and line, or TemplateTimeout.
        """
        request = request_line(messages, tools, variables, now, renders)
        with self._lock:
            reply = self._ask(request)
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
        request = request_line(messages, tools, variables, now, renders)
        with self._lock:
            process = self._running_process()
            if len(request) <= MAX_AHEAD and len(process.waiting) < 2:
                process.send(request)

    @property
    def process_id(self) -> int | None:
        """The id of the process that renders; None if there is none now."""
        return self._process.popen.pid if self._process is not None else None

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def __del__(self) -> None:
        self.close()

    def _running_process(self) -> "RenderProcess":
        if self._process is None or self._process.owner != os.getpid():
            self._process = RenderProcess(self.template, self.max_seconds)
        return self._process

    def _ask(self, request: bytes) -> dict[str, Any]:
        while True:
            process = self._running_process()
            try:
                return process.ask(request)
            except ProcessEnded as end:
                self.close()
                if end.request != request:
                    continue  # a request that `begin` sent ended it
                if end.status == -getattr(signal, "SIGPROF", 0):
                    raise TemplateTimeout(
                        "the chat template: it needs more than "
                        f"{self.max_seconds:g} seconds of processor time"
                    ) from None
                return {"error": f"it ended the process that rendered it (status {end.status})"}
            except BaseException:  # Ctrl-C: the next answer in the pipe may be to another request
                self.close()
                raise


def start_process(max_seconds: float) -> subprocess.Popen[bytes]:
    """Start render_process.py."""
    return subprocess.Popen(
        [sys.executable, "-I", render_process.__file__, str(max_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


class ProcessEnded(Exception):
    """The process that renders has ended during a request. status: as of Popen.returncode."""

    def __init__(self, request: bytes, status: int) -> None:
        super().__init__(status)
        self.request, self.status = request, status


class RenderProcess:
    """A running render_process.py. It answers requests in their order.

    owner: the id of the process that started it. After a fork, the child must not use it.
    waiting: requests that are sent and not answered.
    """

    def __init__(self, template: str, max_seconds: float) -> None:
        self.owner, self.waiting = os.getpid(), deque[bytes]()
        self._answers: dict[bytes, dict[str, Any]] = {}  # to requests that `ask` passed over
        self.popen = start_process(max_seconds)
        self._write(json.dumps(template).encode() + b"\n")

    def send(self, request: bytes) -> None:
        """Send a request without waiting for its answer."""
        self._write(request)
        self.waiting.append(request)

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to a request, which is sent unless it is waiting already."""
        while request not in self._answers:
            if not self.waiting:  # else its answer may fill the pipe, and both processes would wait
                self.send(request)
            self._receive()
        answer = self._answers.pop(request)
        while len(self._answers) > 2:
            del self._answers[next(iter(self._answers))]
        return answer

    def close(self) -> None:
        """End the process."""
        if self.owner != os.getpid():
            return
        assert self.popen.stdin is not None and self.popen.stdout is not None
        # Forked workers have copies of its stdin, so closing this one may not end it.
        self.popen.kill()
        try:
            self.popen.stdin.close()
        except BrokenPipeError:
            pass
        self.popen.stdout.close()
        self.popen.wait()

    def _receive(self) -> None:
        """Read the answer to the oldest request; ProcessEnded if there is none."""
        assert self.popen.stdout is not None
        answer = self.popen.stdout.readline()
        request = self.waiting.popleft()
        if not answer.endswith(b"\n"):
            raise ProcessEnded(request, self.popen.wait())
        self._answers[request] = json.loads(answer)

    def _write(self, line: bytes) -> None:
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(line)
            self.popen.stdin.flush()
        except BrokenPipeError:
            pass  # without a process there is no answer


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
