"""A chat template is code from a stranger: it is sandboxed and limited, and fails in one line."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import render_forks
from standing import HANG_SECONDS, state_of, wait_until

from minisft.text import rendering
from minisft.text.rendering import Renderer, RenderProcess, TemplateError, TemplateTimeout
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

NOW = "2026-01-02T03:04:05"
HELLO = [{"role": "user", "content": "Hello"}]
GOOD = "{{ messages[0]['content'] }}"


@pytest.fixture(autouse=True)
def real_processes(monkeypatch):
    """Those that users have, not forked ones."""
    monkeypatch.setattr(rendering, "start_process", render_forks.REAL)


def render(renderer: Renderer, **variables) -> str:
    return renderer.render(HELLO, None, variables, NOW)[0]


def check_refused(template: str, match: str, line: int | None = None, **limits) -> None:
    """The template fails in one line, and fast; another template is not affected."""
    renderer = Renderer("\n" * ((line or 1) - 1) + template, **limits)
    with pytest.raises((TemplateError, TemplateTimeout), match=match) as raised:
        render(renderer)
    message = str(raised.value)
    assert "\n" not in message.strip() and len(message) < 500
    if line:
        assert f"line {line}:" in message
    with pytest.raises((TemplateError, TemplateTimeout)):  # again, in a new process if necessary
        render(renderer)
    assert renderer.render(HELLO, None, {"safe": True}, NOW)
    renderer.close()


def guarded(template: str) -> str:
    """A template that is harmful unless `safe` is set."""
    return "{% if safe %}fine{% else %}" + template + "{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(a=1) %}{% for a in range(99999) %}{% set n.a = (n.a + 1) ** 9 %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_endless_templates_end(template):
    check_refused(guarded(template), "needs more than 0.2 seconds", max_seconds=0.2)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        (
            "{% set n = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}"
            "{% endfor %}{{ n.a }}",
            "memory",
        ),
        ("{{ (['a' * 1000000] * (messages | length * 100000)) | join }}", "memory"),
        ("{{ 'a' | center(10 ** 10) }}", "memory"),
        ("{{ '%10000000000d' | format(1) }}", "memory|too (large|big)"),
        ("{{ '{:>10000000000}'.format(1) }}", "memory|too (large|big)"),
        ("{{ range(100000) | list | tojson(indent=100000) }}", "memory|characters"),
        ("{{ range(10 ** 9) | list }}", "Range too big|Too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion|nested too deeply"),
        ("{% set a = [1] %}{{ a.append(2) }}", "unsafe|not safe"),
        ("{{ undefined.something }}", "'undefined' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no system\nprompt, please') }}", "no system.*prompt, please"),
        ("{% include 'x' %}", "loader"),
        ("{% extends '/etc/passwd' %}", "loader"),
    ],
)
def test_harm_is_refused_with_its_line(template, match):
    check_refused(guarded(template), match, line=7, max_seconds=5)


@pytest.mark.parametrize(
    ("template", "match"),
    [  # Without a line: while Jinja writes Python, or when the text is complete.
        ("{{ (['a' * 1000000] * 100000) | join }}", "memory"),
        ("{{ 9 ** 9999 }}", "ValueError"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 16,777,216 char"),
    ],
)
def test_harm_without_a_line(template, match):
    renderer = Renderer(template)
    for _ in range(2):
        with pytest.raises((TemplateError, TemplateTimeout), match=match):
            render(renderer)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']",
        "'' | attr('__class__')",
        "[''] | map(attribute='__class__') | list",
        "[''] | map('attr', '__class__') | list",
        "[''] | groupby('__class__') | list",
        "'{0.__class__}'.format('')",
        "'{a.__class__}'.format_map({'a': ''})",
        "('{0.__class__}' | attr('format'))('')",
        "('{a.__class__}' | attr('format_map'))({'a': ''})",
        "['{0.__class__}'] | map('format', '') | list",
        "raise_exception.__globals__",
        "strftime_now.__init__.__globals__",
        "strftime_now.__call__.__func__.__globals__",
        "namespace.__init__.__globals__",
        "dict.__init__.__globals__",
        "dict.mro()",
        "cycler.__init__.__globals__",
        "lipsum.__globals__",
        "joiner.__init__.__globals__",
        "self.__init__.__globals__",
        "self._TemplateReference__context",
        "messages.__class__",
        "messages[0].__class__",
        "loop.__class__",
        "caller.__globals__",
        "namespace(__class__='x')",
        "namespace(**{'__class__': 'x'})",
    ],
)
def test_nothing_of_python_is_reached(expression):
    """Ways out of Jinja's sandbox that were found over the years (CVE-2016-10745, 2019-10906,
    2024-56326, 2025-27516 and others). Undefined or refused, never an object of Python."""
    template = "{% for x in [1] %}{{ " + expression + " }}{% endfor %}"
    try:
        text = render(Renderer(template))
    except TemplateError:
        return
    assert text == "" or not any(word in text for word in ("class", "module", "function", "object"))
    assert "/" not in text


def test_stores_of_private_names_are_refused():
    check_refused(
        guarded("{% set n = namespace() %}{% set n.__class__ = 'x' %}{{ n.__class__ }}"),
        "cannot store '__class__'|unsafe",
    )


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ messages", "line 3: unexpected end of template"),
        ("{% if %}", "line 3: "),
        ("{% nonsense %}", "line 3: Encountered unknown tag 'nonsense'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply"),
        ("{{ " + "-" * 3000 + "1 }}", "nested too deeply"),
        ("{{ 1" + "+1" * 30000 + " }}", "nested too deeply"),
    ],
)
def test_templates_that_cannot_be_read(template, match):
    renderer = Renderer("\n\n" + template)
    for _ in range(2):
        with pytest.raises(TemplateError, match=match):
            render(renderer)
    assert render(Renderer(GOOD)) == "Hello"


def test_what_transformers_gives_to_templates():
    text = "{{ {'é<': [1]} | tojson }}{{ strftime_now('%d %b %Y') }}"
    text += "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(Renderer(text)) == '{"é<": [1]}02 Jan 202601'


@pytest.mark.parametrize("start", [render_forks.REAL, render_forks.Forked])
def test_a_process_that_is_gone_is_replaced(start, monkeypatch):
    """Those that other tests fork do the same."""
    monkeypatch.setattr(rendering, "start_process", start)
    renderer = Renderer("{% if slow %}" + COUNT + "{% endif %}" + GOOD, max_seconds=0.2)
    with pytest.raises(TemplateTimeout, match="more than 0.2 seconds"):
        render(renderer, slow=True, count=SLOW)
    assert render(renderer) == "Hello"
    os.kill(renderer.process_id, signal.SIGKILL)
    with pytest.raises(TemplateError, match="ended the process"):
        render(renderer)
    assert render(renderer) == "Hello"


def test_threads_share_a_renderer():
    renderer, texts = Renderer("{{ word }}" * 50), {}

    def work(number: int) -> None:
        for k in range(50):
            texts[number, k] = render(renderer, word=f"{number}.{k} ")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 400
    assert all(text == f"{n}.{k} " * 50 for (n, k), text in texts.items())


SLOW = 99999
COUNT = "{% for _ in range(count) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}{{ count }}"


def counted(renderer: Renderer, count: int, begin: bool = False) -> list[str] | None:
    """The render of COUNT, or its beginning. The time grows with the number."""
    act = renderer.begin if begin else renderer.render
    return act(HELLO, None, {"count": count}, NOW, [(None, {})])


class TestBegin:
    def test_gives_what_render_gives_in_any_order(self):
        renderer = Renderer(COUNT)
        for order in ([1, 2, 3], [3, 1], [2], [], [1, 1, 2]):
            for count in order:
                counted(renderer, count, begin=True)
            for count in (1, 2, 3, 1):
                assert counted(renderer, count) == [str(count)]

    @pytest.mark.parametrize("order", [[SLOW, 1], [1, SLOW]])
    def test_only_the_conversation_that_takes_too_long_is_refused(self, order):
        renderer = Renderer(COUNT, max_seconds=0.3)
        for count in order:
            counted(renderer, count, begin=True)
        for count in (2, *order):
            if count == SLOW:
                with pytest.raises(TemplateTimeout, match="more than 0.3 seconds"):
                    counted(renderer, count)
            else:
                assert counted(renderer, count) == [str(count)]

    def test_large_conversations_do_not_block(self):
        """Answers of 2 MB and a request of 500 kB do not fit into pipes."""
        renderer, text = Renderer("{{ text * times }}"), "x" * 5000
        for times in (400, 401):
            renderer.begin(HELLO, None, {"text": text, "times": times}, NOW, [(None, {})])
        large = {"text": text * 100, "times": 2}
        assert renderer.render(HELLO, None, large, NOW) == [text * 200]
        assert renderer.render(HELLO, None, {"text": text, "times": 401}, NOW) == [text * 401]

    def test_a_forked_process_does_not_wait_for_its_parents(self):
        renderer = Renderer(COUNT)
        counted(renderer, 1, begin=True)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        worker = context.Process(target=lambda: queue.put(counted(renderer, 2)))
        worker.start()
        assert queue.get(timeout=HANG_SECONDS) == ["2"]
        worker.join()
        assert [counted(renderer, count) for count in (1, 2, 3)] == [["1"], ["2"], ["3"]]

    def test_ctrl_c_while_it_waits_for_an_answer(self):
        """The answer that is still to come does not become that of the next conversation."""
        renderer = Renderer(COUNT)
        assert counted(renderer, 1) == ["1"]

        class Interrupted:
            def readline(self):
                raise KeyboardInterrupt

            def close(self):
                pass

        counted(renderer, 3, begin=True)
        assert renderer._process is not None
        pipe, renderer._process.popen.stdout = renderer._process.popen.stdout, Interrupted()
        with pytest.raises(KeyboardInterrupt):
            counted(renderer, 2)
        pipe.close()
        assert [counted(renderer, count) for count in (4, 5, 3)] == [["4"], ["5"], ["3"]]

    def test_closing_does_not_wait_for_a_forked_process(self):
        """It has a copy of the pipe to the process that renders."""
        renderer = Renderer(COUNT)
        assert counted(renderer, 1) == ["1"]
        context = multiprocessing.get_context("fork")
        event = context.Event()
        worker = context.Process(target=event.wait)
        worker.start()
        try:
            renderer.close()
            assert worker.is_alive()
        finally:
            event.set()
            worker.join()


def test_a_template_without_end_is_tried_once(tiny_tokenizer_dir, tmp_path, monkeypatch):
    path = tmp_path / "endless.jinja"
    path.write_text(COUNT.replace("count", "99999"))
    asked = []
    monkeypatch.setattr(
        RenderProcess,
        "ask",
        lambda self, request, ask=RenderProcess.ask: (asked.append(request), ask(self, request))[1],
    )
    monkeypatch.setattr(Renderer.__init__, "__defaults__", (0.3,))
    with pytest.raises(TemplateTimeout, match="more than 0.3 seconds"):
        template = get_template(str(path), Tokenizer.load(tiny_tokenizer_dir))
        template.encode_prompt([{"role": "user", "content": "Hi"}])
    assert len(asked) == 1


def render_in_child(renderer: Renderer, queue) -> None:
    """Render in another process."""
    queue.put((render(renderer), renderer.process_id))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_starts_its_own(method):
    """As in a data loader's workers, which are forked or get a pickled copy."""
    renderer = Renderer(GOOD)
    assert render(renderer) == "Hello"
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=render_in_child, args=(renderer, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=HANG_SECONDS) for _ in workers]
    for worker in workers:
        worker.join()
    assert [text for text, _ in answers] == ["Hello", "Hello"]
    assert len({renderer.process_id, *(process for _, process in answers)}) == 3
    assert render(renderer) == "Hello"
    wait_until(lambda: all(has_ended(process) for _, process in answers))


def test_a_copy_renders():
    renderer = Renderer(GOOD)
    assert render(renderer) == render(pickle.loads(pickle.dumps(renderer))) == "Hello"


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_process_outlives_its_parent(end):
    """The process ends when its stdin closes, which happens however the parent ends."""
    program = (
        "import sys, time; from minisft.text.rendering import Renderer\n"
        f"renderer = Renderer({GOOD!r})\n"
        f"renderer.render({HELLO!r}, None, {{}}, {NOW!r})\n"
        "print(renderer.process_id, flush=True)\n" + ("time.sleep(600)" if end == "kill" else "")
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        if end == "kill":
            assert not has_ended(process)
            parent.kill()
        parent.wait()
    wait_until(lambda: has_ended(process))


def has_ended(process: int) -> bool:
    """True if a process is gone, or has ended and waits to be reaped."""
    return state_of(process) in ("", "Z")


def test_a_run_keeps_its_date(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + GOOD
    template = get_template("auto", tokenizer, now=NOW)
    assert template.render(HELLO) == "02 Jan 2026Hello"
    assert pickle.loads(pickle.dumps(template)).render(HELLO) == "02 Jan 2026Hello"
