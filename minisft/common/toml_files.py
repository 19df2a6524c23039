"""TOML files: recipes for `--config`, and the record of a run's options."""

import tomllib
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError

# The first line of a record. It lists every option, also those at their default.
RECORD_HEADER = "# All options of a run. --config repeats the run from this file.\n"


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file; UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}. Texts need quotes.") from error


def is_record(path: str | Path) -> bool:
    """True if `save_options` wrote the file: it has the header, or at least the name."""
    with open(path, encoding="utf-8") as file:
        return file.readline() == RECORD_HEADER or Path(path).name == "options.toml"
