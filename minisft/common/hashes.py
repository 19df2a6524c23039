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


def model_files(inputs: Iterable[str | None]) -> str:
    """A fingerprint of the files of local models and adapters: of their paths, sizes and times.

    It shows whether they have been trained again, without reading them. Names on the hub and None
    have no files.
    """
    files: list[Path] = []
    for path in map(Path, filter(None, inputs)):
        files += [path] if path.is_file() else sorted(path.glob("*"))
    states = [(file, file.stat()) for file in files if file.suffix in MODEL_FILES]
    text = "\n".join(f"{file} {state.st_size} {state.st_mtime_ns}" for file, state in states)
    return hashlib.sha256(text.encode()).hexdigest()
