"""Read files of any supported format as rows: conversations, or plain texts.

    rows = open_rows("alpaca_en_demo,more.jsonl", dataset_dir="data")
    print(len(rows), rows[0].messages)          # [{"role": "user", "content": ...}, ...]

Rows are read when they are needed. formats.py lists the columns, sources.py what `--dataset` may
name. A broken row is an error that names file and row, unless the caller asks to skip such rows.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.common.option_types import parse_replacements
from minisft.common.words import list_names
from minisft.data.dataset_info import Description
from minisft.data.formats import Messages, Tools, parse_conversation, parse_text
from minisft.data.ignored_columns import ignored_columns
from minisft.data.placeholders import (
    PlaceholderNote,
    fill_in,
    find_placeholders,
    name_of,
    unused_note,
)
from minisft.data.preferences import has_several_answers, parse_preferences
from minisft.data.records import Records, open_records
from minisft.data.row_forms import check_label, standard_record
from minisft.data.row_values import BadRow
from minisft.data.sources import find_sources
from minisft.text.long_texts import check_text

# Files up to this size are checked completely before training, larger files in their first rows.
CHECKED_BYTES, CHECKED_ROWS = 64 * 2**20, 1000
PrintLine = Callable[[str], Any]


@dataclass
class Row:
    """One example: a conversation that ends with the assistant, and where it came from."""

    messages: Messages
    tools: Tools = None
    source: str = ""
    index: int = 0  # in its file, from 0, broken rows included
    rejected: list[Messages] = field(default_factory=list)  # the other answers, best first
    changes: list[str] = field(default_factory=list)  # notes on changes by the parser: "have ..."


@dataclass
class RowFile:
    """The records of a file, and how to parse a record: into a Row, or a str for plain text."""

    records: Records
    description: Description | None
    plain_text: bool = False
    ranking: bool | None = False  # as in open_rows
    values: Mapping[str, str] = field(default_factory=dict)  # of placeholders
    names: set[str] = field(default_factory=set)  # of the placeholders, if there are values

    def read(self, index: int) -> Row | str:
        """The row of a record. BadRow names file and row."""
        path, changes = self.records.path, []
        try:
            record = self.records[index]
            if self.values:
                record = fill_in(record, self.values)
            if self.plain_text:
                return self._text(record)
            columns = self.description.columns.values() if self.description else None
            check_label(record, changes, columns)
            if self.description:
                record = self.description.rename(record)
            record = standard_record(record, changes)
            if self.ranking or (self.ranking is None and has_several_answers(record)):
                (best, *rejected), tools = parse_preferences(record, changes)
                return Row(best, tools, str(path), index, rejected, changes)
            messages, tools = parse_conversation(record, changes)
            return Row(messages, tools, str(path), index, changes=changes)
        except BadRow as error:
            raise BadRow(f"{path}, {self.records.place(index)}: {error}") from error

    def _text(self, record: Any) -> str:
        if self.records.is_json:
            record = parse_text(self.description.text(record) if self.description else record)
        try:
            check_text(record)
        except UserError as error:
            raise BadRow(str(error)) from error
        return record


class Rows(Sequence):
    """A sequence of Row, or of str for plain text, each read from its file when it is needed.

    A broken row raises BadRow, which names file and row. Slices and `select` read nothing.
    numbers: row numbers, counted through all files; None for all. skip_bad_rows: readers leave
    broken rows out.
    """

    def __init__(
        self, files: list[RowFile], numbers: np.ndarray | None = None, skip_bad_rows: bool = False
    ) -> None:
        self.files, self.numbers, self.skip_bad_rows = files, numbers, skip_bad_rows
        self.ends = np.cumsum([len(file.records) for file in files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.numbers is None else len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return self if number == slice(None) else self.select(np.arange(len(self))[number])
        number = range(len(self))[number]
        if self.numbers is not None:
            number = int(self.numbers[number])
        file_number = int(np.searchsorted(self.ends, number, side="right"))
        file = self.files[file_number]
        return file.read(number - int(self.ends[file_number]) + len(file.records))

    def select(self, numbers: Iterable[int] | np.ndarray) -> "Rows":
        """The rows of these numbers, in this order; a number may appear several times."""
        numbers = np.asarray(numbers, np.int64)
        numbers = numbers if self.numbers is None else self.numbers[numbers]
        return Rows(self.files, numbers, self.skip_bad_rows)

    def sizes(self) -> np.ndarray:
        """Bytes of each row in its file (N,)."""
        sizes = np.concatenate([file.records.sizes() for file in self.files])
        return sizes if self.numbers is None else sizes[self.numbers]

    def __add__(self, other: "Rows") -> "Rows":
        """These rows, then those of `other`."""
        if self.numbers is None and other.numbers is None:
            return Rows(self.files + other.files, None, self.skip_bad_rows)
        first = np.arange(len(self)) if self.numbers is None else self.numbers
        second = np.arange(len(other)) if other.numbers is None else other.numbers
        numbers = np.concatenate([first, second + self.ends[-1]])
        return Rows(self.files + other.files, numbers, self.skip_bad_rows)


def open_rows(
    dataset: Any,
    dataset_dir: Any = "data",
    plain_text: bool = False,
    ranking: bool | None = False,
    skipped: list[str] | None = None,
    seed: int = 0,
    say: PrintLine = print,
    max_samples: int | None = None,
    offline: bool = False,
    replace: str | None = None,
    replace_flag: str | None = "--replace",
) -> Rows:
    """The rows of the data sets that `dataset` names (see sources.py), in their order.

    plain_text: texts for --stage pt, each line of a .txt file and each "text" of a JSON file.
    ranking: True for rows with several answers, for --stage rm and dpo; None for rows of both
    kinds. skipped: a list that collects a message for each broken row, which is then left out;
    without it the first broken row raises UserError. Files above CHECKED_BYTES are checked as they
    are read. seed: for the rows drawn where an entry has num_samples. say: prints a line.
    max_samples: use the first N rows of each data set. offline: download nothing.
    replace: values of placeholders, such as "name=Pebble". replace_flag: advised without them; None
    leaves the warning about placeholders to the caller.
    """
    parts, values = [], parse_replacements(replace)
    for source in find_sources(dataset, dataset_dir, plain_text, ranking is not False, offline):
        files = []
        if source.left_out:
            say(
                f"{source.name}: only the files of the split train are read, not "
                f"{list_names(source.left_out)}; {source.name}:SPLIT names another"
            )
        for path in source.paths:
            records = open_records(path, plain_text)
            files.append(RowFile(records, source.description, plain_text, ranking, values))
        checked, limit = [], None if source.num_samples else max_samples
        for file in files:
            checked.append(_checked(file, skipped, say, replace_flag, limit))
            limit = limit if limit is None else max(0, limit - len(checked[-1]))
        rows = concatenate(checked)
        if not plain_text:
            for file in files:
                if note := ignored_columns(source, file.records, file.ranking):
                    say(note)
        if source.num_samples:
            rows = rows.select(_sample(source.name, len(rows), source.num_samples, seed, say))
        parts.append(rows[:max_samples])
    return concatenate(parts)


def load_rows(dataset: Any, skipped: list[str] | None = None, **options: Any) -> list[Any]:
    """The rows of `open_rows` as a list."""
    return read(open_rows(dataset, skipped=skipped, **options), skipped)


def read(
    rows: Rows | Sequence[Any], skipped: list[str] | None, numbers: Iterable[int] | None = None
) -> list[Any]:
    """The rows, or those of these numbers, as a list.

    skipped: collects the message of each broken row, if the rows were opened with
    skip_bad_rows; otherwise a broken row raises UserError.
    """
    good = []
    for number in range(len(rows)) if numbers is None else numbers:
        try:
            good.append(rows[number])
        except BadRow as error:
            if skipped is None or not getattr(rows, "skip_bad_rows", False):
                raise UserError(f"{error} (--skip_bad_rows leaves such rows out)") from error
            skipped.append(str(error))
    return good


def split(rows: Rows, validation: float, seed: int) -> tuple[Rows, Rows]:
    """Set rows aside at random: (training rows, validation rows), both in file order.

    validation: below 1 a fraction of the rows, else their number.
    """
    count = round(validation * len(rows)) if validation < 1 else validation
    if not 0 < count < len(rows) or count != int(count):
        raise UserError(
            f"--validation_split {validation:,} of {len(rows)} rows: give a fraction below 1 or a "
            "whole number that leaves rows on both sides"
        )
    chosen = sorted(random.Random(seed).sample(range(len(rows)), int(count)))
    return rows.select(np.delete(np.arange(len(rows)), chosen)), rows.select(chosen)


def mix(rows: Rows, mixture: str, seed: int = 0, say: PrintLine = print, **options: Any) -> Rows:
    """Add rows of a general data set, to make up a given share of the result.

    mixture: "FILE:RATIO"; FILE is anything that --dataset accepts. Ratios of 0.15 to 0.3 are usual
    against forgetting. Rows are drawn at random; none repeats before all are used.
    options: those of open_rows.
    """
    name, _, ratio = mixture.rpartition(":")
    try:
        share = float(ratio)
    except ValueError:
        share = 0.0
    count = round(len(rows) * share / (1 - share)) if 0 < share < 1 else 0
    if not name or not count:
        raise UserError(
            f"--mix {mixture}: give FILE:RATIO, such as general.json:0.2. The ratio is between 0 "
            f"and 1, and must add at least one row to the {len(rows)}"
        )
    if re.search(r":[0-9.]+,", name):
        names = re.sub(r":[0-9.]+,", ",", name)
        raise UserError(
            f"--mix {mixture}: there is one ratio, of all files together. Give {names}:RATIO."
        )
    general = open_rows(name, seed=seed, say=say, **options)
    say(f"mixed in {count} rows of {name} to {len(rows)}")
    return rows + general.select(_sample(name, len(general), count, seed, say))


def concatenate(parts: list[Rows]) -> Rows:
    """The rows of all parts, in order."""
    return sum(parts[1:], start=parts[0])


def unused_values(files: Sequence[RowFile]) -> str:
    """A warning about values of `replace` that no row needs; empty if there are none."""
    is_complete = all(file.records.size <= CHECKED_BYTES for file in files)
    searched = "no row" if is_complete else f"none of the first {CHECKED_ROWS:,} rows of a file"
    return unused_note(files[0].values, set().union(*(file.names for file in files)), searched)


def _checked(
    file: RowFile,
    skipped: list[str] | None,
    say: PrintLine,
    replace_flag: str | None,
    limit: int | None,
) -> Rows:
    """The rows of a file. Checks them, leaves out broken and blank rows, and says what changed.

    limit: only the first of a small file; None for all.
    """
    records, rows, good, broken = file.records, Rows([file], None, skipped is not None), [], []
    if limit == 0:
        return rows.select([])
    changes, placeholders = Counter[str](), PlaceholderNote()
    is_small = records.size <= CHECKED_BYTES
    num_checked = len(rows) if is_small else min(len(rows), CHECKED_ROWS)
    for number in range(num_checked):
        try:
            row = rows[number]
        except BadRow as error:
            broken.append(str(error))
        else:
            if file.values:
                file.names.update(map(name_of, find_placeholders(records[number])))
            if isinstance(row, Row):
                changes.update(row.changes)
                placeholders.add(row.messages, f"{records.path}, {records.place(number)}")
            if isinstance(row, Row) or row.strip():
                good.append(number)
        if len(good) == limit:
            break
    if not good:
        what = "texts" if file.plain_text else "rows"
        raise UserError(broken[0] if broken else f"{records.path}: the file has no {what}")
    if broken and skipped is None:
        share = f"{len(broken)} of {len(good) + len(broken)} rows broken"
        raise UserError(f"{broken[0]} ({share}; --skip_bad_rows leaves them out)")
    num_read = len(good) + len(broken)
    num_rows = f"{len(good)} rows" if is_small else f"the first {num_read:,} rows"
    for change, count in changes.items():
        say(f"{records.path}: {count} of {num_rows} {change}")
    if replace_flag and (note := placeholders.line(num_rows, replace_flag)):
        say(note)
    if not is_small or len(good) == len(rows):
        return rows
    if skipped is not None:
        skipped.extend(broken)
    return rows.select(good)


def _sample(name: str, total: int, count: int, seed: int, say: PrintLine) -> np.ndarray:
    """`count` random row numbers below `total`; none repeats before all are used."""
    rounds, rest = divmod(count, total)
    if rounds and count > total:
        say(f"{name} has only {total} rows; rows are repeated to make {count}")
    chosen = np.random.default_rng(seed).choice(total, rest, replace=False)
    return np.concatenate([np.tile(np.arange(total), rounds), np.sort(chosen)])
