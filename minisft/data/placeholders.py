"""Placeholders in rows, such as {{name}}, <your name> or [NAME]: warn about them, or fill them in.

    values = {"name": "Pebble", "author": "the Riverside Lab"}
    fill_in({"output": "I am {{name}}."}, values)                   # {"output": "I am Pebble."}

A model that is trained on such rows would call itself {{name}}.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from minisft.common.option_types import value_name
from minisft.common.words import list_names
from minisft.data.formats import Messages
from minisft.text.marks import texts_of

# In capitals, or in brackets, other words are tags, constants and stage directions.
WORDS = "name|author|company|creator|developer|organisation|organization|team"
PLACEHOLDER = re.compile(
    r"\{\{ {0,9}\w[\w -]{0,40}\}\}"  # {{name}}, {{ user-name }}
    r"|<(?i:your|insert|enter)[ _-][\w -]{1,40}>"  # <your name>
    r"|\[(?i:your|insert|enter)[ _-][\w -]{1,40}\](?!\()"  # [Your Name], not a link
    rf"|<(?:[A-Z]+[ _-]){{0,3}}(?:{WORDS.upper()})>"  # <AUTHOR>
    # [NAME], [Company Name]; not names[NAME]
    rf"|(?<!\w)\[(?=[A-Z])(?i:(?:[a-z]+[ _-]){{0,3}}(?:{WORDS}))\](?!\()"
)


def fill_in(value: Any, values: Mapping[str, str]) -> Any:
    """A record with the placeholders in its texts filled in. Placeholders without a value stay."""
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda match: values.get(name_of(match[0]), match[0]), value)
    if isinstance(value, list):
        return [fill_in(item, values) for item in value]
    if isinstance(value, dict):
        return {key: fill_in(item, values) for key, item in value.items()}
    return value


def find_placeholders(content: Any) -> set[str]:
    """The placeholders in all texts of messages, or of a record."""
    return {found for text in texts_of(content) for found in PLACEHOLDER.findall(text)}


def name_of(placeholder: str) -> str:
    """{{ name }} -> name, <your_name> -> your name."""
    return value_name(placeholder.strip("{}<>[]"))


def unused_note(values: Mapping[str, str], names: Collection[str], searched: str) -> str:
    """The warning about values of --replace for placeholders that no row has; empty if none is.

    names: of the placeholders in the rows. searched: the rows without it, such as "no row".
    """
    unused = sorted(values.keys() - set(names))
    if not unused:
        return ""
    known = f"has these: {list_names(sorted(names))}" if names else "has none"
    return (
        f"warning: --replace: {searched} has a placeholder called {list_names(unused)}. "
        f"The data {known}."
    )


class PlaceholderNote:
    """Counts the rows with placeholders, for one line that names the first of them."""

    def __init__(self) -> None:
        self.first, self.num_rows, self.found = "", 0, Counter[str]()
        self.is_learned = False

    def add(self, messages: Messages, place: str) -> None:
        """Count a row with placeholders. place: its file and number, as text."""
        if found := find_placeholders(messages):
            self.first = self.first or place
            self.num_rows += 1
            self.found.update(sorted(found))  # in the same order in every process
            answers = [message for message in messages if message["role"] == "assistant"]
            self.is_learned = self.is_learned or bool(find_placeholders(answers))

    def line(self, num_rows: str, flag: str = "--replace") -> str:
        """The warning; empty if no row has a placeholder.

        num_rows: the rows looked at. flag: what fills them in.
        """
        if not self.found:
            return ""
        shown = [placeholder for placeholder, _ in self.found.most_common(3)]
        names = dict.fromkeys(name_of(placeholder) for placeholder in shown)
        example = ",".join(f"{name}=..." for name in names)
        use = "learned" if self.is_learned else "read"
        return (
            f"warning: {self.first}: {' and '.join(shown)} would be {use} "
            f"literally ({self.num_rows} of {num_rows}). {flag} '{example}' fills them in."
        )
