"""page.py and web.py: the actions of a Page, its server, and its behaviour in a real browser."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from standing import HANG_SECONDS, wait_until

import chat
from minisft.chat import guards, transcript, web
from minisft.chat.markup import JOINER, escape
from minisft.chat.page import Page, Session
from minisft.chat.transcript import Transcript
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.generation.generate import Sampling

# The page and the browser cost much, so one worker gets all tests.
pytestmark = pytest.mark.xdist_group("web")

CHROMIUM = Path("/usr/bin/chromium")
GREEDY = Sampling(max_new_tokens=20, greedy=True)
VALUES = (20, 1.0, 0, 1.0, 1.0, True, None)  # the same, as the page's controls have it
SYSTEM = "简洁 be brief"
NASTY = """<script>window.hit = 1</script> <b>bold?</b> <img src=x onerror="window.hit = 2">
![far](http://FAR/x.png) [link](javascript:window.hit=3) <iframe src="http://FAR">

```html
<script>window.hit = 4</script>
```

$$\\frac{a}{b} \\href{javascript:window.hit=8}{c} \\includegraphics{http://FAR/z.png}$$

```mermaid
graph TD; A["<img src=x onerror='window.hit = 9'>"] --> B; click B href "javascript:window.hit=10"
```
"""


def user(text):
    return {"role": "user", "content": text}


def load(model_dir, **more):
    assistant = Assistant(model_dir, device="cpu", dtype="float32", **more)
    assistant.caches.limit = 8
    return assistant


@pytest.fixture
def page(tiny_chat_model_dir):
    return Page([load(tiny_chat_model_dir)], GREEDY)


@pytest.fixture
def alone(tiny_chat_model_dir):
    """A function: messages -> the answer of an Assistant without other users."""
    assistant = load(tiny_chat_model_dir)
    return lambda *messages: "".join(assistant.stream(list(messages), GREEDY))


def last(views):
    """The last view: the answer is complete or refused."""
    *_, view = views
    return view


def dictate(assistant, tokens):
    """Make the model answer these tokens to any question."""
    tokens = iter(tokens)

    def logits(hidden):
        chosen = torch.full(hidden.shape[:1], next(tokens))
        return torch.nn.functional.one_hot(chosen, 300).float()

    assistant.model.logits = logits


def endless(assistant, released=None):
    """Make the model answer forever; after some tokens it waits for the Event `released`."""

    def tokens():
        for number, token in enumerate(itertools.cycle(assistant.tokenizer.encode("on and "))):
            if number == 40 and released:
                assert released.wait(HANG_SECONDS)
            yield token

    dictate(assistant, tokens())


def test_turns_with_history_retry_edit_and_clear(page, alone):
    talk = Session()
    views = list(page.ask(talk, "the cat <b>", SYSTEM, *VALUES))
    system, first = {"role": "system", "content": SYSTEM}, user("the cat <b>")
    answer = {"role": "assistant", "content": alone(system, first)}
    chat = [user(escape("the cat <b>")), {**answer, "content": escape(answer["content"])}]
    assert views[0] == ([[chat[0], {"role": "assistant", "content": "…"}]], "", "")
    assert views[-1][0] == [chat] and views[-1][2] is None
    assert "20 tokens, the first after" in views[-1][1] and "truncated at" in views[-1][1]
    second = alone(system, first, answer, user("你好"))
    (chat,), said, _ = last(page.ask(talk, "你好", SYSTEM, *VALUES))
    assert [turn.answers for turn in talk.turns] == [[answer["content"]], [second]]
    known = int(said.split(" of ")[0].split()[-1])
    assert known > 30  # of the first turn, which is not computed again
    assert last(page.retry(talk, SYSTEM, *VALUES))[0] == [chat]
    edited = last(page.edit(talk, 0, "the mat", "", *VALUES))[0][0]
    assert edited == [
        user("the mat"),
        {"role": "assistant", "content": escape(alone(user("the mat")))},
    ]
    rows = json.loads(page.export(talk))
    assert rows == [
        {
            "model": page.assistants[0].name,
            "messages": [
                user("the mat"),
                {"role": "assistant", "content": talk.turns[0].answers[0]},
            ],
        }
    ]
    assert page.clear(talk) == ([[]], "", None) and talk.turns == [] and page.export(talk) == ""
    assert "no answer yet" in last(page.retry(talk, "", *VALUES))[1]


@pytest.mark.parametrize(
    "question, values, said",
    [
        ("x" * 500, VALUES, "tokens with its template, the limit is 280 tokens (of 300"),
        ("x" * 10_000_000, VALUES, "10,000,000 characters, the limit is 280 tokens (of 300"),
        ("  \n", VALUES, "the message is empty"),
        ("a\x1b[2J", VALUES, "the control character U+001B (character 2)"),
        ("ok", (20, -1.0, *VALUES[2:]), "--temperature must be"),
        ("ok", (*VALUES[:-1], "x7"), "the seed must be a whole number or empty, not 'x7'"),
        ("ok", (None, *VALUES[1:]), "a setting under the question box is not a number"),
        ("ok", (20, "warm", *VALUES[2:]), "a setting under the question box is not a number"),
    ],
    ids=["long", "huge", "empty", "control character", "temperature", "seed", "null", "no number"],
)
def test_a_refused_question_returns_to_the_box_and_nothing_is_lost(
    tiny_chat_model_dir, question, values, said
):
    page, talk = Page([load(tiny_chat_model_dir, max_length=300)], GREEDY), Session()
    before = last(page.ask(talk, "the cat", "", *VALUES))[0]
    chats, notice, box = last(page.ask(talk, question, "", *values))
    assert (chats, box) == (before, question) and said in notice
    chats, notice, box = last(page.edit(talk, 0, question, "", *values))
    assert (chats, box) == (before, None) and said in notice
    assert len(last(page.ask(talk, "the mat", "", *VALUES))[0][0]) == 4


def test_a_failing_model_shows_a_message_and_the_page_lives_on(page, capsys):
    talk, assistant = Session(), page.assistants[0]
    before, logits = last(page.ask(talk, "the cat", "", *VALUES))[0], assistant.model.logits

    def fail(hidden):
        raise RuntimeError("out of <memory>")

    assistant.model.logits = fail
    chats, notice, box = last(page.ask(talk, "the mat", "", *VALUES))
    assert (chats, box) == (before, "the mat")
    assert f"**The model failed: out of <{JOINER}memory>**" in notice
    assert "RuntimeError: out of <memory>" in capsys.readouterr().err
    assistant.model.logits = logits
    assert last(page.ask(talk, box, "", *VALUES))[0][0][:2] == before[0]


def test_stop_keeps_the_text_so_far_and_only_one_answer_runs(page, monkeypatch):
    monkeypatch.setattr("minisft.chat.page.SECONDS_BETWEEN_VIEWS", -1)  # a view for every token
    talk = Session()
    endless(page.assistants[0])
    views = page.ask(talk, "go", "", 15_000, *VALUES[1:])
    while len(next(views)[0][0][1]["content"]) < 8:
        pass
    chats, notice, box = last(page.ask(talk, "more", "", *VALUES))
    assert "Stop it first" in notice and box == "more" and len(chats[0]) == 2
    page.stop(talk)
    chats, notice, _ = last(views)
    assert "Stopped" in notice and chats[0][1]["content"].startswith("on and ")
    assert talk.turns[0].answers[0].startswith("on and ")
    views = page.ask(talk, "go", "", *VALUES)
    next(views), views.close()  # a visitor who leaves
    assert not talk.answering and len(talk.turns) == 1
    views = page.ask(talk, "go", "", 15_000, *VALUES[1:])
    next(views), next(views), page.clear(talk)
    assert last(views)[0] == [[]] and talk.turns == []


def test_a_stop_reaches_a_question_that_waits_in_the_queue(page):
    talk, sent_at = Session(), time.monotonic()
    last(page.ask(talk, "the cat", "", *VALUES))
    page.stop(talk)
    for waiting in (
        page.ask(talk, "the mat", "", *VALUES, sent_at=sent_at),
        page.retry(talk, "", *VALUES, sent_at=sent_at),
        page.edit(talk, 0, "the mat", "", *VALUES, sent_at=sent_at),
    ):
        chats, notice, box = last(waiting)
        assert notice == "Stopped." and len(chats[0]) == 2 and box in ("the mat", None)
    assert [turn.question for turn in talk.turns] == ["the cat"] and not talk.answering
    assert len(last(page.ask(talk, "the mat", "", *VALUES))[0][0]) == 4  # sent after the stop


def test_half_a_surrogate_pair_becomes_a_question_mark(page):
    talk = Session()
    (chat,), *_ = last(page.ask(talk, "the \ud83d cat", "\ud83d", *VALUES))
    assert chat[0]["content"] == "the ? cat" and talk.system == "?"
    (chat,), *_ = last(page.edit(talk, 0, "the \ud83d mat", "", *VALUES))
    assert chat[0]["content"] == "the ? mat"
    *_, notice, box = last(page.ask(talk, "\ud83d\x1b", "", *VALUES[:-1], "\ud83d"))
    assert "not '?'" in notice and box == "?\x1b"
    page.export(talk).encode()


def test_two_models_side_by_side_each_with_its_own_history(
    tiny_chat_model_dir, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr(transcript, "SECONDS_BETWEEN_PARTS", 1000)
    page = Page(
        [load(tiny_chat_model_dir), load(tiny_chat_model_dir, template="plain")],
        GREEDY,
        transcript=Transcript(tmp_path / "log"),
    )
    talk = Session()
    for question in ("the cat", "the mat"):
        chats, notice, _ = last(page.ask(talk, question, "", *VALUES))
    first, second = ([turn.answers[place] for turn in talk.turns] for place in (0, 1))
    assert first[1] == alone(
        user("the cat"), {"role": "assistant", "content": first[0]}, user("the mat")
    )
    assert first != second and notice.count("tokens/s") == 2 and len(chats) == 2
    assert [row["messages"][-1]["content"] for row in json.loads(page.export(talk))] == [
        first[1],
        second[1],
    ]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["content"] for line in lines if line["role"] == "user"] == ["the cat", "the mat"]
    answers = {line["content"] for line in lines if line["role"] == "assistant"}
    assert answers == {*first, *second} and {line["conversation"] for line in lines} == {1}


def test_a_question_that_one_model_left_unanswered_is_not_sent_to_it_again(
    tiny_chat_model_dir, alone
):
    page, talk = Page([load(tiny_chat_model_dir), load(tiny_chat_model_dir)], GREEDY), Session()
    silent = page.assistants[1]
    stop_ids, silent.stop_ids = silent.stop_ids, set(range(300))
    last(page.ask(talk, "the cat", "", *VALUES))
    silent.stop_ids = stop_ids
    last(page.ask(talk, "the mat", "", *VALUES))
    assert talk.turns[0].answers == [alone(user("the cat")), ""]
    assert talk.turns[1].answers[1] == alone(user("the mat"))
    spoken, unspoken = json.loads(page.export(talk))
    assert [len(row["messages"]) for row in (spoken, unspoken)] == [4, 2]


def test_a_seed_repeats_and_none_does_not(page):
    talk, drawn = Session(), (12, 2.0, 0, 1.0, 1.0, False)
    answers = [
        last(page.edit(talk, 0, "the cat", "", *drawn, seed))[0]
        for seed in ("7", " 7 ", "8", "", None, "")
    ]
    assert answers[0] == answers[1]
    assert all(
        one != other for place, one in enumerate(answers[1:]) for other in answers[:place] if place
    )


def test_markup_is_shown_and_all_else_is_left_alone():
    marked = f"a <{JOINER}b> &{JOINER}amp; !{JOINER}[x](y) <{JOINER}/b> <{JOINER}!-- <{JOINER}?"
    assert escape(marked.replace(JOINER, "")) == marked
    assert escape(plain := "a < b && c<1; AT&T a&b. <- =<3 wow! [x](y)") == plain
    for code in (
        "```html\n<b> & ![x]\n```",
        "~~~\n<b>",
        "`<b>`",
        "`` a`<b> ``",
        "> ```\n> <b>\n> ```",
        "````\n```\n<b>\n````",
        "- ```c\n  <b>\n  ```",
        "10) - ~~~\n      <b>",
    ):
        assert escape(f"<i>\n{code}") == f"<{JOINER}i>\n{code}"
    assert escape("```\n<b>\n```\n<i>") == f"```\n<b>\n```\n<{JOINER}i>"
    assert escape("`<b>\n`") == f"`<{JOINER}b>\n`"  # no code span across a line's end
    assert escape("```a`b <i>") == f"```a`b <{JOINER}i>"  # no fence has a backtick behind it


def test_an_edited_question_is_what_was_typed(page, alone):
    """The field for it holds what the page shows."""
    talk = Session()
    question = "List<int> & &lt; ![x](y) a < b"
    (chat,), *_ = last(page.ask(talk, question, "", *VALUES))
    assert chat[0]["content"] != question
    last(page.edit(talk, 0, chat[0]["content"] + "?", "", *VALUES))
    assert talk.turns[0].question == question + "?"
    assert talk.turns[0].answers == [alone(user(question + "?"))]


def test_a_visitor_who_comes_back_finds_the_conversation(page, monkeypatch):
    monkeypatch.setattr("minisft.chat.page.MAX_SESSIONS", 2)
    ann, bob = page.load_session("ann"), page.load_session("bob")
    assert ann is page.load_session("ann") is not bob
    page.load_session("cy")
    assert page.load_session("ann") is ann and page.load_session("bob") is not bob
    before = page.ask(ann, "the cat", "", *VALUES)
    next(before), next(before)  # the rest of it is not requested
    assert not page.load_session("ann").answering
    chats, *_ = last(page.ask(ann, "the mat", "", *VALUES))
    assert len(chats[0]) == 4 and "Stopped" in last(before)[1]
    assert page.view(ann, "")[0][0][2:] == chats[0][2:]


def test_an_answer_from_before_a_reload_does_not_let_a_third_question_in(page):
    ann = page.load_session("ann")
    before = page.ask(ann, "the cat", "", *VALUES)
    next(before), next(before)
    page.load_session("ann")
    now = page.ask(ann, "the mat", "", *VALUES)
    next(now), last(before)
    assert "Stop it first" in last(page.ask(ann, "the hat", "", *VALUES))[1]
    assert last(now)[0][0][-2]["content"] == "the mat" and not ann.answering


# Served


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(tiny_chat_model_dir):
    """(a Page, its address), served by gradio in this process."""
    page = Page([load(tiny_chat_model_dir)], Sampling(max_new_tokens=400, greedy=True))
    port = free_port()
    blocks = web.launch(page, "127.0.0.1", port)
    yield page, f"http://127.0.0.1:{port}/"
    blocks.close(verbose=False)


def request(address, path, body=None, **headers):
    """(status, headers, text) of a request: a GET, or a POST of a body."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=HANG_SECONDS)
    with contextlib.closing(connection):
        connection.request(
            "GET" if body is None else "POST",
            f"/{path}",
            body,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def ask_over_http(address, question, session, **headers):
    """The texts of the chats after a question, asked over HTTP without a browser."""
    body = json.dumps({"data": [question, "", *VALUES], "session_hash": session})
    *_, text = request(
        address, "gradio_api/call/ask", body, Content_Type="application/json", **headers
    )
    *_, text = request(address, f"gradio_api/call/ask/{json.loads(text)['event_id']}", **headers)
    views = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    return [
        [message["content"][0]["text"] for message in chat]
        for chat in views[-1]
        if isinstance(chat, list)
    ]


def ask_twice(address, number):
    """The texts of a new conversation of two turns."""
    session = str(uuid.uuid4())
    ask_over_http(address, f"the cat {number}", session)
    (chat,) = ask_over_http(address, "and?", session)
    return chat


def expected_of(alone, number):
    """The result of `ask_twice` without other users."""
    messages = [user(f"the cat {number}")]
    messages += [{"role": "assistant", "content": alone(*messages)}, user("and?")]
    messages += [{"role": "assistant", "content": alone(*messages)}]
    return [escape(message["content"]) for message in messages]


def test_eight_clients_at_once_each_get_their_answers(served, alone):
    _, address = served
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask_twice, [address] * 8, range(8)))
    assert answers == [expected_of(alone, number) for number in range(8)]


def test_one_thread_computes_all_answers(served, monkeypatch):
    """Threads of their own would take OpenMP's helpers from each other; see model_thread.py."""
    page, address = served
    model, threads = page.assistants[0].model, set()

    def logits(hidden, logits=model.logits):
        threads.add(threading.get_ident())
        return logits(hidden)

    monkeypatch.setattr(model, "logits", logits)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask_twice, [address] * 3, range(3)))
    assert threads == {page.thread.run(threading.get_ident)}


def test_the_thread_that_answers_has_loaded_the_model(tiny_chat_model_dir, monkeypatch):
    threads = []

    def load_noticed(options):
        threads.append(threading.get_ident())
        return [load(tiny_chat_model_dir)]

    monkeypatch.setattr(chat, "load_assistants", load_noticed)
    served = []
    monkeypatch.setattr(web, "serve", lambda page, *more: served.append(page))
    chat.main(chat.parse_options(["--model_name_or_path", str(tiny_chat_model_dir), "--web"]))
    assert threads == [served[0].thread.run(threading.get_ident)]


def test_the_stop_button_reaches_a_question_in_the_queue(served):
    """Nine questions: eight are answered, and the ninth waits until the first is stopped."""
    page, address = served
    assistant, logits = page.assistants[0], page.assistants[0].model.logits
    released, events = threading.Event(), []
    endless(assistant, released)

    def send(number):
        body = json.dumps({"data": ["go", "", *VALUES], "session_hash": f"waiting {number}"})
        *_, text = request(address, "gradio_api/call/ask", body, Content_Type="application/json")
        events.append(json.loads(text)["event_id"])

    def result(number):
        *_, text = request(address, f"gradio_api/call/ask/{events[number]}")
        return text.rpartition("data: ")[2]

    try:
        for number in range(web.MAX_ANSWERS + 1):
            send(number)
        body = json.dumps({"data": [None], "session_hash": f"waiting {web.MAX_ANSWERS}"})
        request(address, "gradio_api/run/stop", body, Content_Type="application/json")
        released.set()
        *answered, stopped = map(result, range(web.MAX_ANSWERS + 1))
        assert "Stopped." in stopped and not any("Stopped." in text for text in answered)
    finally:
        released.set()
        assistant.model.logits = logits


def test_malformed_calls_are_one_line_in_the_log_each(served, capfd):
    _, address = served
    named = json.loads(request(address, "gradio_api/info")[2])["named_endpoints"]
    (edit,) = (name.strip("/") for name in named if "edit" in name)
    values = ["the cat", "", *VALUES]
    calls = [
        ("ask", {"data": []}),
        ("ask", {"data": ["a"] * 30}),
        ("ask", {"data": [*values[:2], "many", *values[3:]]}),
        ("ask", {"data": [*values[:2], -5, *values[3:]]}),
        ("ask", {"data": [*values[:2], [1], *values[3:]]}),
        ("ask", {"data": [{"a": 1}, *values[1:]]}),
        (edit, {"data": values[1:]}),
        (edit, {"data": values[1:], "event_data": {"index": "x", "value": 3}}),
        (edit, {"data": values[1:], "event_data": {"index": [[1]]}}),
        ("v2/nowhere", {"data": values}),
        ("v2/ask", {"nothing": values}),
    ]
    for number, (name, body) in enumerate(calls):
        body = json.dumps({**body, "session_hash": f"malformed {number}\ud83d"})
        status, _, text = request(
            address, f"gradio_api/call/{name}", body, Content_Type="application/json"
        )
        if status == 200:
            request(address, f"gradio_api/call/{name}/{json.loads(text)['event_id']}")
    # By number, because it is not for other programs.
    loading = {"fn_index": number_of(address, "load_session"), "data": ["x" * 101]}
    status, *_ = request(
        address, "gradio_api/run/any", json.dumps(loading), Content_Type="application/json"
    )
    assert status == 500
    said = capfd.readouterr().err
    assert "Traceback" not in said and len(said.splitlines()) <= len(calls) + 1
    session = "surrogate"
    (chat,) = ask_over_http(address, "the \ud83d cat", session)
    assert chat[0] == "the ? cat"
    (chat,) = ask_over_http(address, "and?", session)
    assert len(chat) == 4


def number_of(address, name):
    """gradio's number of an event."""
    dependencies = json.loads(request(address, "config")[2])["dependencies"]
    (number,) = (one["id"] for one in dependencies if one["api_name"] == name)
    return number


def test_no_call_skips_the_queue(served):
    _, address = served
    body = json.dumps({"data": [None, "the cat", "", *VALUES]})
    for path in ("run/ask", "api/ask", "run/retry"):
        status, *_ = request(address, f"gradio_api/{path}", body, Content_Type="application/json")
        assert status == 404


def test_no_more_compiled_answers_are_written_at_once_than_are_kept(page):
    """Each answer takes the memory of a full context; later visitors wait in the queue."""
    at_once = lambda: {  # noqa: E731
        one.api_name: one.concurrency_limit for one in web.build(page).fns.values()
    }["ask"]
    assert at_once() == web.MAX_ANSWERS == 8
    page.assistants[0].decoder, page.assistants[0].caches.limit = "compiled", 2
    assert at_once() == 2


def test_every_response_carries_the_policy(served):
    _, address = served
    for path in ("", "config", "theme.css", "nowhere"):
        _, headers, text = request(address, path)
        page = text.encode() if headers["content-type"].startswith("text/html") else b""
        assert headers["content-security-policy"] == guards.policy(page)
        assert guards.policy(page).count("sha256") == (5 if path == "" else 0)


def test_an_address_that_cannot_be_opened_is_reported(served):
    page, address = served
    port = int(address.split(":")[2].strip("/"))
    with pytest.raises(UserError, match=f"--server_port {port} cannot be .* the port is in use"):
        web.launch(page, "127.0.0.1", port)
    with pytest.raises(UserError, match="on 192.0.2.1: .* the address is not this machine's"):
        web.launch(page, "192.0.2.1", free_port())


def test_requests_that_no_visitor_sends_are_refused(served, monkeypatch):
    """Requests of a site whose name points to this machine, too large, or of unknown size."""
    _, address = served
    assert request(address, "config", Host="localhost:1")[0] == 200
    assert request(address, "config", Host="far.example:7860")[0] == 400
    monkeypatch.setattr(guards, "MAX_REQUEST_BYTES", 1000)
    for body, status in ((b"x" * 1000, 422), (b"x" * 1001, 413), (iter([b"x"]), 413)):
        got, headers, _ = request(address, "gradio_api/call/ask", body)
        assert got == status and headers["content-security-policy"] == guards.policy()
    for path in ("/etc/passwd", "../../etc/passwd", "README.md"):
        assert request(address, f"gradio_api/file={path}")[0] == 403


def test_a_visitor_cannot_name_another_address(served, monkeypatch):
    """Each address has its own delay after wrong passwords."""
    seen, call = [], guards.Arrivals.__call__

    async def note(guard, scope, receive, send):
        seen.append(scope["client"][0])
        await call(guard, scope, receive, send)

    monkeypatch.setattr(guards.Arrivals, "__call__", note)
    request(served[1], "config", X_Forwarded_For="192.0.2.7")
    assert seen == ["127.0.0.1"]


def test_the_controls_accept_every_value_of_the_command_line(tiny_chat_model_dir):
    """A slider with a value outside its range would refuse every question."""
    import gradio

    for sampling, told in (
        (Sampling(512), [100, 0.95, 50, 0.7, 1.0]),  # more than the context
        (Sampling(20, 3.5, 5000, 0.001, 4.0), [20, 3.5, 5000, 0.001, 4.0]),
        (Sampling(1, 0.0, 0, 1.0, 0.1), [1, 0, 0, 1, 0.1]),
    ):
        page = Page([load(tiny_chat_model_dir, max_length=100)], sampling)
        sliders = [
            block for block in web.build(page).blocks.values() if isinstance(block, gradio.Slider)
        ]
        assert [one.preprocess(one.value) for one in sliders] == told


def test_missing_gradio_is_reported(monkeypatch):
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements/web.txt"):
        web.check_gradio()


def start_page(script, model_dir, port, *more, **environment):
    """A process that serves the page."""
    words = ["--model_name_or_path", model_dir, "--web", "--server_port", str(port), *more]
    return subprocess.Popen(
        [sys.executable, script, *words, "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_command_serves_locally_with_a_password_and_ends_by_sigterm(tiny_chat_model_dir):
    port = free_port()
    more = ["--compare_with", "none"]
    process = start_page(
        ROOT / "chat.py", tiny_chat_model_dir, port, *more, MINISFT_PASSWORD="geheim"
    )
    try:
        line = process.stderr.readline()
        address = f"http://127.0.0.1:{port}/"
        assert line.startswith(address)
        assert request(address, "config")[0] == 401
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        # A wrong password: half of a surrogate pair, which is not text.
        part = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
        body = part.format("username", "ann") + part.format("password", "+2AA-") + "--x--\r\n"
        parts = {"Content_Type": "multipart/form-data; boundary=x; charset=utf-7"}
        assert request(address, "login", body, **parts)[0] == 400
        assert request(address, "gradio_api/heartbeat/ann")[0] == 401
        for path in ("cancel", "reset", "call/ask"):
            body = '{"session_hash": "ann", "fn_index": 0, "event_id": "x"}'
            json_form = {"Content_Type": "application/json"}
            assert request(address, f"gradio_api/{path}", body, **json_form)[0] == 401
        status, headers, _ = request(address, "login", "username=ann&password=geheim", **form)
        cookie = "; ".join(one.split(";")[0] for one in headers.get_all("set-cookie"))
        left, right = ask_over_http(address, "the cat", "ann", Cookie=cookie)
        assert status == 200 and left == right and len(left) == 2
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
        ]
        assert listening == [f"0100007F:{port:04X}"]  # 127.0.0.1 only
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0 and "Traceback" not in said


# In a browser


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM} to test in")
    from playwright.sync_api import sync_playwright

    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=flags, timeout=1000 * HANG_SECONDS
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, served):
    """A function that opens the page as another visitor and forbids requests to other machines."""
    contexts, hosts = [], set()

    def visit():
        contexts.append(browser.new_context(accept_downloads=True))
        contexts[-1].set_default_timeout(1000 * HANG_SECONDS)
        tab = contexts[-1].new_page()
        tab.on(
            "requestfinished",
            lambda request: (
                hosts.add(request.url.split("/")[2]) if request.url.startswith("http") else None
            ),
        )
        tab.add_init_script("""
            window.refused = [];
            document.addEventListener("securitypolicyviolation",
                                      event => window.refused.push(event.effectiveDirective));
        """)
        open_page(tab, served[1])
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert hosts == {served[1].split("/")[2]}


def open_page(tab, address):
    """Load the page. Its box opens once the session is loaded."""
    tab.goto(address)
    tab.locator("#box textarea:enabled").wait_for()


def say(tab, question):
    tab.locator("#box textarea").fill(question)
    tab.locator("#box textarea").press("Enter")


def wait_for_answer(tab, text):
    """The text in the conversation, then the figures that an answer ends with."""
    wait_for(tab, text, "#chat0")
    wait_for(tab, "prompt tokens were cached")


def wait_for(tab, text, within="#notice"):
    tab.wait_for_function(
        "([place, text]) => document.querySelector(place)?.innerText.includes(text)",
        arg=[within, text],
        timeout=1000 * HANG_SECONDS,
    )


STUCK = """
import sys, threading
sys.path.insert(0, {root!r})
import chat
from minisft.common.outputs import temporary_folder
from minisft.model.decoder import CausalLM

temporary_folder()

def stuck(model, hidden):
    print("stuck", file=sys.stderr, flush=True)
    threading.Event().wait()

CausalLM.logits = stuck
chat.run_script(chat.main)
"""


def test_browser_ctrl_c_ends_even_an_answer_that_never_returns(
    browser, tiny_chat_model_dir, tmp_path
):
    """Within END_SECONDS, with a browser that waits for the answer.

    No clock is read, since a busy machine may stop all processes for long. The answer and the
    connection never end, so only the limit of the wait for them can end the process.
    """
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(root=str(ROOT)))
    process = start_page(script, tiny_chat_model_dir, free_port(), TMPDIR=str(tmp_path))
    context = browser.new_context()
    try:
        tab = context.new_page()
        tab.set_default_timeout(1000 * HANG_SECONDS)
        open_page(tab, process.stderr.readline().split()[0])
        say(tab, "the cat")
        assert process.stderr.readline() == "stuck\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0 and said == ""
        assert web.END_SECONDS <= 1 and not list(tmp_path.glob("minisft-*"))
    finally:
        process.kill()
        context.close()


def test_browser_the_box_opens_once_the_session_is_loaded(served, visit, monkeypatch):
    """A question before would be stopped with the answer that a reload stops, or be forgotten."""
    (page, _), tab, loaded = served, visit(), threading.Event()
    load, asked = page.load_session, []

    def load_later(visitor):
        asked.append(visitor)
        assert loaded.wait(HANG_SECONDS)
        return load(visitor)

    monkeypatch.setattr(page, "load_session", load_later)
    try:
        tab.reload()
        wait_until(lambda: asked)
        assert tab.locator("#box textarea").is_disabled()
    finally:
        loaded.set()
    tab.locator("#box textarea:focus").wait_for()
    tab.keyboard.type("the cat")
    tab.keyboard.press("Enter")
    wait_for_answer(tab, "the cat")


def test_browser_a_visitor_logs_in(browser, tiny_chat_model_dir):
    page, port = Page([load(tiny_chat_model_dir)], GREEDY), free_port()
    blocks, context = web.launch(page, "127.0.0.1", port, "geheim"), browser.new_context()
    try:
        tab = context.new_page()
        tab.set_default_timeout(1000 * HANG_SECONDS)
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.get_by_label("username").fill("ann")
        assert not tab.locator("#box").count()  # nothing of the page is there yet
        tab.get_by_label("password").fill("geheim")
        tab.get_by_role("button", name="Login").click()
        tab.locator("#box textarea:enabled").wait_for()
        say(tab, "the cat")
        wait_for_answer(tab, "the cat")
    finally:
        context.close()
        blocks.close(verbose=False)


def test_browser_two_turns_stop_and_download(served, visit, monkeypatch):
    monkeypatch.setattr("minisft.chat.page.SECONDS_BETWEEN_VIEWS", -1)  # a view for every token
    page, tab = served[0], visit()
    assistant, logits = page.assistants[0], page.assistants[0].model.logits
    encode, first, second = assistant.tokenizer.encode, threading.Event(), threading.Event()
    try:
        tab.locator("#download").click()
        wait_for(tab, "There is nothing to download yet.")
        dictate(assistant, [*encode("鲁迅原名周树人。"), 1])
        say(tab, "鲁迅是谁？")
        wait_for_answer(tab, "鲁迅原名周树人。")
        endless(assistant, first)
        say(tab, "and then?")
        wait_for(tab, "on and on and on", "#chat0")
        assert tab.locator("#box textarea").input_value() == ""
        (talk,) = (
            talk
            for talk in page.sessions.values()
            if [turn.question for turn in talk.turns] == ["鲁迅是谁？", "and then?"]
        )
        tab.locator("#stop").click()
        wait_until(lambda: talk.stopped_at > 0)
        first.set()
        wait_for(tab, "Stopped.")
        with tab.expect_download() as download:
            tab.locator("#download").click()
        (row,) = json.loads(Path(download.value.path()).read_text("utf-8"))
        assert [one["role"] for one in row["messages"]] == ["user", "assistant"] * 2
        assert row["messages"][1]["content"] == "鲁迅原名周树人。"
        answer = row["messages"][3]["content"]  # no longer than the text at the time of the stop
        assert answer == ("on and " * 20)[: len(answer)] and len(encode(answer)) <= 41
        dictate(assistant, [*encode("again"), 1])
        tab.locator("#retry").click()
        wait_for_answer(tab, "again")
        assert "on and on" not in tab.locator("#chat0").inner_text()
        tab.locator("#chat0 button[aria-label='Edit']").first.click()
        tab.locator("#chat0 textarea").fill("Who was it?")
        dictate(assistant, [*encode("nobody"), 1])
        tab.locator("#chat0 button[aria-label='Submit']").click()
        wait_for_answer(tab, "nobody")
        assert "again" not in tab.locator("#chat0").inner_text()
        assert "Who was it?" in tab.locator("#chat0").inner_text()
        dictate(assistant, [*encode("鲁迅"), 1])
        say(tab, "and?")
        wait_for_answer(tab, "鲁迅")
        tab.get_by_text("System prompt and sampling").click()
        assert tab.locator("#seed input, #seed textarea").input_value() == ""
        tab.locator("#box textarea").fill("x" * 30_000)
        tab.locator("#box textarea").press("Enter")
        wait_for(tab, "the limit is 19600 tokens (of 20000")
        assert len(tab.locator("#box textarea").input_value()) == 30_000
        endless(assistant, second)
        say(tab, "more")
        wait_for(tab, "on and on", "#chat0")
        tab.reload()
        wait_for(tab, "on and on", "#chat0")  # so the server knows that the tab is back
        second.set()
        wait_until(lambda: not assistant.turns._waiting)
        dictate(assistant, [*encode("周树人"), 1])
        say(tab, "who?")
        wait_for(tab, "周树人", "#chat0")
        tab.locator("#clear").click()
        tab.wait_for_function("() => !document.querySelector('#chat0').innerText.includes('鲁迅')")
    finally:
        first.set()
        second.set()
        assistant.model.logits = logits


@pytest.fixture
def far():
    """A listening socket of a server that is not the page's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def connections(server):
    """The connections to a listening socket so far."""
    made = []
    with socket.create_connection(server.getsockname()) as last:
        while True:
            connection, address = server.accept()
            if address == last.getsockname():
                connection.close()
                return made
            made.append(connection)


def asked(connection):
    """The bytes received on a connection so far."""
    connection.setblocking(False)
    with connection, contextlib.suppress(BlockingIOError):
        return connection.recv(1000)


def test_browser_nothing_in_an_answer_runs_or_loads(served, visit, far):
    page, tab, name = served[0], visit(), f"127.0.0.1:{far.getsockname()[1]}"
    assistant, logits = page.assistants[0], page.assistants[0].model.logits
    try:
        dictate(assistant, [*assistant.tokenizer.encode(NASTY.replace("FAR", name)), 1])
        tab.locator("#box textarea").fill("<script>window.hit = 5</script>")
        tab.locator("#box textarea").press("Enter")
        wait_for_answer(tab, "window.hit = 4")
        said = tab.locator("#chat0").inner_text().replace(JOINER, "")
        # All of it can be read as text, even parts that a page would not show.
        for text in (
            "<script>window.hit = 1</script>",
            "<b>bold?</b>",
            "<iframe src=",
            "onerror",
            "<script>window.hit = 5</script>",
        ):
            assert text in said
        tab.get_by_text("link", exact=True).click()
        assert tab.evaluate("() => window.hit") is None
        assert tab.evaluate("() => window.refused") == []  # gradio's own scripts run
        assert tab.locator("#chat0 .message :is(script, iframe, img[src^='http'])").count() == 0
        assert connections(far) == []
        # No script that comes after the page runs, however it gets there.
        tab.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.hit = 6";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hit = 7'>");
        }""")
        wait_until(lambda: tab.evaluate("() => window.refused.length == 2"))
        assert tab.evaluate("() => window.hit") is None
        # The policy alone is enough: elements that a script adds to the page load nothing.
        tab.evaluate(
            """name => {
            window.refused = [];
            document.body.insertAdjacentHTML("beforeend",
                `<img src="http://${name}/y.png"><iframe src="http://${name}/"></iframe>`);
        }""",
            name,
        )
        tab.wait_for_function("() => window.refused.length >= 2")
        assert sorted(tab.evaluate("() => window.refused")) == ["frame-src", "img-src"]
        # Chromium may connect to the target of a frame before the policy applies, but requests
        # nothing.
        assert not any(map(asked, connections(far)))
    finally:
        assistant.model.logits = logits


def test_browser_three_visitors_at_once(visit, alone):
    """A page that is loaded again shows the conversation."""
    tabs = [visit() for _ in range(3)]
    for number, tab in enumerate(tabs):
        tab.locator("#box textarea").fill(f"the cat {number}")
    for tab in tabs:  # all typed, then all sent
        tab.locator("#box textarea").press("Enter")
    for tab in tabs:
        wait_for(tab, "prompt tokens were cached")
    for number, tab in enumerate(tabs):
        expected = letters_of(alone(user(f"the cat {number}")))
        assert expected and expected in letters_of(tab.locator("#chat0").inner_text())
    tabs[0].reload()
    wait_for(tabs[0], "the cat 0", "#chat0")
    said = letters_of(tabs[0].locator("#chat0").inner_text())
    assert letters_of(alone(user("the cat 0"))) in said
    say(tabs[0], "and?")
    wait_for(tabs[0], "prompt tokens were cached")
    assert "the cat 0" in tabs[0].locator("#chat0").inner_text()


def letters_of(text):
    """The characters that Markdown and line ends do not change."""
    return "".join(one for one in text if one.isalnum() and one.isascii())


def test_browser_copies_and_edits_messages(served, visit):
    """Neither contains the joiners of the page."""
    page, tab = served[0], visit()
    assistant, logits = page.assistants[0], page.assistants[0].model.logits
    said = "a < b && List<int> ![x](y)\n\n```c\nList<int>\n```"
    try:
        dictate(assistant, [*assistant.tokenizer.encode(said), 1])
        say(tab, "is <b> & &lt; ok?")
        wait_for(tab, "prompt tokens were cached")
        tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab.evaluate("() => navigator.clipboard.writeText('')")
        tab.locator("#chat0 button[aria-label='Copy message']").last.click()
        tab.wait_for_function("() => navigator.clipboard.readText()")
        assert tab.evaluate("() => navigator.clipboard.readText()") == said
        tab.locator("#chat0").click()
        tab.locator("#chat0 .user p, #chat0 .user").last.evaluate("""place => {
            getSelection().selectAllChildren(place);
            document.execCommand("copy");
        }""")
        copied = tab.evaluate("() => navigator.clipboard.readText()")
        assert copied.strip() == "is <b> & &lt; ok?"
        tab.locator("#chat0 button[aria-label='Edit']").first.click()
        field = tab.locator("#chat0 textarea")
        assert field.input_value().replace(JOINER, "") == "is <b> & &lt; ok?"
        dictate(assistant, [*assistant.tokenizer.encode("yes"), 1])
        field.press("End")
        field.press("!")
        tab.locator("#chat0 button[aria-label='Submit']").click()
        wait_for_answer(tab, "yes")
        assert "is <b> & &lt; ok?!" in tab.locator("#chat0").inner_text().replace(JOINER, "")
    finally:
        assistant.model.logits = logits
