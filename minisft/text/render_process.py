"""A program that renders chat templates: requests on stdin, answers on stdout.

A chat template is code from a stranger. Jinja's sandbox keeps it from files and from Python's
internals, but not from endless loops or huge strings. The operating system does: this process may
use MAX_BYTES of memory and, for each request, a number of seconds of processor time (its argument).
It ends when it uses more; `rendering.py` starts another.

The first line of stdin is the template, a JSON string. Each further line is a request, a JSON
object, and a line of stdout its answer, {"texts": [...]} or {"error": ...}:

    messages, tools   what it renders
    renders           [[how many of the messages, more variables], ...], one for each text
    variables         bos_token and the like
    now               the time for strftime_now, in ISO format

The environment is transformers' (utils/chat_template_utils.py), with `tojson`, `raise_exception`,
`strftime_now`, loop controls and `{% generation %}`. Only jinja2 is imported, so this starts fast.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 10.0
MAX_BYTES = 2**30
MAX_TEMPLATE = 2**20  # characters
MAX_OUTPUT = 2**24  # characters
MAX_MESSAGE = 300  # characters of an error

# Marks around the output of a {% generation %} block: noncharacters, which no text contains.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """The body of the block, between the two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_between_marks")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _between_marks(self, caller: Any) -> str:
        return GENERATION_START + caller() + GENERATION_END


class Dict:
    """`dict` in a template. It is not the class, which could lead to Python's internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """`namespace` in a template, without attributes that could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            Namespace.check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace.check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def check_name(name: Any) -> None:
        """Refuse names that begin with an underscore."""
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot store {name!r}")


class Clock:
    """`strftime_now` in a template. A run keeps the time at which it started."""

    now = datetime(2000, 1, 1)

    def __call__(self, pattern: str) -> str:
        return self.now.strftime(pattern)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Jinja's own escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> None:
    """`raise_exception` in a template, which refuses a conversation."""
    raise jinja2.TemplateError(message)


def environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    """The sandbox, with the filters and functions that transformers provides to chat templates."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    ours: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": clock}
    ours |= {"dict": Dict(), "namespace": Namespace}
    sandbox.globals.update(ours)
    return sandbox


def render(template: jinja2.Template, request: dict[str, Any]) -> list[str]:
    """The texts that a request asks for."""
    texts = []
    for count, variables in request["renders"]:
        values = {"messages": request["messages"][:count], "tools": request["tools"]}
        parts, length = [], 0
        for part in template.generate(**values, **{**request["variables"], **variables}):
            length += len(part)
            if length > MAX_OUTPUT:
                raise jinja2.TemplateError(f"it writes more than {MAX_OUTPUT:,} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts


def failure(error: Exception) -> dict[str, Any]:
    """The error on one line, and its line in the template: {"error": ..., "line": ...}."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"error": error.message, "line": error.lineno}
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, jinja2.TemplateError):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = "it needs too much memory"
    elif isinstance(error, RecursionError | SyntaxError):  # SyntaxError: of Python's compiler
        message = "it is nested too deeply"
    # In the frames of a template, Jinja reports the template's line numbers.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    message = " ".join(message[:MAX_MESSAGE].split())
    return {"error": message, "line": lines[-1] if lines else None}


def limit_memory() -> None:
    """Let allocations beyond MAX_BYTES fail, where the operating system can do that."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    except (ImportError, ValueError, OSError):  # Windows, macOS
        return


def groups_of_lines() -> Iterator[list[bytes]]:
    """The lines of stdin, those that have arrived together in a list."""
    parts: list[bytes] = []
    while part := os.read(0, 2**16):
        parts.append(part)
        if b"\n" in part:
            *lines, rest = b"".join(parts).split(b"\n")
            parts = [rest]
            yield lines


def main() -> None:
    """Answer requests until stdin ends. Argument: the seconds for each."""
    max_seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent program handles Ctrl-C
    limit_memory()
    set_timer = getattr(signal, "setitimer", None)
    clock = Clock()
    template: jinja2.Template | None = None
    unreadable: dict[str, Any] = {}
    is_first = True
    for lines in groups_of_lines():
        for line in lines:
            if set_timer:
                set_timer(signal.ITIMER_PROF, max_seconds)  # then SIGPROF ends the process
            if is_first:
                is_first = False
                try:
                    template = environment(clock).from_string(json.loads(line))
                except Exception as error:
                    unreadable = failure(error)
                continue
            reply = unreadable
            if template is not None:
                request = json.loads(line)
                clock.now = datetime.fromisoformat(request["now"])
                try:
                    reply = {"texts": render(template, request)}
                except Exception as error:
                    reply = failure(error)
            if set_timer:
                set_timer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
