"""What `--dataset` names: files, folders, entries of LLaMA-Factory's dataset_info.json.

    for source in find_sources("alpaca_en_demo,more.jsonl,folder", dataset_dir="data"):
        print(source.name, source.paths, source.description)

    {"my_data": {"file_name": "qa.json", "columns": {"prompt": "question", "response": "answer"}}}

An entry says where the rows are and what their columns and speakers are called. As in
LLaMA-Factory, a column that `columns` does not name is absent, whatever the file holds.
"""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from minisft.common.errors import UserError
from minisft.data.formats import PREFERENCE_DATA, BadRow

FILE_NAME = "dataset_info.json"
# What the columns of an entry are called here, in the terms of formats.py.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
}
DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
SPEAKERS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
DEFAULT_TAGS = {
    "sharegpt": {"role_tag": "from", "content_tag": "value", **SPEAKERS},
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "system_tag": "system",
    },
}
DEFAULT_TAGS["alpaca"] = DEFAULT_TAGS["sharegpt"]
NEEDED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
ENTRY_KEYS = (
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"),
    *("file_sha1", "formatting", "ranking", "subset", "split", "folder", "num_samples"),
    *("columns", "tags"),
)
JUDGED = ("chosen", "rejected", "kto_tag")
MEDIA = ("images", "videos", "audios")
# Files of a downloaded data set that describe it and hold no rows.
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = {  # what the files of a split have in their names
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass
class Source:
    """A data set: its files, how to read their columns, and how many rows to take."""

    name: str
    paths: list
    description: "Description | None" = None
    num_samples: int | None = None


@dataclass
class Description:
    """The names that an entry gives to columns and speakers."""

    name: str
    columns: dict
    tags: dict = field(default_factory=dict)

    def rename(self, record):
        """A row with the columns and speakers that formats.py knows, and no others."""
        if not isinstance(record, dict):
            return record
        missing = [
            self.columns[role]
            for role in ("prompt", "response", "messages", "chosen", "rejected")
            if role in self.columns and self.columns[role] not in record
        ]
        if missing:
            found = ", ".join(map(str, record)) or "none"
            raise BadRow(
                f"there is no column '{missing[0]}', which {FILE_NAME} names; "
                f"the columns are {found}"
            )
        renamed = {
            COLUMNS[role]: record[column]
            for role, column in self.columns.items()
            if column in record
        }
        for column in ("conversations", "chosen", "rejected"):
            turns = renamed.get(column)
            if isinstance(turns, list):
                renamed[column] = [self._turn(turn) for turn in turns]
            elif isinstance(turns, dict):
                renamed[column] = self._turn(turns)
        return renamed

    def text(self, record):
        """A row of plain text: its column "prompt" as the column "text"."""
        column = self.columns.get("prompt")
        if column is None:
            raise BadRow(f"{FILE_NAME} describes conversations, which --stage pt does not read")
        return {"text": record[column]} if isinstance(record, dict) and column in record else record

    def unread(self, columns):
        """Of a file's columns those that would be read, had the entry named them."""
        return [
            f"'{known}' (as {role})"
            for role, known in COLUMNS.items()
            if known in columns and role not in self.columns and known not in self.columns.values()
        ]

    def _turn(self, turn):
        role, content = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(turn, dict):
            return turn
        speakers = {self.tags[tag]: name for tag, name in SPEAKERS.items() if tag in self.tags}
        speaker = turn.get(role)
        if not isinstance(speaker, str) or speaker not in speakers:
            raise BadRow(
                f"the speaker {speaker!r} is none of {', '.join(speakers)}, which {FILE_NAME} names"
            )
        calls = {"tool_calls": turn["tool_calls"]} if turn.get("tool_calls") else {}
        return {"from": speakers[speaker], "value": turn.get(content), **calls}


def find_sources(dataset, dataset_dir="data", plain_text=False, ranking=False):
    """The data sets that `--dataset` names, separated by commas -> list of Source.

    A name is a file, else an entry of `dataset_dir`/dataset_info.json, else a folder. plain_text:
    for --stage pt, where .txt files of a folder count too. ranking: for --stage rm and dpo.
    UserError says what a name that is none of these may have meant.
    """
    sources = []
    for name in filter(None, map(str.strip, str(dataset).split(","))):
        entries = {} if Path(name).is_file() else _entries(dataset_dir)
        if Path(name).is_file():
            sources.append(Source(name, [Path(name)]))
        elif name in entries:
            sources.append(_registered(name, entries[name], Path(dataset_dir), plain_text, ranking))
        elif Path(name).is_dir():
            sources.append(Source(name, data_files(name, plain_text)))
        else:
            raise UserError(f"{name}: there is no such file{_meant(name, entries)}")
    if not sources:
        raise UserError("--dataset names no file")
    return sources


def data_files(folder, plain_text=False):
    """The files of rows in a folder and those below it, in the order of their names."""
    endings = (".json", ".jsonl", ".txt") if plain_text else (".json", ".jsonl")
    folder = Path(folder)
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in endings
        and path.name not in ABOUT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise UserError(f"{folder}: is a folder with no {', '.join(endings)} file in it")
    return paths


# An entry -> a Source


def _entries(dataset_dir):
    path = Path(dataset_dir) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path}: must be an object of named data sets")
    return entries


def _meant(name, entries):
    files = [name + ending for ending in (".json", ".jsonl") if Path(name + ending).is_file()]
    if files:
        return f" or folder; did you mean {' or '.join(files)}?"
    close = difflib.get_close_matches(name, entries, n=3)
    if close:
        return f", and {FILE_NAME} has none of this name; did you mean {' or '.join(close)}?"
    return f" or folder, and no data set of this name in {FILE_NAME} (see --dataset_dir)"


def _registered(name, entry, dataset_dir, plain_text, ranking):
    place = f"{dataset_dir / FILE_NAME}, {name}"
    if not isinstance(entry, dict):
        raise UserError(f"{place}: must be an object")
    for key in entry.keys() - set(ENTRY_KEYS):
        if close := difflib.get_close_matches(key, ENTRY_KEYS, n=1, cutoff=0.8):
            raise UserError(f"{place}: unknown key '{key}'; did you mean '{close[0]}'?")
    columns = _object(place, entry, "columns") if "columns" in entry else None
    judged = [role for role in JUDGED if role in (columns or {})]
    if "kto_tag" in judged or (entry.get("ranking") or judged) and not ranking:
        raise UserError(f"{place}: {PREFERENCE_DATA}")
    if media := [role for role in MEDIA if role in (columns or {})]:
        raise UserError(f"{place}: has {' and '.join(media)}; only text is learned here")
    number = entry.get("num_samples")
    if number is not None and (type(number) is not int or number < 1):
        raise UserError(f"{place}: num_samples must be a whole number above zero")
    description = _description(name, place, entry, columns, plain_text)
    paths = _paths(place, entry, dataset_dir, plain_text)
    if entry.get("file_sha1"):
        _check_sha1(place, paths, entry["file_sha1"])
    return Source(name, paths, description, number)


def _description(name, place, entry, columns, plain_text):
    """The Description of an entry; UserError for names that mean nothing in it."""
    formatting = str(entry.get("formatting") or "alpaca")
    if formatting not in DEFAULT_COLUMNS:
        raise UserError(
            f"{place}: formatting '{formatting}' is none of {', '.join(DEFAULT_COLUMNS)}"
        )
    if columns is None:
        columns = DEFAULT_COLUMNS[formatting]
    tags = DEFAULT_TAGS[formatting]
    if "tags" in entry:
        # As with columns, one that is not named is absent; but these there must be.
        given = {tag: text for tag, text in _object(place, entry, "tags").items() if text}
        tags = {tag: tags[tag] for tag in NEEDED_TAGS} | given
    for kind, given, known in (
        ("column", columns, COLUMNS),
        ("tag", tags, DEFAULT_TAGS["sharegpt"]),
    ):
        for key in given.keys() - known.keys():
            raise UserError(f"{place}: unknown {kind} '{key}'; known are {', '.join(known)}")
    answers = ("chosen", "rejected") if {"chosen", "rejected"} & columns.keys() else ()
    needed = ("messages", *answers)
    if formatting == "alpaca":
        needed = ("prompt",) if plain_text else ("prompt", *(answers or ("response",)))
    for role in needed:
        if columns.get(role) is None:
            hint = "; text without answers is for --stage pt" if role == "response" else ""
            raise UserError(f"{place}: columns must name '{role}'{hint}")
    used = ("prompt", "query", "response", "history") if formatting == "alpaca" else ("messages",)
    columns = {
        role: column
        for role, column in columns.items()
        if column is not None and role in (*used, "system", "tools", "chosen", "rejected")
    }
    return Description(name, columns, tags)


def _object(place, entry, key):
    """The object of strings (or nulls) in an entry's key."""
    value = entry[key]
    if not isinstance(value, dict) or not all(
        text is None or isinstance(text, str) for text in value.values()
    ):
        raise UserError(f"{place}: {key} must be an object of strings")
    return value


def _paths(place, entry, dataset_dir, plain_text):
    """The files of an entry, downloaded if it names a data set on the hub."""
    named = {key: value for key, value in entry.items() if key.endswith(("_url", "_name"))}
    for key, value in named.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{place}: {key} must be a name")
    if "hf_hub_url" in named:
        folder = _download(place, named["hf_hub_url"], plain_text)
    elif "ms_hub_url" in named or "om_hub_url" in named:
        raise UserError(
            f"{place}: is on ModelScope or OpenMind only; download it and give its "
            "place as file_name"
        )
    elif "script_url" in named:
        raise UserError(
            f"{place}: script_url is refused, because it would run the data set's "
            "code; download the rows and give their place as file_name"
        )
    elif "cloud_file_name" in named:
        raise UserError(
            f"{place}: cloud_file_name is not supported; download the file and give "
            "its place as file_name"
        )
    elif "file_name" not in named:
        raise UserError(f"{place}: names neither file_name nor hf_hub_url")
    else:
        folder = dataset_dir / named["file_name"]
        if folder.is_file():
            if (entry.get("split") or "train") != "train":
                raise UserError(f"{place}: a single file has no split '{entry['split']}'")
            return [folder]
        if not folder.is_dir():
            raise UserError(f"{place}: there is no file {folder}")
    return _chosen_files(place, folder, entry, plain_text)


def _chosen_files(place, root, entry, plain_text):
    """The files in `root` that belong to the entry's folder, subset and split."""
    try:
        paths = data_files(root / str(entry.get("folder") or ""), plain_text)
    except UserError as error:
        raise UserError(f"{place}: {error}; other kinds of file must be converted first") from error
    words = {path: _words(path.relative_to(root)) for path in paths}
    if subset := entry.get("subset"):
        among = [path for path in paths if _words(subset) <= words[path]]
        if not among and subset != "default":
            raise UserError(f"{place}: no file for the subset '{subset}' among {_names(paths)}")
        paths = among or paths
    split = str(entry.get("split") or "train")
    among = [path for path in paths if _in_split(words[path], split)]
    named = any(_in_split(words[path], one) for path in paths for one in SPLITS)
    if not among and (named or split != "train"):
        raise UserError(f"{place}: no file for the split '{split}' among {_names(paths)}")
    return among or paths


def _words(name):
    return set(re.findall("[a-z0-9]+", str(name).lower()))


def _in_split(words, split):
    return bool(SPLITS[split] & words) if split in SPLITS else _words(split) <= words


def _names(paths):
    return ", ".join(path.name for path in paths[:5]) + (", ..." if len(paths) > 5 else "")


def _download(place, repo_id, plain_text):
    """The local copy of the JSON (and text) files of a data set on the hub."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jsonl", *(["*.txt"] if plain_text else [])]
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # of many libraries below
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place}: {repo_id} could not be had from the hub ({reason}); download "
            "it and give its place as file_name"
        ) from error


def _check_sha1(place, paths, expected):
    if len(paths) != 1:
        raise UserError(f"{place}: file_sha1 is of one file, and there are {len(paths)}")
    with open(paths[0], "rb") as file:
        found = hashlib.file_digest(file, "sha1").hexdigest()
    if found != str(expected).lower():
        raise UserError(
            f"{place}: {paths[0]} has the SHA-1 {found}, not {expected}; it is not "
            "the file that was meant, or it is damaged"
        )
