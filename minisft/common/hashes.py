"""Fingerprints of files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

# What a model consists of.
MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(inputs: Iterable[str | None]) -> dict[str, list[int]]:
    """{path: [bytes, time of change in nanoseconds]} of the files of local models and adapters.

    It shows whether they have been trained again, without reading them. Names on the hub and None
    have no files.
    """
    files: list[Path] = []
    for path in map(Path, filter(None, inputs)):
        files += [path] if path.is_file() else sorted(path.glob("*"))
    states = {str(file): file.stat() for file in files if file.suffix in MODEL_FILES}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
