"""ASGI middleware that every request passes on its way to gradio.

    layers = (Policy, Failures, Arrivals, Logins)
    app_kwargs = {"middleware": [Middleware(layer) for layer in layers]}

Policy      limits what the browser loads and runs; refuses large requests
Failures    makes one line in the log of a request that gradio cannot handle
Arrivals    notes when a request came; the queue would hide it
Logins      lets only visitors with the password use the API; a wrong one delays the next guess
"""

import asyncio
import re
import sys
import time
import traceback
from base64 import b64encode
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from minisft.common.errors import first_line

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_REQUEST_BYTES = 32 * 2**20
# The browser contacts only this server, whatever an answer contains. gradio's own styles are
# inline, and the `js` of its events needs unsafe-eval. SCRIPTS: the hashes of its inline scripts.
POLICY = (
    "default-src 'self'; script-src 'self' SCRIPTS'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)

API = "/gradio_api/"
STARTUP = API + "startup-events"  # gradio's launch asks for it, and has no password
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds after a wrong password; each doubles the delay
FORGET_SECONDS = 600
MAX_ADDRESSES = 10_000  # addresses whose wrong passwords are remembered


class Policy:
    """Adds POLICY to every response and refuses large requests."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        response = _ResponseWithPolicy(send)
        headers = dict(scope["headers"])
        size = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or int(size) > MAX_REQUEST_BYTES:
            await answer(response.send, 413, "The request is too large.")
        else:
            await self.app(scope, receive, response.send)


class _ResponseWithPolicy:
    """Sends a response. A page is held back until it is complete, for the hashes of its scripts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self._page: bytes | None = None

    async def send(self, message: Message) -> None:
        """Send, or hold back, a part of the response."""
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", []))
            self._start = message
            if headers.get(b"content-type", b"").startswith(b"text/html"):
                self._page = b""
            else:
                await self._begin(b"")
            return
        if self._page is not None and message["type"] == "http.response.body":
            self._page += message.get("body", b"")
            if message.get("more_body"):
                return
            await self._begin(self._page)
            message, self._page = {**message, "body": self._page}, None
        await self._send(message)

    async def _begin(self, page: bytes) -> None:
        header = (b"content-security-policy", policy(page).encode())
        await self._send({**self._start, "headers": [*self._start.get("headers", []), header]})


def policy(page: bytes = b"") -> str:
    """The policy of a page. Only the inline scripts that the page has now may run."""
    digests = [sha256(script).digest() for script in INLINE_SCRIPT.findall(page)]
    return POLICY.replace(
        "SCRIPTS", "".join(f"'sha256-{b64encode(digest).decode()}' " for digest in digests)
    )


class Failures:
    """Makes one line in the log of a request that gradio cannot handle, and answers it."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        has_begun = False

        async def send_and_see(message: Message) -> None:
            """Send a part of the response."""
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_see)
        except Exception as error:
            reason = log_refusal(f"a request for {scope.get('path')}", error)
            if not has_begun:
                await answer(send, 500, reason)


def log_refusal(call: str, error: Exception) -> str:
    """Print one line about a call that failed; returns the reason."""
    call, reason = (
        "".join(filter(str.isprintable, text))[:200] for text in (call, first_line(error))
    )
    place = traceback.extract_tb(error.__traceback__)[-1]
    print(
        f"refused {call}: {reason} ({type(error).__name__}, {Path(place.filename).name}, "
        f"line {place.lineno})",
        file=sys.stderr,
    )
    return reason


class Arrivals:
    """Notes when a request came."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        scope.setdefault("state", {})["arrived_at"] = time.monotonic()
        await self.app(scope, receive, send)


def arrival(request: Any) -> float:
    """The time.monotonic() at which a request came. request: gradio's, of an event."""
    return request.state.arrived_at


class Logins:
    """Lets only visitors with the password use the API, and delays guesses at it.

    gradio lets everyone end an answer, or hold a connection. Each wrong password doubles the delay
    of the next guess from the same address. Guesses that come at once wait for each other.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        # {address: (number of wrong passwords, time of the next guess)}, the latest last
        self.guesses: dict[str, tuple[int, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        path = scope.get("path", "")
        is_guarded = is_post or path.startswith(API) and path != STARTUP
        if is_post and path.rstrip("/") == "/login":
            await self._log_in(scope, receive, send)
        elif is_guarded and not is_logged_in(scope):
            await answer(send, 401, "Log in first.")
        else:
            await self.app(scope, receive, send)

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        address, now = (scope.get("client") or ("",))[0], time.monotonic()
        number, free_at = self.guesses.pop(address, (0, now))
        if now > free_at + FORGET_SECONDS:
            number = 0
        free_at = max(now, free_at)
        is_patient = free_at - now <= LONGEST_DELAY
        if is_patient:
            # Assume a wrong guess before the check, so that guesses sent at once wait too.
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(number, 30))
            self.guesses[address] = number + 1, free_at + delay
        else:
            self.guesses[address] = number, free_at
        while len(self.guesses) > MAX_ADDRESSES:
            self.guesses.pop(next(iter(self.guesses)))
        if not is_patient:
            return await answer(send, 429, "Too many wrong passwords. Try again in a minute.")
        await asyncio.sleep(free_at - now)

        async def send_and_see(message: Message) -> None:
            """Send a part of the response; forget the guesses of a visitor who is let in."""
            if message["type"] == "http.response.start" and message["status"] == 200:
                self.guesses.pop(address, None)
            await send(message)

        await self.app(scope, receive, send_and_see)


def is_logged_in(scope: Scope) -> bool:
    """True if a request has the cookie that gradio gives to a visitor who knows the password."""
    from starlette.requests import HTTPConnection

    gradio_app, cookies = scope["app"], HTTPConnection(scope).cookies
    names = ("access-token", "access-token-unsecure")
    return any(cookies.get(f"{name}-{gradio_app.cookie_id}") in gradio_app.tokens for name in names)


async def answer(send: Send, status: int, text: str) -> None:
    """Send a short text as the response."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})
