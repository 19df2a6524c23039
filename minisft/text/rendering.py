"""Text from a chat template and a conversation.

    renderer = Renderer(template)
    [text] = renderer.render(messages, tools=None, variables={"bos_token": "<s>"}, now=now)

The template runs in a process of its own, `render_process.py`, which has limits on time and memory.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from minisft.common.errors import UserError
from minisft.text import render_process
from minisft.text.render_process import MAX_SECONDS


class TemplateError(UserError):
    """A chat template fails, or refuses a conversation."""


class Renderer:
    """Renders a chat template in a second process, which starts when it is first needed.

    max_seconds: processor time for a call of render. Threads may share a Renderer. After a fork, or
    in another process, it starts its own process.
    """

    def __init__(self, template: str, max_seconds: float = MAX_SECONDS) -> None:
        self.template, self.max_seconds = template, max_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that started it

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
        request: dict[str, Any] = {
            "template": None,
            "messages": messages,
            "tools": tools,
            "renders": renders,
            "variables": variables,
            "now": now,
        }
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                request["template"] = self.template
            reply = self._ask(json.dumps(request).encode() + b"\n")
        if "error" in reply:
            where = f", line {reply['line']}" if reply.get("line") else ""
            raise TemplateError(f"the chat template{where}: {reply['error']}")
        return reply["texts"]

    @property
    def process_id(self) -> int | None:
        """The id of the process that renders; None if there is none now."""
        return self._process.pid if self._process is not None else None

    def _ask(self, line: bytes) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return json.loads(reply)
        status = self.close()
        if status == -getattr(signal, "SIGPROF", 0):
            return {"error": f"it needs more than {self.max_seconds:g} seconds of processor time"}
        return {"error": f"it ended the process that rendered it (status {status})"}

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-I", render_process.__file__, str(self.max_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._process

    def __del__(self) -> None:
        self.close()

    def close(self) -> int | None:
        """End the process, and return its status."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        process.stdout.close()
        return process.wait()
