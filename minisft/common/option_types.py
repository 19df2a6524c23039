"""Types of flags: text from the command line or a recipe -> value."""

import json
import math
import re
import sys
from argparse import ArgumentTypeError
from datetime import datetime
from typing import NoReturn

from minisft.common.torchrun import announced_rank


def boolean(text: str) -> bool:
    """True for `true`, `yes`, `1`; False for `false`, `no`, `0`; in any case."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ArgumentTypeError(f"'{text}' is neither true nor false")


def optional_int(text: str) -> int | None:
    """A whole number, or None for `none`."""
    return None if text.lower() == "none" else int(text)


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _integer(text, least=1)


def steps_or_none(text: str) -> int | None:
    """A positive number of steps; None for -1, which transformers reads as no limit."""
    return None if text == "-1" else _integer(text, least=1)


def checkpoint_name(text: str) -> str | None:
    """A folder, or auto; transformers calls that True, and no checkpoint False."""
    return {"true": "auto", "false": None, "none": None}.get(text.lower(), text)


def quantization_bits(text: str) -> int | None:
    """The bits of quantised weights, 4 or 8; None for none, 16 or 32, which quantise nothing."""
    names = {"4": 4, "8": 8, "none": None, "16": None, "32": None, "false": None}
    if text.lower() not in names:
        raise ArgumentTypeError(f"'{text}': give 4 (NF4) or 8 (int8)")
    return names[text.lower()]


def steps_of_warmup(text: str) -> int:
    """A number of steps; a share of them has a flag of its own."""
    if 0 < _number(text) < 1:
        raise ArgumentTypeError(f"'{text}' is a share of the steps: use --warmup_ratio {text}")
    return _integer(text, least=0)


def share_of_warmup(text: str) -> float:
    """A number of at least 0 and below 1; a number of steps has a flag of its own."""
    if _number(text) >= 1:
        raise ArgumentTypeError(f"'{text}' is a number of steps: use --warmup_steps {text}")
    return fraction(text)


def rows_or_fraction(text: str) -> int | float:
    """A number of rows, or a fraction below 1; UserError for anything else names both."""
    number = _share(text)
    return int(number) if number >= 1 and number == int(number) else number


def sample_rate(text: str) -> float:
    """A fraction of rows, up to 1. A number of rows has a flag of its own."""
    number = _share(text)
    if number > 1:
        rows = f", and --sample_number {text} chooses {text} rows" if text.isdecimal() else ""
        raise ArgumentTypeError(f"'{text}' is not a fraction: {number / 100:g} is {text} %{rows}")
    return number


def sample_number(text: str) -> int:
    """A number of rows. A fraction has a flag of its own."""
    if 0 < _number(text) < 1:
        raise ArgumentTypeError(f"'{text}' is a fraction: use --sample_rate {text}")
    return _integer(text, least=1)


def _share(text: str) -> float:
    """A number above 0; for a percentage, the error gives the fraction."""
    if text.endswith("%") and _number(text[:-1]) > 0:
        raise ArgumentTypeError(f"'{text}': as a fraction this is {_number(text[:-1]) / 100:g}")
    return positive_float(text)


def _number(text: str) -> float:
    """The number, or NaN, which fails every comparison."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**53:  # libraries overflow above
        raise ArgumentTypeError(f"'{text}' is not a whole number of at least {least}, below 2**53")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    return _float(text, math.nextafter(0, 1), math.inf, "above 0")


def non_negative_float(text: str) -> float:
    """A number of at least 0."""
    return _float(text, 0, math.inf, "of at least 0")


def fraction(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _float(text, 0, 1, "of at least 0 and below 1")


def json_object(text: str) -> str:
    """The text of a JSON object."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"'{text}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"'{text}' is not a JSON object like {{\"name\": value}}")
    return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def with_line_breaks(text: str, name: str) -> str:
    r"""Replace each \n that a text of one line spells by a line break. Says so once.

    System prompts are often shipped in that form. name: the flag.
    """
    if "\n" in text or "\\n" not in text:
        return text
    if announced_rank() == 0:
        line = rf"{name}: the text is one line; each \n in it becomes a line break"
        print(line, file=sys.stderr)
    return text.replace("\\n", "\n")


def iso_date(text: str) -> str:
    """A date, or a date and time, such as 2026-07-26."""
    try:
        return datetime.fromisoformat(text).isoformat(timespec="seconds")
    except ValueError as error:
        raise ArgumentTypeError(f"'{text}' is not a date like 2026-07-26") from error


def _float(text: str, least: float, below: float, bounds: str) -> float:
    value = _number(text)
    if not least <= value < below:
        raise ArgumentTypeError(f"'{text}' is not a number {bounds}")
    return value


def token_list(text: str) -> str:
    """Tokens with commas between, as they are. No token is empty, unprintable or listed twice."""
    names = split_names(text)
    for number, name in enumerate(names, 1):
        if not name:
            raise ArgumentTypeError(
                f"token {number} is empty; write tokens with commas between, as in '<a>,<b>'"
            )
        if not name.isprintable():
            raise ArgumentTypeError(f"token {number}, {name!r}, is not printable text")
        if name in names[: number - 1]:
            raise ArgumentTypeError(f"{name} is listed twice")
    return text


def replacements(text: str) -> str:
    """Values of placeholders: name=Pebble,author=the Riverside Lab."""
    for part, (name, value) in zip(_parts(text), _pairs(text), strict=True):
        if not name or not value:
            raise ArgumentTypeError(f"'{part}': write name=Pebble,author=the Riverside Lab")
    return text


def parse_replacements(text: str | None) -> dict[str, str]:
    """{name: value} of `replacements`, names as `value_name` gives. A value may have commas."""
    return dict(_pairs(text)) if text else {}


def _parts(text: str) -> list[str]:
    return re.split(r",(?=\s*[\w -]+=)", text)


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in _parts(text)]
    return [(value_name(name), value) for name, _, value in parts]


def value_name(text: str) -> str:
    """A name in lower case, with spaces: `User-Name` and `user_name` are `user name`."""
    return " ".join(re.split(r"[\s_-]+", text.lower())).strip()


def split_names(text: str | None) -> list[str]:
    """The names in a list with commas between, without white space around them; [] for None."""
    return [] if text is None else [name.strip() for name in text.split(",")]
