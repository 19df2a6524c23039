"""guards.py: wrong passwords delay the next guess; what needs the password; hashes of scripts."""

import asyncio
import base64
import hashlib

import pytest

from minisft.chat import guards


class Server:
    """A page whose password is "right", behind Logins; `now` is its clock, which sleeping moves."""

    def __init__(self, monkeypatch):
        self.now, self.slept, self.cookie_id, self.tokens = 0.0, [], "x", {"known": "ann"}
        self.guard = guards.Logins(self.respond)
        monkeypatch.setattr(guards.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(guards.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds):
        self.slept.append(seconds)

    async def respond(self, scope, receive, send):
        await guards.answer(send, 200 if scope.get("password", "right") == "right" else 400, "")

    def post(self, path, address="ann's", cookie=b"", **scope):
        """(status, seconds that it was delayed) of a POST."""
        messages, self.slept = [], []

        async def send(message):
            messages.append(message)

        scope |= {"type": "http", "method": "POST", "path": path, "client": (address, 1)}
        scope |= {"app": self, "headers": [(b"cookie", cookie)]}
        asyncio.run(self.guard(scope, None, send))
        return messages[0]["status"], sum(self.slept)

    def guess(self, password, address="ann's"):
        return self.post("/login", address, password=password)


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch)


def test_each_wrong_password_doubles_the_delay_of_the_next_guess(server):
    assert [server.guess("wrong") for _ in range(2)] == [(400, 0), (400, 0.5)]
    server.now = 0.5
    assert server.guess("wrong") == (400, 1)
    server.now = 1.5
    assert server.guess("wrong") == (400, 2)
    assert server.guess("right", "bob's") == (200, 0)  # another address
    server.now = 3.5
    assert server.guess("right") == (200, 4)
    server.now = 7.5
    assert server.guess("wrong") == (400, 0)  # the right one ends the delays


def test_guesses_at_once_wait_for_each_other_and_too_many_are_refused(server):
    delays = [server.guess("wrong") for _ in range(12)]
    assert delays[:8] == [(400, 0.5 * (2**number - 1)) for number in range(7)] + [(429, 0)]
    assert set(delays[7:]) == {(429, 0)}
    server.now = 63.5
    assert server.guess("right") == (200, 0)
    server.guess("wrong")
    for _ in range(40):
        server.now += guards.LONGEST_DELAY
        assert server.guess("wrong")[0] == 400
    assert server.guess("wrong")[1] == guards.LONGEST_DELAY
    server.now += 3 * guards.LONGEST_DELAY + guards.FORGET_SECONDS
    assert server.guess("wrong") == (400, 0) and server.guess("wrong") == (400, 0.5)


def test_the_number_of_remembered_addresses_is_limited(server, monkeypatch):
    monkeypatch.setattr(guards, "MAX_ADDRESSES", 3)
    for number in range(5):
        server.guess("wrong", str(number))
    assert list(server.guard.guesses) == ["2", "3", "4"]


def test_a_post_needs_the_cookie_of_a_visitor_who_has_logged_in(server):
    for path in ("/gradio_api/cancel", "/gradio_api/reset/", "/gradio_api/queue/join"):
        assert server.post(path) == (401, 0)
        assert server.post(path, cookie=b"access-token-x=guessed") == (401, 0)
        assert server.post(path, cookie=b"access-token-unsecure-x=known") == (200, 0)


def test_the_policy_lists_the_inline_scripts_of_the_page():
    page = b'<script>a = 1</script><script type="module" src="b.js"></script><script\n x>c</script>'
    policy = guards.policy(page)
    for script, expected in ((b"a = 1", 1), (b"c", 1), (b"", 0)):
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        assert policy.count(f"'sha256-{digest}'") == expected
    assert "script-src 'self' 'unsafe-eval';" in guards.policy()
