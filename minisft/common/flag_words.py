"""The words of a command line: flags, their values, and other words.

grouped(["--lr", "3", "stray"], ["--lr", "3", "--seed", "1", "stray"])  # [["--lr", "3"], ["stray"]]
flag_and_value(["--lr", "3"])                                           # ("lr", 3)
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from minisft.common.llama_factory import read_value


def grouped(rest: Iterable[str], words: Sequence[str]) -> list[list[str]]:
    """The unknown words of a command line in groups: a flag and its value, other words alone.

    rest: the unknown words, in the order of all words. `-1` is a value.
    """
    groups: list[list[str]] = []
    place = -1
    for word in rest:
        last, place = place, words.index(word, place + 1)
        is_value = groups and place == last + 1 and is_bare_flag(words[last])
        if is_value and not is_flag(word):
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def flag_and_value(group: Sequence[str]) -> tuple[str, Any]:
    """(name, value) of a flag in a group; a flag without a value is on."""
    flag, equals, value = group[0].partition("=")
    return flag.lstrip("-"), read_value(value if equals else " ".join(group[1:]))


def is_flag(word: str) -> bool:
    """True for `--flag` and `-f`, also with =value."""
    return re.match("--?[A-Za-z]", word) is not None or word.startswith("--")


def is_bare_flag(word: str) -> bool:
    """True for `--flag`, whose value is the next word."""
    return is_flag(word) and "=" not in word


def normalized(word: str) -> str:
    """A flag with underscores instead of hyphens; other words as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + with_home(value)


def with_home(text: str) -> str:
    """Expand a leading `~/`, which a shell does not do in recipes or after `=`."""
    return os.path.expanduser(text) if text.startswith("~/") else text
