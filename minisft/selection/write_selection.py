"""Write the chosen rows and their manifest."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.json_files import write_rows
from minisft.common.outputs import atomic_write
from minisft.data.dataset import Rows
from minisft.data.records import Lines


def write_selection(rows: Rows, chosen: np.ndarray, manifest: dict[str, Any], output: Path) -> None:
    """Write the chosen records as they are in their files, and OUTPUT.manifest; both or none.

    A .jsonl file gets JSON lines, a .json file an array. chosen: row numbers, sorted.
    """
    is_array = output.suffix != ".jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(f"{output}.manifest") as manifest_file:
        manifest_file.write(json.dumps(manifest, ensure_ascii=False) + "\n")
        write_rows(record_texts(rows, chosen), output, is_array)


def record_texts(rows: Rows, chosen: np.ndarray) -> Iterator[str]:
    """The JSON of each chosen record; from JSON lines, byte for byte as in the file."""
    start = 0
    for file in rows.files:
        stop = start + len(file.records)
        for number in chosen[(start <= chosen) & (chosen < stop)].tolist():
            if isinstance(file.records, Lines):
                yield file.records.raw(number - start).decode().strip()
            else:
                yield json_text(file.records[number - start])
        start = stop


def json_text(record: Any) -> str:
    """The JSON of a record. Half a surrogate pair, which UTF-8 cannot express, stays an escape."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return text
