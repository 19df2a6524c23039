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

    def request(self, path, address="ann's", cookie=b"", method="POST", **scope):
        """(status, seconds that it was delayed) of a request."""
        messages, self.slept = [], []

        async def send(message):
            messages.append(message)

        scope |= {"type": "http", "method": method, "path": path, "client": (address, 1)}
        scope |= {"app": self, "headers": [(b"cookie", cookie)]}
        asyncio.run(self.guard(scope, None, send))
        return messages[0]["status"], sum(self.slept)

    def guess(self, password, address="ann's"):
        return self.request("/login", address, password=password)


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


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/gradio_api/cancel"),
        ("POST", "/gradio_api/reset/"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/stream/login"),
        ("POST", "/elsewhere"),
        ("GET", "/gradio_api/heartbeat/ann"),
        ("HEAD", "/gradio_api/file=x"),
    ],
)
def test_the_api_needs_the_cookie_of_a_visitor_who_has_logged_in(server, method, path):
    ask = lambda cookie: server.request(path, method=method, cookie=cookie)  # noqa: E731
    assert ask(b"") == ask(b"access-token-x=guessed") == (401, 0)
    assert ask(b"access-token-unsecure-x=known") == (200, 0)
    assert server.request("/assets/index.js", method="GET") == (200, 0)
    assert server.guess("wrong") == (400, 0)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_request_that_gradio_cannot_handle_is_one_line_in_the_log(has_begun, capsys):
    messages = []

    async def fail(scope, receive, send):
        if has_begun:
            await send({"type": "http.response.start", "status": 200})
        raise KeyError("no\x1b[2Jwhere\nand more")

    async def send(message):
        messages.append(message)

    asyncio.run(guards.Failures(fail)({"path": "/a\n" + "b" * 1000}, None, send))
    said = capsys.readouterr().err
    assert said.startswith("refused a request for /ab") and len(said) < 500
    assert "nowhere" in said.replace("\\x1b[2J", "") and said.count("\n") == 1
    assert [message.get("status") for message in messages] == [200] if has_begun else [500, None]


def test_an_error_without_words_has_the_name_of_its_class(capsys):
    assert guards.log_refusal("a call", catch(ValueError())) == "ValueError"
    assert guards.log_refusal("a call", catch(ValueError("a\x00b\u202ec"))) == "abc"
    assert "test_guards.py, line " in capsys.readouterr().err


def catch(error):
    """The error with a traceback."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def test_the_policy_lists_the_inline_scripts_of_the_page():
    page = b'<script>a = 1</script><script type="module" src="b.js"></script><script\n x>c</script>'
    policy = guards.policy(page)
    for script, expected in ((b"a = 1", 1), (b"c", 1), (b"", 0)):
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        assert policy.count(f"'sha256-{digest}'") == expected
    assert "script-src 'self' 'unsafe-eval';" in guards.policy()
