"""JSON files that came from somewhere else: read with distrust, written whole or not at all.

config = read_json("checkpoint/config.json")       # an object, or a UserError that names it
write_json(config, "copy/config.json")
"""

import json
import math
import os
from pathlib import Path

from minisft.common.errors import UserError

# The largest in use, tokenizer.json of vocabularies of 250,000 tokens, have a third of this.
MAX_JSON_BYTES = 100 * 2**20


def read_json(path, missing=None):
    """The JSON object in a file, as a dict.

    missing: returned where there is no such file; without it that is a UserError too, as is a file
    that is not a JSON object.
    """
    path = Path(path)
    if missing is not None and not os.path.lexists(path):
        return missing
    try:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
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
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content


def write_json(content, path):
    """Write JSON beside the place, then rename; UserError where that cannot be done."""
    partial, text = Path(f"{path}.partial"), json.dumps(content, indent=2, ensure_ascii=False)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written: {error.strerror}") from error


def is_integer(value, least=0, most=2**53):
    """Whether a value of a JSON file is a whole number within these bounds."""
    return type(value) is int and least <= value <= most


def is_number(value, above=0.0, below=1e12):
    """Whether a value of a JSON file is a number strictly within these bounds."""
    return type(value) in (int, float) and math.isfinite(value) and above < value < below


def token_ids(value, source, name):
    """A token id, several or none, as files state them -> list of int; else UserError."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_integer(id, most=2**31 - 1) for id in ids):
        raise UserError(f"{source}: {name} must be a token id or a list of them, not {value!r}")
    return ids
