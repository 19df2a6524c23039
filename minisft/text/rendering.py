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

# Bytes of requests that wait. A pipe takes them at once (Linux 64 KiB, macOS 16 KiB), so writing
# them never waits for the other process.
MAX_AHEAD = 12_000
# Conversations that `begin` remembers, and answers that nobody has asked for yet.
MAX_BEGUN = 16


class TemplateError(UserError):
    """A chat template fails, or refuses a conversation."""


class TemplateTimeout(UserError):
    """A chat template needs too much time. Another try with it would cost as much."""


class Renderer:
    """Renders a chat template in a second process, which starts when it is first needed.

    max_seconds: processor time for a call of render. Threads may share a Renderer. After a fork, or
    in another process, it starts its own process. Conversations that are passed to `begin` first
    travel together, and are rendered while this process does something else:

        renderer.begin(second, ...)
        renderer.begin(third, ...)
        texts = renderer.render(first, ...)
        use(texts)                              # meanwhile the other process renders the others
        texts = renderer.render(second, ...)
    """

    def __init__(self, template: str, max_seconds: float = MAX_SECONDS) -> None:
        self.template, self.max_seconds = template, max_seconds
        self._lock = threading.Lock()
        self._process: RenderProcess | None = None
        # The arguments of `begin`, and their request: to write it takes longer than to find it.
        self._begun = deque[tuple[tuple[Any, ...], bytes]](maxlen=MAX_BEGUN)

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
        arguments = messages, tools, variables, now, renders
        with self._lock:
            begun = (item for item in self._begun if item[0][0] is messages)
            same = (request for given, request in begun if given[1:] == arguments[1:])
            request = next(same, None)
            reply = self._ask(request or request_line(*arguments))
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
        """Ask for a render ahead of time; `render` with the same arguments returns the result.

        The request leaves with the next call of `render`. Until then, messages must not change.
        """
        arguments = messages, tools, variables, now, renders
        request = request_line(*arguments)
        with self._lock:
            self._begun.append((arguments, request))
            process = self._running_process()
            if len(request) + sum(map(len, process.waiting)) <= MAX_AHEAD:
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
            is_alone = not process.waiting
            try:
                return process.ask(request)
            except ProcessEnded as end:
                self.close()
                if not is_alone:
                    continue  # perhaps another request ended it
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
    """The process that renders has ended without an answer. status: as of Popen.returncode."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class RenderProcess:
    """A running render_process.py. It answers requests in their order.

    owner: the id of the process that started it. After a fork, the child must not use it.
    waiting: requests that are sent and not answered.
    """

    def __init__(self, template: str, max_seconds: float) -> None:
        self.owner, self.waiting = os.getpid(), deque[bytes]()
        self._answers: dict[bytes, dict[str, Any]] = {}  # to requests that `ask` passed over
        self.popen = start_process(max_seconds)
        # Not in the buffer of stdin: a forked process would send its copy of that.
        self._unsent = [json.dumps(template).encode() + b"\n"]

    def send(self, request: bytes) -> None:
        """Send a request without waiting for its answer; it leaves with the next `ask`."""
        self._unsent.append(request)
        self.waiting.append(request)

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to a request, which is sent unless it is waiting already."""
        while request not in self._answers:
            if not self.waiting:  # else its answer may fill the pipe, and both processes would wait
                self.send(request)
            self._receive()
        answer = self._answers.pop(request)
        while len(self._answers) > MAX_BEGUN:
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
        assert self.popen.stdin is not None and self.popen.stdout is not None
        if self._unsent:
            try:
                self.popen.stdin.write(b"".join(self._unsent))
                self.popen.stdin.flush()
            except BrokenPipeError:
                pass  # without a process there is no answer
            self._unsent.clear()
        answer = self.popen.stdout.readline()
        request = self.waiting.popleft()
        if not answer.endswith(b"\n"):
            raise ProcessEnded(self.popen.wait())
        self._answers[request] = json.loads(answer)


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
