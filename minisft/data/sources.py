"""Find the data sets of `--dataset`: files, folders, entries of dataset_info.json, the hub.

for source in find_sources("alpaca_en_demo,more.jsonl,tatsu-lab/alpaca", dataset_dir="data"):
    print(source.name, source.paths, source.description)
"""

import difflib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.common.words import list_names
from minisft.data.dataset_info import (
    FILE_NAME,
    Description,
    check_entry,
    parse_description,
    read_entries,
)
from minisft.data.file_names import choose_files, file_kind, training_files
from minisft.data.hub import HubName, files_of_card, hub_files, parse_hub_name

STATE = "state.json"  # lists the files of a split that `datasets` saved
# Sources that an entry may name but minisft does not read -> the reason.
UNREADABLE = {
    "ms_hub_url": "is only on ModelScope",
    "om_hub_url": "is only on OpenMind",
    "script_url": "has a script_url, which would run code of the data set",
    "cloud_file_name": "has a cloud_file_name, which is not supported",
}


class MissingData(UserError):
    """A data set is not on this machine. train.py --dry_run plans without it."""


@dataclass
class Source:
    """A data set: its files, how to read their columns, how many rows to take (None: all).

    left_out: names of files in the same folder that are not of the split "train".
    """

    name: str
    paths: list[Path]
    description: Description | None = None
    num_samples: int | None = None
    left_out: list[str] = field(default_factory=list)


def find_sources(
    dataset: str | Path,
    dataset_dir: str | Path = "data",
    plain_text: bool = False,
    accepts_preferences: bool = False,
    offline: bool = False,
) -> list[Source]:
    """The data sets that `--dataset` names, separated by commas.

    A name is a file (which may have commas in its name), else an entry of
    `dataset_dir`/dataset_info.json, else a folder[:split], else owner/name[/subset][:split] on the
    hub.
    plain_text: for --stage pt, where folders may hold .txt files. accepts_preferences: for --stage
    rm and dpo. offline: download nothing. UserError for an unknown name suggests similar names.
    """
    sources = []
    for name in _split_paths(str(dataset)):
        if Path(name).is_file() and Path(name).name == FILE_NAME:
            raise UserError(_names_data_sets(Path(name)))
        entries = {} if Path(name).is_file() else read_entries(dataset_dir)
        if Path(name).is_file():
            sources.append(Source(name, [Path(name)]))
        elif name in entries:
            sources.append(
                _from_entry(
                    name, entries[name], Path(dataset_dir), plain_text, accepts_preferences, offline
                )
            )
        elif Path(name).is_dir():
            sources.append(_from_folder(name, Path(name), None, plain_text))
        elif Path(name.rpartition(":")[0] or name).is_dir():
            folder, _, split = name.rpartition(":")
            sources.append(_from_folder(name, Path(folder), split, plain_text))
        elif on_hub := parse_hub_name(name):
            hint = _suggestion(name, entries, dataset_dir)
            sources.append(Source(name, _from_hub(name, on_hub, hint, plain_text, offline)))
        else:
            hint = _suggestion(name, entries, dataset_dir)
            raise MissingData(f"{name}: there is no such file{hint}")
    if not sources:
        raise UserError("--dataset is empty. Give files, folders or names, separated by commas.")
    return sources


def _names_data_sets(path: Path) -> str:
    """The error for a dataset_info.json in place of a data set."""
    names = list_names(list(read_entries(path.parent)), 10)
    flags = f"--dataset NAME --dataset_dir {path.parent}"
    return f"{path} lists data sets: {names}. Name some of them: {flags}"


def _split_paths(dataset: str) -> list[str]:
    """The names between commas. A file or folder may have commas in its own name."""
    parts, names = dataset.split(","), []
    while parts:
        lengths = range(len(parts), 0, -1)  # the longest name first: "a" may exist beside "a,b"
        length = next((n for n in lengths if os.path.exists(",".join(parts[:n]).strip())), 1)
        names.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return [name for name in names if name]


def _from_hub(name: str, on_hub: HubName, hint: str, plain_text: bool, offline: bool) -> list[Path]:
    try:
        return hub_files(*on_hub, plain_text=plain_text, offline=offline)
    except UserError as error:
        raise MissingData(f"{name}: {error} (there is no such file{hint})") from error


def _suggestion(name: str, entries: Iterable[str], dataset_dir: str | Path) -> str:
    places = [f"{name}.json", f"{name}.jsonl"]
    places += [str(Path(dataset_dir) / place) for place in (name, *places)]
    files = [place for place in places if Path(place).is_file()]
    if files:
        return f" or folder; did you mean {' or '.join(files)}?"
    if close := difflib.get_close_matches(name, entries, n=3):
        return f", and {FILE_NAME} has no such name; did you mean {' or '.join(close)}?"
    return f" or folder, and no data set of this name in {FILE_NAME} (see --dataset_dir)"


def _from_folder(name: str, folder: Path, split: str | None, plain_text: bool) -> Source:
    """The files of a split of a folder, "train" by default."""
    paths = data_files(folder, plain_text, split or "train")
    if is_saved(folder):
        return Source(name, paths)
    names = [path.relative_to(folder).as_posix() for path in paths]
    try:
        chosen = files_of_card(str(folder), folder, split, plain_text)
        if chosen is None:
            chosen = (
                choose_files(name, names, None, split) if split else training_files(name, names)
            )
    except UserError as error:
        raise UserError(f"{error}. Name one of its splits: {folder}:SPLIT") from error
    others = [] if split else [other for other in names if other not in chosen]
    return Source(name, [folder / file for file in chosen], left_out=others)


def is_saved(folder: Path) -> bool:
    """True for a folder that `datasets` has saved: a split, or several."""
    return (folder / STATE).is_file() or (folder / "dataset_dict.json").is_file()


def data_files(folder: Path, plain_text: bool, split: str) -> list[Path]:
    """The files of rows in a folder and its subfolders, sorted by name.

    A folder that `datasets` has saved gives the files of the split, in its order.
    """
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            splits = [path.parent.name for path in sorted(folder.glob(f"*/{STATE}"))]
            raise UserError(
                f"{folder}: there is no split '{split}', only {list_names(splits)}. Give the "
                "folder of a split."
            )
        return _saved_files(folder / split)
    if (folder / STATE).is_file():
        if split not in ("train", folder.name):
            raise UserError(f"{folder}: the folder is a single split, and has no split '{split}'")
        return _saved_files(folder)
    try:
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    paths = [folder / name for name in names if file_kind(name, plain_text)]
    if not paths:
        kinds = "parquet, Arrow, JSON or .txt" if plain_text else "parquet, Arrow or JSON"
        raise UserError(f"{folder}: the folder has no {kinds} file")
    return paths


def _saved_files(folder: Path) -> list[Path]:
    """The files that `datasets` lists in state.json."""
    state = read_json(folder / STATE)
    files = [file for file in state.get("_data_files") or [] if isinstance(file, dict)]
    if not files or state.get("_indices_data_files"):
        raise UserError(
            f"{folder / 'state.json'}: save the data set again, with datasets 2 or newer"
        )
    paths = [folder / Path(str(file.get("filename"))).name for file in files]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]}: there is no such file; state.json names it")
    return paths


def _from_entry(
    name: str,
    entry: Any,
    dataset_dir: Path,
    plain_text: bool,
    accepts_preferences: bool,
    offline: bool,
) -> Source:
    place = f"{dataset_dir / FILE_NAME}, {name}"
    check_entry(entry, place, accepts_preferences)
    description = parse_description(name, entry, place, plain_text)
    paths = _entry_files(place, entry, dataset_dir, plain_text, offline)
    if entry.get("file_sha1"):
        _check_sha1(place, paths, entry["file_sha1"])
    return Source(name, paths, description, entry.get("num_samples"))


def _entry_files(
    place: str, entry: dict[str, Any], dataset_dir: Path, plain_text: bool, offline: bool
) -> list[Path]:
    """The files of an entry, downloaded if it names a data set on the hub."""
    for key, value in entry.items():
        if key.endswith(("_url", "_name")) and (not isinstance(value, str) or not value):
            raise UserError(f"{place}: {key} must be a name")
    if "hf_hub_url" in entry:
        try:
            return hub_files(
                entry["hf_hub_url"],
                entry.get("subset"),
                entry.get("split"),
                str(entry.get("folder") or ""),
                plain_text,
                offline,
            )
        except UserError as error:
            raise MissingData(f"{place}: {error}, or give the files as file_name.") from error
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
        raise MissingData(f"{place}: there is no file {path}")
    return _files_of_split(place, path, entry, plain_text)


def _files_of_split(place: str, root: Path, entry: dict[str, Any], plain_text: bool) -> list[Path]:
    """The files below `root` that belong to the folder, subset and split of an entry."""
    inside = str(entry.get("folder") or "")
    folder = root / inside
    try:
        paths = data_files(folder, plain_text, entry.get("split") or "train")
    except UserError as error:
        raise UserError(f"{place}: {error}; convert other kinds of file first") from error
    if is_saved(folder):
        if entry.get("subset") not in (None, "default"):
            raise UserError(f"{place}: {folder} was saved by `datasets`, without subsets")
        return paths
    names = [path.relative_to(root).as_posix() for path in paths]
    subset, split = entry.get("subset"), entry.get("split")
    return [root / name for name in choose_files(place, names, subset, split, inside)]


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
