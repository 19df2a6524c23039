"""Find the data sets of `--dataset`: files, folders, and entries of dataset_info.json.

for source in find_sources("alpaca_en_demo,more.jsonl,folder", dataset_dir="data"):
    print(source.name, source.paths, source.description)
"""

import difflib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.common.downloads import download
from minisft.common.errors import UserError
from minisft.data.dataset_info import (
    FILE_NAME,
    Description,
    check_entry,
    parse_description,
    read_entries,
)

# Files of a downloaded data set that hold no rows.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words in the file names of a split.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Sources that an entry may name but minisft does not read -> the reason.
UNREADABLE = {
    "ms_hub_url": "is only on ModelScope",
    "om_hub_url": "is only on OpenMind",
    "script_url": "has a script_url, which would run code of the data set",
    "cloud_file_name": "has a cloud_file_name, which is not supported",
}


@dataclass
class Source:
    """A data set: its files, how to read their columns, how many rows to take (None: all)."""

    name: str
    paths: list[Path]
    description: Description | None = None
    num_samples: int | None = None


def find_sources(
    dataset: str | Path,
    dataset_dir: str | Path = "data",
    plain_text: bool = False,
    accepts_preferences: bool = False,
) -> list[Source]:
    """The data sets that `--dataset` names, separated by commas.

    A name is a file, else an entry of `dataset_dir`/dataset_info.json, else a folder.
    plain_text: for --stage pt, where folders may hold .txt files. accepts_preferences: for --stage
    rm and dpo. UserError for an unknown name suggests similar names.
    """
    sources = []
    for name in filter(None, map(str.strip, str(dataset).split(","))):
        entries = {} if Path(name).is_file() else read_entries(dataset_dir)
        if Path(name).is_file():
            sources.append(Source(name, [Path(name)]))
        elif name in entries:
            sources.append(
                _from_entry(name, entries[name], Path(dataset_dir), plain_text, accepts_preferences)
            )
        elif Path(name).is_dir():
            sources.append(Source(name, data_files(name, plain_text)))
        else:
            raise UserError(f"{name}: there is no such file{_suggestion(name, entries)}")
    if not sources:
        raise UserError("--dataset is empty. Give files, folders or names, separated by commas.")
    return sources


def _suggestion(name: str, entries: Iterable[str]) -> str:
    files = [name + suffix for suffix in (".json", ".jsonl") if Path(name + suffix).is_file()]
    if files:
        return f" or folder; did you mean {' or '.join(files)}?"
    if close := difflib.get_close_matches(name, entries, n=3):
        return f", and {FILE_NAME} has no such name; did you mean {' or '.join(close)}?"
    return f" or folder, and no data set of this name in {FILE_NAME} (see --dataset_dir)"


def data_files(folder: str | Path, plain_text: bool = False) -> list[Path]:
    """The files of rows in a folder and its subfolders, sorted by name."""
    suffixes = (".json", ".jsonl", ".txt") if plain_text else (".json", ".jsonl")
    folder = Path(folder)
    paths = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_data = path.suffix.lower() in suffixes and path.name not in METADATA_FILES
        if path.is_file() and is_data and not is_hidden:
            paths.append(path)
    if not paths:
        raise UserError(f"{folder}: the folder has no {', '.join(suffixes)} file")
    return paths


def _from_entry(
    name: str, entry: Any, dataset_dir: Path, plain_text: bool, accepts_preferences: bool
) -> Source:
    place = f"{dataset_dir / FILE_NAME}, {name}"
    check_entry(entry, place, accepts_preferences)
    description = parse_description(name, entry, place, plain_text)
    paths = _entry_files(place, entry, dataset_dir, plain_text)
    if entry.get("file_sha1"):
        _check_sha1(place, paths, entry["file_sha1"])
    return Source(name, paths, description, entry.get("num_samples"))


def _entry_files(
    place: str, entry: dict[str, Any], dataset_dir: Path, plain_text: bool
) -> list[Path]:
    """The files of an entry, downloaded if it names a data set on the hub."""
    for key, value in entry.items():
        if key.endswith(("_url", "_name")) and (not isinstance(value, str) or not value):
            raise UserError(f"{place}: {key} must be a name")
    if "hf_hub_url" in entry:
        folder = _download(place, entry["hf_hub_url"], plain_text)
        return _files_of_split(place, folder, entry, plain_text)
    for key, reason in UNREADABLE.items():
        if key in entry:
            raise UserError(f"{place}: {reason}. Download the rows and give them as file_name.")
    if "file_name" not in entry:
        raise UserError(f"{place}: has neither file_name nor hf_hub_url")
    path = dataset_dir / entry["file_name"]
    if path.is_file():
        if (entry.get("split") or "train") != "train":
            raise UserError(f"{place}: a single file has no split '{entry['split']}'")
        return [path]
    if not path.is_dir():
        raise UserError(f"{place}: there is no file {path}")
    return _files_of_split(place, path, entry, plain_text)


def _files_of_split(place: str, root: Path, entry: dict[str, Any], plain_text: bool) -> list[Path]:
    """The files below `root` that belong to the folder, subset and split of an entry."""
    try:
        paths = data_files(root / str(entry.get("folder") or ""), plain_text)
    except UserError as error:
        raise UserError(f"{place}: {error}; convert other kinds of file first") from error
    words = {path: _words(path.relative_to(root)) for path in paths}
    if subset := entry.get("subset"):
        matching = [path for path in paths if _words(subset) <= words[path]]
        if not matching and subset != "default":
            raise UserError(f"{place}: no file for the subset '{subset}' among {_names(paths)}")
        paths = matching or paths
    split = str(entry.get("split") or "train")
    matching = [path for path in paths if _in_split(words[path], split)]
    names_splits = any(_in_split(words[path], known) for path in paths for known in SPLIT_WORDS)
    if not matching and (names_splits or split != "train"):
        raise UserError(f"{place}: no file for the split '{split}' among {_names(paths)}")
    return matching or paths


def _words(name: str | Path) -> set[str]:
    return set(re.findall("[a-z0-9]+", str(name).lower()))


def _in_split(words: set[str], split: str) -> bool:
    return bool(SPLIT_WORDS[split] & words) if split in SPLIT_WORDS else _words(split) <= words


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:5]) + (", ..." if len(paths) > 5 else "")


def _download(place: str, repo_id: str, plain_text: bool) -> Path:
    """The local copy of the JSON (and text) files of a data set on the hub."""
    patterns = ["*.json", "*.jsonl", *(["*.txt"] if plain_text else [])]
    try:
        return download(repo_id, patterns, "dataset")
    except UserError as error:
        raise UserError(
            f"{place}: {error}. Download it yourself and give it as file_name."
        ) from error


def _check_sha1(place: str, paths: list[Path], expected: Any) -> None:
    if len(paths) != 1:
        raise UserError(f"{place}: file_sha1 needs a single file, and there are {len(paths)}")
    with open(paths[0], "rb") as file:
        actual = hashlib.file_digest(file, "sha1").hexdigest()
    if actual != str(expected).lower():
        raise UserError(
            f"{place}: the SHA-1 of {paths[0]} is {actual}, not {expected}. It is another file, or "
            "it is damaged."
        )
