"""Settings at the beginning of a chat template: values of variables and a system prompt.

    text = with_settings(text, setting("date_string", "26 Jul 2024") | system_setting("Be kind."))

A setting is a line of Jinja, so every program that renders the text follows it:

    {% if date_string is not defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
    {% if messages[0]['role'] != 'system' %}{% set messages = [...] + messages %}{% endif %}

transformers, vLLM and llama.cpp remove the line break after a block (trim_blocks). So a line adds
nothing to the output of the template.
"""

import json
import math
import re
from typing import Any

from minisft.common.errors import UserError

END = "{% endif %}\n"
LITERAL = r'(?:"(?:[^"\\]|\\.)*"|[^"%])*'  # Jinja's, as `literal` writes it
LINE = re.compile(
    r"\{% if (?:\w+ is not defined|messages\[0\]\['role'\] != 'system') %\}"
    rf"\{{% set (?P<name>\w+) = {LITERAL} %\}}\{{% endif %\}}\n"
    rf"|\{{% set (?P<fixed>\w+) = {LITERAL} %\}}\n"
)


def setting(name: str, value: Any) -> dict[str, str]:
    """{name: line}. The line sets a variable, unless the rendering program has its own value."""
    return {name: f"{{% if {name} is not defined %}}{{% set {name} = {literal(value)} %}}{END}"}


def fixed_setting(name: str, line: str | None) -> dict[str, str]:
    """A setting that wins over the value of the rendering program.

    line: the setting as `setting` writes it; None for a variable that the program must not set.
    """
    if line is None:
        return {name: f"{{% set {name} = undefined %}}\n"}
    return {name: line.removeprefix(f"{{% if {name} is not defined %}}").removesuffix(END) + "\n"}


def unfixed_setting(name: str, line: str) -> dict[str, str]:
    """The inverse of fixed_setting: the setting, or None for a variable without one."""
    if line in fixed_setting(name, None).values():
        return {}
    if line.endswith(END):
        return {name: line}
    return {name: f"{{% if {name} is not defined %}}{line.removesuffix(chr(10))}{END}"}


def system_setting(text: str) -> dict[str, str]:
    """{"messages": line} that puts a system message before conversations without one."""
    message = f"{{'role': 'system', 'content': {literal(text)}}}"
    line = f"{{% set messages = [{message}] + messages %}}"
    return {"messages": f"{{% if messages[0]['role'] != 'system' %}}{line}{END}"}


def with_settings(text: str, settings: dict[str, str]) -> str:
    """A template with these settings, which replace its settings of the same names."""
    present, rest = split_settings(text)
    return "".join({**present, **settings}.values()) + rest


def split_settings(text: str) -> tuple[dict[str, str], str]:
    """(the settings at the beginning of a template, the rest of it)."""
    settings, place = {}, 0
    while found := LINE.match(text, place):
        settings[found["name"] or found["fixed"]] = found[0]
        place = found.end()
    return settings, text[place:]


def literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        items = (f"{literal(key)}: {literal(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if value is not None and not isinstance(value, str | bool | int | float):
        raise UserError(f"a value of type {type(value).__name__} cannot be written in a template")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"a template cannot hold the number {value}")
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
