"""Placeholders in rows, such as {{name}} or <your name>: warn about them, or fill them in.

    values = {"name": "Pebble", "author": "the Riverside Lab"}
    fill_in({"output": "I am {{name}}."}, values)                   # {"output": "I am Pebble."}

A model that is trained on such rows would call itself {{name}}.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from minisft.data.formats import Messages
from minisft.text.marks import texts_of

PLACEHOLDER = re.compile(
    r"\{\{ ?\w[\w ]{0,40}\}\}"
    r"|<(?:your|insert|enter)[ _][\w ]{1,40}>|\[(?:your|insert) [\w ]{1,40}\]",
    re.IGNORECASE,
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
    """The placeholders in all texts of messages."""
    return {found for text in texts_of(content) for found in PLACEHOLDER.findall(text)}


def name_of(placeholder: str) -> str:
    """{{ name }} -> name, <your name> -> your name."""
    return placeholder.strip("{}<>[] ").replace("_", " ").lower()


class PlaceholderNote:
    """Counts the rows with placeholders, for one line that names the first of them."""

    def __init__(self) -> None:
        self.first, self.num_rows, self.found = "", 0, Counter[str]()

    def add(self, messages: Messages, place: str) -> None:
        """Count a row with placeholders in its answers. place: its file and number, as text."""
        answers = [message for message in messages if message["role"] == "assistant"]
        if found := find_placeholders(answers):
            self.first = self.first or place
            self.num_rows += 1
            self.found.update(found)

    def line(self, num_rows: str) -> str:
        """The warning; empty if no row has a placeholder. num_rows: the rows looked at."""
        if not self.found:
            return ""
        shown = [placeholder for placeholder, _ in self.found.most_common(3)]
        example = ",".join(f"{name_of(placeholder)}=..." for placeholder in shown)
        return (
            f"warning: {self.first}: {' and '.join(shown)} would be learned literally "
            f"({self.num_rows} of {num_rows}). train.py --replace '{example}' fills them in."
        )
