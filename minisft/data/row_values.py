"""Typed access to the values of a parsed JSON row. BadRow says what is wrong with a value."""

import json
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import MAX_DEPTH, TOO_DEEP, is_too_deep
from minisft.text.messages import MEDIA

NOT_FINITE = (
    "NaN and Infinity are not JSON, and not an answer. Remove the row, or write null or the text "
    "that is meant"
)


class BadRow(UserError):
    """The error of a broken row. The caller adds the file and the number of the row."""


def parse_json(text: str, first_line: int = 1) -> Any:
    """`json.loads`; an error becomes a BadRow with line and column."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = ": remove the comma after the row" if text[error.pos :].strip() == "," else ""
        place = f"line {line} column {error.colno}"
        raise BadRow(f"{place}: not valid JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"line {first_line}: JSON that cannot be read: {error}") from error
    # Brackets are quicker to count than levels, and few rows have so many.
    if text.count("[") + text.count("{") > MAX_DEPTH and is_too_deep(value):
        raise BadRow(f"line {first_line}: its values {TOO_DEEP}")
    return value


def parse_json_or_none(text: str) -> Any:
    """The parsed JSON, or None where the text is not JSON."""
    try:
        return parse_json(text)
    except BadRow:
        return None


def object_of(record: Any) -> dict[str, Any]:
    """The row itself, if it is a JSON object."""
    if not isinstance(record, dict):
        raise BadRow(f"a row must be a JSON object, not {kind_of(record)}")
    return record


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The row without columns that are null: tables of rows in several formats have them."""
    return {name: value for name, value in record.items() if value is not None}


def string_of(record: dict[str, Any], column: str) -> str:
    """The string in a column, "" if it is absent or null."""
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{column} must be a string, not {kind_of(value)}")
    return value


def list_of(record: dict[str, Any], column: str) -> list[Any] | None:
    """The list in a column, also as JSON text; None if it is absent or empty text."""
    value = record.get(column)
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except BadRow as error:
            raise BadRow(f"in {column}, {error}") from error
    if value is not None and not isinstance(value, list):
        raise BadRow(f"{column} must be a list, not {kind_of(value)}")
    return value


def check_text_only(record: dict[str, Any]) -> None:
    """Raise BadRow for a row or a turn with images, audio or video."""
    if media := [name for name in MEDIA if record.get(name)]:
        raise BadRow(f"it has {' and '.join(media)}; minisft learns text only")


def check_encodable(value: Any) -> None:
    """Raise BadRow for NaN, infinity, and half of a surrogate pair, which UTF-8 cannot express."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise BadRow(NOT_FINITE) from error
    except RecursionError as error:
        raise BadRow(f"its values {TOO_DEEP}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("a string holds half of a surrogate pair, which is not text") from error


def kind_of(value: Any) -> str:
    """The type of a JSON value, as text."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
