"""JSON files: read with checks, because others wrote them; written completely or not at all.

config = read_json("checkpoint/config.json")       # a dict, or a UserError that names the file
write_json(config, "copy/config.json")
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from minisft.common.errors import UserError
from minisft.common.lfs_pointers import refuse_pointer
from minisft.common.outputs import atomic_write

# Three times the size of the largest JSON files in use: tokenizer.json with 250,000 tokens.
MAX_JSON_BYTES = 100 * 2**20
MAX_DEPTH = 200  # of objects and lists in rows, tools and calls
TOO_DEEP = f"are nested more than {MAX_DEPTH} levels deep"


def read_json(path: str | Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file. UserError if it cannot be read, or holds something else.

    missing: the value to return if there is no such file. By default, a missing file is an error.
    """
    path = Path(path)
    if missing is not None and not os.path.lexists(path):
        return missing
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes are too many for this file; "
                "download it again"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: not valid JSON ({error}); make or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; make or download it again")
    return content


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_rows(rows: Iterable[str], path: str | Path, is_array: bool) -> int:
    """Write rows of JSON text as an array or as JSON lines; returns their number."""
    begin, separator, end = ("[\n", ",\n", "\n]\n") if is_array else ("", "\n", "\n")
    count = 0
    with atomic_write(path) as file:
        file.write(begin)
        for count, text in enumerate(rows, start=1):
            file.write(separator + text if count > 1 else text)
        file.write(end)
    return count


def is_integer(value: object, least: int = 0, most: int = 2**53) -> TypeGuard[int]:
    """True if a value from a JSON file is a whole number from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, above: float = 0.0, below: float = 1e12) -> TypeGuard[float]:
    """True if a value from a JSON file is a number strictly between the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return above < value < below


def token_ids(value: object, source: str | Path, name: str) -> list[int]:
    """The value of field `name`, a token id or a list of them or null, as a list.

    source: the file, for the UserError about any other value.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_integer(id, most=2**31 - 1) for id in ids):
        raise UserError(f"{source}: {name} must be a token id or a list of them, not {value!r}")
    return ids


def is_too_deep(value: Any) -> bool:
    """True if objects and lists are nested more than MAX_DEPTH levels deep.

    Functions that call themselves read such values. Newer versions of Python parse JSON that is far
    deeper than such a function can follow.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        parts = [part for part in level if isinstance(part, dict | list)]
        level = [
            item for part in parts for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return True
