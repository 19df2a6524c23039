"""Data sets on the Hugging Face hub: which of their files hold the rows.

    name = parse_hub_name("openai/gsm8k/main:test")     # owner/name, subset, split
    paths = hub_files(name.repo_id, name.subset, name.split)

The card of a data set (README.md) may list the files of each subset and split; otherwise words in
the file names show them. If the rows exist in several forms, the parquet files are preferred.
"""

import glob
import importlib.util
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from minisft.common.downloads import CARD, dataset_repository, download, read_card
from minisft.common.errors import UserError
from minisft.common.words import list_names
from minisft.data.file_names import METADATA_FILES, choose_files, file_kind
from minisft.data.unpack import require_pyarrow

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w.-]+))?(?::([\w.-]+))?")
WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}  # as regular expressions
SHARD = re.compile(r"-(\d+)-of-(\d+)")


class HubName(NamedTuple):
    """owner/name[/subset][:split]"""

    repo_id: str
    subset: str | None
    split: str | None


def parse_hub_name(name: str) -> HubName | None:
    """The parts of the name of a data set on the hub; None for other names and missing files."""
    match = HUB_NAME.fullmatch(name)
    is_path = (
        file_kind(name) is not None or Path(name).parts[:1] and Path(Path(name).parts[0]).is_dir()
    )
    return HubName(*match.groups()) if match and not is_path else None


def hub_files(
    repo_id: str,
    subset: str | None = None,
    split: str | None = None,
    folder: str = "",
    plain_text: bool = False,
    offline: bool = False,
) -> list[Path]:
    """The local files of a subset and a split, downloaded unless they are in the cache.

    split: "train" by default. folder: the part of the repository to look at. offline: use only what
    is in the cache. UserError if there are no such files.
    """
    repository = dataset_repository(repo_id, offline)
    names = [name for name in repository.names if file_kind(name, plain_text)]
    if folder:
        names = [name for name in names if PurePosixPath(name).is_relative_to(folder)]
    if not names:
        others = list_names([name for name in repository.names if name != CARD])
        raise UserError(
            f"{repo_id} has no parquet or JSON files, only {others or 'no files'}. Download and "
            "convert them"
        )
    configs, spelled = repository.card.get("configs"), set[str]()
    if configs and not folder:  # as in `datasets`, a folder is named instead of the card's files
        files = repository.names
        names, spelled = _names_of_card(
            repo_id, configs, files, subset, split or "train", plain_text
        )
        _check_kinds(repo_id, names, plain_text)
    else:
        names = choose_files(repo_id, _preferred(names), subset, split, folder)
    names = _preferred(names)
    if not repository.is_complete:
        _check_shards(repo_id, [name for name in names if name not in spelled])
    if any(file_kind(name) == "parquet" for name in names):
        require_pyarrow(f"{repo_id}, {names[0]}")
    patterns = [glob.escape(name) for name in names]
    local = download(repo_id, [CARD, *patterns], "dataset", offline)
    if missing := [name for name in names if not (local / name).is_file()]:
        raise UserError(f"{repo_id}: {list_names(missing)} could not be downloaded; try again")
    return [local / name for name in names]


def files_of_card(
    place: str, folder: Path, split: str | None = None, plain_text: bool = False
) -> list[str] | None:
    """The names of the files that the card in a folder gives to a split, "train" by default.

    None if the card names no files, or several subsets without a default. place: see choose_files.
    """
    configs = read_card(folder).get("configs")
    listed = configs if isinstance(configs, list) else []
    configs = [config for config in listed if isinstance(config, dict)]
    configs = (
        [config for config in configs if config.get("default")]
        or [config for config in configs if config.get("config_name", "default") == "default"]
        or configs
    )
    if len(configs) != 1 or not configs[0].get("data_files"):
        return None
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    names, _ = _names_of_card(place, configs, names, None, split or "train", plain_text)
    _check_kinds(place, names, plain_text)
    return _preferred(names)


def _check_kinds(place: str, names: list[str], plain_text: bool) -> None:
    """UserError for files that we do not read."""
    if unknown := [name for name in names if not file_kind(name, plain_text)]:
        raise UserError(f"{place}: minisft cannot read {list_names(unknown)}; convert them")


def _preferred(names: list[str]) -> list[str]:
    """The names of the best kind: parquet if it can be read, then JSON."""
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    order = ["json", "text", "arrow"]
    order.insert(0 if has_pyarrow else len(order), "parquet")
    kinds = {name: file_kind(name, plain_text=True) or "" for name in names}
    best = min(kinds.values(), key=order.index)
    return [name for name, kind in kinds.items() if kind == best]


def _names_of_card(
    repo_id: str,
    configs: Any,
    names: list[str],
    subset: str | None,
    split: str,
    plain_text: bool,
) -> tuple[list[str], set[str]]:
    """The names that the card gives to a subset and a split, and those that it spells out.

    configs: [{"config_name", "data_files", "data_dir", "default"}]; see the hub's documentation of
    "Manual Configuration".
    """
    configs = [config for config in configs if isinstance(config, dict)]
    subsets = [str(config.get("config_name", "default")) for config in configs]
    defaults = [config for config in configs if config.get("default")]
    if subset is None and "default" in subsets and not defaults:
        subset = "default"
    if subset is not None:
        configs = [config for config, name in zip(configs, subsets, strict=True) if name == subset]
    elif len(configs) > 1:
        configs = defaults
    if not configs:
        raise UserError(
            f"{repo_id} has the subsets {list_names(subsets)}; choose one: {repo_id}/{subsets[0]}"
        )
    if not configs[0].get("data_files"):  # as in `datasets`, the file names show the splits
        root = str(configs[0].get("data_dir") or "").strip("/")
        inside = [name for name in names if PurePosixPath(name).is_relative_to(root)]
        readable = [name for name in inside if file_kind(name, plain_text)]
        if not readable:
            raise UserError(f"{repo_id}: there is no parquet or JSON file in {root or 'it'}")
        return choose_files(repo_id, _preferred(readable), None, split, root), set()
    splits = _patterns_of_splits(configs[0])
    if split not in splits:
        raise UserError(
            f"{repo_id} has no split '{split}'; choose one of {list_names(list(splits))}: "
            f"{repo_id}:{next(iter(splits))}"
        )
    patterns = splits[split]
    spelled = {pattern for pattern in patterns if not glob.has_magic(pattern)}
    rows = [name for name in names if name in spelled or not _is_beside_rows(name)]
    chosen = [name for name in rows if any(_matches(name, pattern) for pattern in patterns)]
    missing = sorted(spelled - set(names))
    if missing or not chosen:
        raise UserError(f"{repo_id}: no file matches {list_names(missing or patterns)}")
    return chosen, spelled


def _is_beside_rows(name: str) -> bool:
    """True for a file that a pattern of a card does not mean, as in `datasets`."""
    path = PurePosixPath(name)
    is_hidden = any(part.startswith((".", "__")) for part in path.parts)
    is_metadata = path.name in (*METADATA_FILES, "config.json")
    return is_hidden or is_metadata or path.suffix in ("", ".md", ".py")


def _patterns_of_splits(config: dict[str, Any]) -> dict[str, list[str]]:
    """{split: patterns of file names}"""
    root = str(config.get("data_dir") or "").strip("/")
    prefix = f"{root}/" if root else ""
    files = config["data_files"]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    files = files if isinstance(files, list) else [files]
    splits: dict[str, list[str]] = {}
    for entry in files:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        paths = entry.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        patterns = splits.setdefault(str(entry.get("split") or "train"), [])
        patterns += [prefix + str(path).removeprefix("./") for path in paths]
    return splits


def _matches(name: str, pattern: str) -> bool:
    """True if a pattern of a card matches a name.

    `*` stays inside a folder, `**` does not, and `**/` may be no folder at all.
    """
    parts = re.split(r"(\*\*/?|[*?]|\[[^]]+\])", pattern)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [WILDCARDS.get(part, part.replace("[!", "[^")) for part in parts[1::2]]
    return re.fullmatch("".join(parts), name) is not None


def _check_shards(repo_id: str, names: list[str]) -> None:
    """UserError if a file of a set like train-00001-of-00003 is missing, as in part of a cache."""
    shards: dict[str, set[int]] = {}
    for name in names:
        if match := SHARD.search(name):
            shards.setdefault(f"{name[: match.start()]}-of-{match[2]}", set()).add(int(match[1]))
    for series, numbers in shards.items():
        if len(numbers) < int(series.rpartition("-")[2]):
            raise UserError(
                f"{repo_id}: only {len(numbers)} of the files {series} are in the cache. Download "
                "the data set again"
            )
