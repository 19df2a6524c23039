"""Entries of LLaMA-Factory's dataset_info.json: the files of a data set and names of its columns.

    {"my_data": {"file_name": "qa.json", "columns": {"prompt": "question", "response": "answer"}}}

    entries = read_entries("data")
    description = parse_description("my_data", entries["my_data"], place="dataset_info.json")
    description.rename({"question": "1 + 1?", "answer": "2"})  # {"instruction": ..., "output": ...}

As in LLaMA-Factory, a column that `columns` does not name is absent, whatever the file holds.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.lfs_pointers import refuse_pointer
from minisft.common.words import list_names
from minisft.data.formats import KEPT_FIELDS, PREFERENCE_DATA
from minisft.data.row_values import BadRow
from minisft.text.messages import MEDIA, THOUGHTS

FILE_NAME = "dataset_info.json"
# Roles of columns in an entry -> the column names that formats.py reads.
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
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value", **SPEAKERS}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}
# Fields of a turn that keep their names.
TURN_FIELDS = (*KEPT_FIELDS, *THOUGHTS, *MEDIA, "tool_calls", "function_call")
DEFAULT_TAGS = {"alpaca": SHAREGPT_TAGS, "sharegpt": SHAREGPT_TAGS, "openai": OPENAI_TAGS}
REQUIRED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
ENTRY_KEYS = (
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"),
    *("file_sha1", "formatting", "ranking", "subset", "split", "folder", "num_samples"),
    *("columns", "tags"),
)
PREFERENCE_ROLES = ("chosen", "rejected", "kto_tag")
MEDIA_ROLES = ("images", "videos", "audios")


@dataclass
class Description:
    """The names of columns and speakers in an entry."""

    name: str
    columns: dict[str, str]  # role -> column of the file
    tags: dict[str, str] = field(default_factory=dict)

    def rename(self, record: Any) -> Any:
        """The row with the column and speaker names that formats.py knows, and no other columns."""
        if not isinstance(record, dict):
            return record
        for role in ("prompt", "response", "messages", "chosen", "rejected"):
            column = self.columns.get(role)
            if column is not None and column not in record:
                names = list_names([*map(str, record)], 10) or "none"
                raise BadRow(
                    f"no column '{column}', which {FILE_NAME} names; the columns are {names}"
                )
        renamed = {}
        for role, column in self.columns.items():
            if column in record:
                renamed[COLUMNS[role]] = record[column]
        for column in ("conversations", "chosen", "rejected"):
            turns = renamed.get(column)
            if isinstance(turns, list):
                renamed[column] = [self._rename_turn(turn) for turn in turns]
            elif isinstance(turns, dict) and self.tags["role_tag"] in turns:
                renamed[column] = self._rename_turn(turns)
        return renamed

    def _rename_turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        names = {self.tags[tag]: name for tag, name in SPEAKERS.items() if tag in self.tags}
        if self.tags == OPENAI_TAGS:
            names |= {"developer": "system", "function": "observation"}
        elif self.tags == SHAREGPT_TAGS:
            names |= dict.fromkeys(("chatgpt", "bing", "bard"), "gpt")
        speaker = turn.get(self.tags["role_tag"])
        if not isinstance(speaker, str) or speaker not in names:
            raise BadRow(
                f"unknown speaker {speaker!r}; the tags in {FILE_NAME} are {', '.join(names)}"
            )
        renamed = {"from": names[speaker], "value": turn.get(self.tags["content_tag"])}
        return renamed | {name: turn[name] for name in TURN_FIELDS if name in turn}

    def text(self, record: Any) -> Any:
        """A row of plain text, with the column of role "prompt" renamed to "text"."""
        column = self.columns.get("prompt")
        if column is None:
            raise BadRow(f"{FILE_NAME} describes conversations; --stage pt reads plain text")
        return {"text": record[column]} if isinstance(record, dict) and column in record else record

    def ignored(self, columns: Iterable[str]) -> list[str]:
        """Columns of the file that formats.py could read but the entry does not name, as text."""
        return [
            f"'{known}' (as {role})"
            for role, known in COLUMNS.items()
            if known in columns and role not in self.columns and known not in self.columns.values()
        ]


def read_entries(dataset_dir: str | Path) -> dict[str, Any]:
    """The entries of `dataset_dir`/dataset_info.json; none if there is no such file.

    UserError if dataset_dir is a file.
    """
    if Path(dataset_dir).is_file():
        raise UserError(f"--dataset_dir {dataset_dir} is a file. Give {Path(dataset_dir).parent}/")
    path = Path(dataset_dir) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path}: must be a JSON object, name -> data set")
    return entries


def check_entry(entry: Any, place: str, accepts_preferences: bool) -> None:
    """UserError for an entry that minisft cannot read.

    place: file and name of the entry, for messages.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{place}: must be a JSON object")
    for key in entry.keys() - set(ENTRY_KEYS):
        if close := difflib.get_close_matches(key, ENTRY_KEYS, n=1, cutoff=0.8):
            raise UserError(f"{place}: unknown key '{key}'; did you mean '{close[0]}'?")
    roles = _strings(place, entry, "columns") if "columns" in entry else {}
    has_preferences = bool(entry.get("ranking")) or any(role in roles for role in PREFERENCE_ROLES)
    if "kto_tag" in roles or (has_preferences and not accepts_preferences):
        raise UserError(f"{place}: {PREFERENCE_DATA}")
    if media := [role for role in MEDIA_ROLES if role in roles]:
        raise UserError(f"{place}: has {' and '.join(media)}; minisft reads text only")
    number = entry.get("num_samples")
    if number is not None and (type(number) is not int or number < 1):
        raise UserError(f"{place}: num_samples must be a whole number above 0")


def parse_description(
    name: str, entry: dict[str, Any], place: str, plain_text: bool = False
) -> Description:
    """The Description of an entry. UserError for unknown columns and tags."""
    formatting = str(entry.get("formatting") or "alpaca")
    if formatting not in DEFAULT_COLUMNS:
        raise UserError(
            f"{place}: unknown formatting '{formatting}'; known are {', '.join(DEFAULT_COLUMNS)}"
        )
    columns = DEFAULT_COLUMNS[formatting]
    if "columns" in entry:
        columns = _strings(place, entry, "columns")
    tags = DEFAULT_TAGS[formatting]
    if "tags" in entry:
        # As with columns, a tag that is not named is absent, except for the required tags.
        named = {tag: text for tag, text in _strings(place, entry, "tags").items() if text}
        tags = {tag: tags[tag] for tag in REQUIRED_TAGS} | named
    _check_known(place, "column", columns, COLUMNS)
    _check_known(place, "tag", tags, SHAREGPT_TAGS)
    for role in _required_roles(formatting, columns, plain_text):
        if columns.get(role) is None:
            hint = "; text without answers is for --stage pt" if role == "response" else ""
            raise UserError(f"{place}: columns must name '{role}'{hint}")
    used = ("prompt", "query", "response", "history") if formatting == "alpaca" else ("messages",)
    used = (*used, "system", "tools", "chosen", "rejected")
    columns = {role: text for role, text in columns.items() if text is not None and role in used}
    return Description(name, columns, tags)


def _required_roles(formatting: str, columns: dict[str, str], plain_text: bool) -> tuple[str, ...]:
    answers = ("chosen", "rejected") if {"chosen", "rejected"} & columns.keys() else ()
    if formatting != "alpaca":
        return ("messages", *answers)
    if plain_text:
        return ("prompt",)
    return ("prompt", *(answers or ("response",)))


def _check_known(place: str, kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{place}: unknown {kind} '{name}'; known are {', '.join(known)}")


def _strings(place: str, entry: dict[str, Any], key: str) -> dict[str, str]:
    """The object of strings (or nulls) in an entry's key."""
    value = entry[key]
    if not isinstance(value, dict) or not all(
        text is None or isinstance(text, str) for text in value.values()
    ):
        raise UserError(f"{place}: {key} must be an object of strings")
    return value
