"""Explain what a script does not understand: unknown flags, stray words, wrong values.

with_hint("--q4_k_m", flags)                 # "--q4_k_m (did you mean --quantization q4_k_m?)"
explain_stray("recipe.yaml", words, flags)   # "... use --config recipe.yaml (see --help)"
"""

import re
import shlex
from argparse import Action, ArgumentTypeError
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minisft.common.flag_names import nearest_flag
from minisft.common.flag_words import is_bare_flag, is_flag
from minisft.common.refusals import WRONG_VALUES

RECIPE = re.compile(r"\.(toml|ya?ml)$", re.IGNORECASE)
NUMBERS = ("N", "X", "X|N", "N|epoch", "4|8")  # how --help shows values that are numbers
ROWS = re.compile(r"\.(jsonl?|parquet|arrow|txt)(\.(gz|zst))?$", re.IGNORECASE)


def checked(text: str, flag: str, type: Callable[[str], Any]) -> Any:
    """An argparse type: `type(text)`, unless the text is one of WRONG_VALUES of the flag."""
    if reason := WRONG_VALUES.get(flag, {}).get(text.lower()):
        raise ArgumentTypeError(f"'{text}': {reason}")
    return type(text)


def with_hint(unknown: str, flags: Mapping[str, Action]) -> str:
    """An unknown flag, or key of a recipe, with the flag that was probably meant.

    flags: {name: action} of the script.
    """
    name = unknown.lstrip("-").replace("-", "_")
    meant = _flag_with_choice(name, flags) or nearest_flag(name, flags)
    dashes = "--" if unknown.startswith("-") else ""
    return unknown + (f" (did you mean {dashes}{meant}?)" if meant else "")


def explain_stray(stray: str, words: Sequence[str], flags: Mapping[str, Action]) -> str:
    """The error for a word that is neither a flag nor the value of one.

    words: the command line. flags: {name: action} of the script.
    """
    flag, given = "", ""  # the flag before the word, with its value
    for before, word in pairwise(["", *words]):
        if word == stray and not is_bare_flag(before):
            break
        flag, given = (word, word) if is_flag(word) else (flag, f"{given} {word}")
    action = flags.get(flag.lstrip("-").partition("=")[0])
    takes_text = action and not (action.choices or action.nargs or action.metavar in NUMBERS)
    if takes_text and not RECIPE.search(stray):
        return (
            f"unexpected argument '{stray}' after {given}: separate names by commas, and put a "
            "text with spaces in quotes (see --help)"
        )
    meant = _flag_of(stray, flags)
    advice = f"use --{meant}" if meant else "flags begin with --"
    return f"unexpected argument '{stray}': {advice} (see --help)"


def example_with(names: Collection[str], examples: str) -> str:
    """The first example of --help with all these flags, to be appended to an error; "" for none."""
    for line in examples.replace("\\\n", " ").splitlines():
        if all(f"--{name} " in f"{line} " for name in names):
            return f", as in: {' '.join(line.split())}"
    return ""


def _flag_of(stray: str, flags: Mapping[str, Action]) -> str | None:
    """The flag that a file, a folder, a model on the hub or a choice is for, with this value."""
    path, value = Path(stray).expanduser(), shlex.quote(stray)
    names: list[str] = []
    if RECIPE.search(stray):
        names = ["config"]
    elif ROWS.search(stray):
        names = ["dataset", "file"]
    elif (path / "adapter_config.json").is_file():
        names = ["adapter"]
    elif stray.lower().endswith(".gguf") or path.is_dir() or stray.count("/") == 1:
        names = ["model_name_or_path"]
    meant = next((f"{name} {value}" for name in names if name in flags), None)
    return meant or _flag_with_choice(stray, flags)


def _flag_with_choice(text: str, flags: Mapping[str, Action]) -> str | None:
    """`quantization q4_k_m` for q4_k_m, a choice of a single flag."""
    value = text.lower()
    names = [name for name, action in flags.items() if value in (action.choices or ())]
    return f"{names[0]} {value}" if len(names) == 1 else None
