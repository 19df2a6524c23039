"""A chat template from a stranger: what it may do, and what it costs at most."""

import os
import pickle
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from minisft.text.rendering import Renderer, TemplateError
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

NOW = "2026-07-26T12:00:00"
HELLO = [{"role": "user", "content": "Hello"}]


def render(template, messages=HELLO, max_seconds=0.5, **variables):
    return Renderer(template, max_seconds).render(messages, None, variables, NOW)[0]


def test_a_template_sees_what_transformers_gives_it():
    assert render("{{ messages[0].content }}{{ bos_token }}", bos_token="<s>") == "Hello<s>"
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2026"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert (
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert (
        render("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ dict(a=1) }}")
        == "2{'a': 1}"
    )


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
)
BRANCHES = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system') }}", "line 1: no system"),
        ("\n\n{{ 1 / 0 }}", "line 3: ZeroDivisionError"),
        ("\n{% if %}", "line 2: Expected an expression"),
        ("{{ messages[0].missing.deeper }}", "has no attribute 'missing'"),
        (LOOPS, "more than 0.5 s"),
        (BRANCHES, "more than 0.5 s"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ 'x' * 10**12 }}", "memory"),
        (DOUBLING, "memory|more than 0.5 s"),
        ("{{ 'x' | center(10**12) }}", "memory"),
        ("{{ '%0999999999999d' % 1 }}", "memory"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 9000 + ")" * 9000 + " }}", "nested too deeply"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "access to attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "cannot store '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_what_a_template_may_not_do(template, message):
    """One line with the reason; and the next template is rendered."""
    with pytest.raises(TemplateError, match=message) as failure:
        render(template)
    assert "\n" not in str(failure.value)


def test_the_filter_attr_gives_nothing_unsafe():
    assert render("{{ messages | attr('__class__') | attr('__mro__') }}") == ""


def test_the_next_conversation_is_rendered():
    renderer = Renderer("{% if messages | length > 1 %}{{ 'x' * 10**12 }}{% endif %}ok", 0.5)
    with pytest.raises(TemplateError):
        renderer.render(HELLO * 2, None, {}, NOW)
    assert renderer.render(HELLO, None, {}, NOW) == ["ok"]
    renderer = Renderer("{% if messages | length > 1 %}" + LOOPS + "{% endif %}ok", 0.2)
    with pytest.raises(TemplateError):
        renderer.render(HELLO * 2, None, {}, NOW)
    assert renderer.render(HELLO, None, {}, NOW) == ["ok"]


def test_pickled_and_forked_and_from_threads():
    renderer = Renderer("{{ messages[0].content }}")
    assert renderer.render(HELLO, None, {}, NOW) == ["Hello"]
    assert pickle.loads(pickle.dumps(renderer)).render(HELLO, None, {}, NOW) == ["Hello"]
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            texts = [renderer.render([{"content": str(n)}], None, {}, NOW) for n in range(50)]
            os._exit(0 if texts == [[str(n)] for n in range(50)] else 1)
        texts = [renderer.render([{"content": str(-n)}], None, {}, NOW) for n in range(50)]
        assert texts == [[str(-n)] for n in range(50)] and os.waitpid(child, 0)[1] == 0
    wrong = []

    def ask(number):
        for _ in range(30):
            if renderer.render([{"content": str(number)}], None, {}, NOW) != [str(number)]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)"])
def test_the_process_ends_with_its_parent(end):
    program = (
        "import os, sys\n"
        "from minisft.text.rendering import Renderer\n"
        "renderer = Renderer('ok')\n"
        "renderer.render([], None, {}, '2026-07-26')\n"
        "os.write(2, str(renderer._process.pid).encode() + b'\\n')\n"
        f"{end}"
    )
    # The process has the pipe as its stdout too: it is read to its end only when both are gone.
    parent = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60
    )
    pid = int(parent.stderr.splitlines()[0])
    with pytest.raises(ProcessLookupError):
        for _ in range(10**6):
            os.kill(pid, 0)
            os.sched_yield()


def test_a_run_keeps_its_date(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}\n{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    template = get_template("auto", tokenizer, now=NOW)
    assert template.render(HELLO).startswith("26 Jul 2026\n")
    assert pickle.loads(pickle.dumps(template)).render(HELLO).startswith("26 Jul 2026\n")
