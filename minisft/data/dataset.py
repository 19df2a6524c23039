"""Files in any supported format -> rows: conversations to learn from, or texts to read.

    rows = open_rows("alpaca_en_demo,more.jsonl", dataset_dir="data")
    print(len(rows), rows[0].messages)  # [{"role": "user", "content": ...}, ...]


Rows are read when they are asked for: of JSON lines only the offsets are held in memory, so that a
file may be larger than it. `formats.py` lists the columns that are known, `dataset_info.py` what
`--dataset` may name. A row that cannot be learned from is an error which names the file and the
row, unless the caller asks for such rows to be left out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minisft.common.errors import UserError
from minisft.data.dataset_info import FILE_NAME, find_sources
from minisft.data.formats import JUDGED, BadRow, conversation, ranking, text_of
from minisft.data.records import open_records

# Files up to this size are checked whole before training begins, of others the first rows.
CHECKED_BYTES, CHECKED_ROWS = 64 * 2**20, 1000


@dataclass
class Row:
    """One example: a conversation that ends with the assistant, and where it came from."""

    messages: list[dict]
    tools: list | None = None
    source: str = ""
    index: int = 0  # in its file, from 0, counting broken rows too
    rejected: list = field(default_factory=list)  # conversations with the other answers, best first


class Rows(Sequence):
    """A sequence of Row, or of str for plain text, each read from its file when asked for.

    A broken row raises BadRow, which names file and row; with `skip_bad_rows` the reader is meant
    to leave it out. Slices and `select` give another such sequence and read nothing.
    """

    def __init__(self, files, numbers=None, skip_bad_rows=False):
        self.files = files  # list of _File
        self.numbers = numbers  # array of row numbers, counted through all files; None: all rows
        self.skip_bad_rows = skip_bad_rows
        self.ends = np.cumsum([len(file.records) for file in files], dtype=np.int64)

    def __len__(self):
        return int(self.ends[-1]) if self.numbers is None else len(self.numbers)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return self if number == slice(None) else self.select(np.arange(len(self))[number])
        number = range(len(self))[number]
        if self.numbers is not None:
            number = int(self.numbers[number])
        file_number = int(np.searchsorted(self.ends, number, side="right"))
        file = self.files[file_number]
        return file.read(number - int(self.ends[file_number]) + len(file.records))

    def select(self, numbers):
        """The rows of these numbers, in this order; a number may come several times."""
        numbers = np.asarray(numbers, np.int64)
        numbers = numbers if self.numbers is None else self.numbers[numbers]
        return Rows(self.files, numbers, self.skip_bad_rows)

    def sizes(self):
        """Bytes of each row in its file."""
        sizes = np.concatenate([file.records.sizes() for file in self.files])
        return sizes if self.numbers is None else sizes[self.numbers]

    def __add__(self, other):
        """These rows and then those of `other`."""
        if self.numbers is None and other.numbers is None:
            return Rows(self.files + other.files, None, self.skip_bad_rows)
        first, second = (
            np.arange(len(rows)) if rows.numbers is None else rows.numbers for rows in (self, other)
        )
        numbers = np.concatenate([first, second + self.ends[-1]])
        return Rows(self.files + other.files, numbers, self.skip_bad_rows)


@dataclass
class _File:
    """The records of a file and how to make a Row, or of plain text a str, of one."""

    records: object
    description: object  # of its columns, or None
    plain_text: bool = False
    ranking: bool | None = False  # as open_rows has it

    def read(self, index):
        """The Row (or str) of a record; BadRow names file and row."""
        path = self.records.path
        try:
            record = self.records[index]
            if self.plain_text:
                return self._text(record)
            if self.description:
                record = self.description.rename(record)
            if self.ranking or self.ranking is None and _has_several(record):
                (best, *rejected), tools = ranking(record)
                return Row(best, tools, str(path), index, rejected)
            return Row(*conversation(record), source=str(path), index=index)
        except BadRow as error:
            raise BadRow(f"{path}, {self.records.place(index)}: {error}") from error

    def _text(self, record):
        if not self.records.is_json:
            return record
        return text_of(self.description.text(record) if self.description else record)


def _has_several(record):
    """Whether a row has answers to compare, and not a single one."""
    return isinstance(record, dict) and (
        record.keys() >= JUDGED
        or ("instruction" in record and isinstance(record.get("output"), list))
    )


def open_rows(
    dataset, dataset_dir="data", plain_text=False, ranking=False, skipped=None, seed=0, say=print
):
    """The rows of the data sets that `dataset` names (see dataset_info.py), in their order.

    plain_text: texts for --stage pt, each line of a .txt file and each "text" of a JSON file.
    ranking: rows with several answers, for --stage rm and dpo; `Row.rejected` has all but the best.
    None: such rows, and those with one answer.
    skipped: a list to which a message goes for each broken row, which is then left out; without it
    the first one is a UserError. Files above CHECKED_BYTES are only checked as they are read.
    seed: of the choice of rows where an entry asks for a number of them. say: told what is special.
    """
    parts = []
    for source in find_sources(dataset, dataset_dir, plain_text, ranking is not False):
        files = [
            _File(open_records(path, plain_text), source.description, plain_text, ranking)
            for path in source.paths
        ]
        rows = sum_of(
            [_checked(Rows([file], None, skipped is not None), skipped) for file in files]
        )
        if not plain_text:
            _tell_unread(source, files, say)
        if source.num_samples:
            rows = rows.select(_sample(source.name, len(rows), source.num_samples, seed, say))
        parts.append(rows)
    return sum_of(parts)


def load_rows(dataset, skipped=None, **options):
    """`open_rows`, all of them read into a list; of plain text, str."""
    return read(open_rows(dataset, skipped=skipped, **options), skipped)


def read(rows, skipped, numbers=None):
    """The rows (of these numbers) as a list.

    Broken ones are UserErrors, or left out and told of in `skipped` if so `rows` were opened.
    """
    good = []
    for number in range(len(rows)) if numbers is None else numbers:
        try:
            good.append(rows[number])
        except BadRow as error:
            if not rows.skip_bad_rows:
                raise UserError(f"{error} (--skip_bad_rows leaves such rows out)") from error
            skipped.append(str(error))
    return good


def split(rows, validation, seed):
    """Set rows aside at random -> (training rows, validation rows), both in their old order.

    `validation` below 1 is the fraction of the rows, from 1 on their number.
    """
    count = round(validation * len(rows)) if validation < 1 else validation
    if not 0 < count < len(rows) or count != int(count):
        raise UserError(
            f"--validation_split {validation} of {len(rows)} rows: give a fraction below 1 or a "
            "whole number, such that rows are left on both sides"
        )
    chosen = sorted(random.Random(seed).sample(range(len(rows)), int(count)))
    return rows.select(np.delete(np.arange(len(rows)), chosen)), rows.select(chosen)


def mix(rows, mixture, seed=0, say=print, **options):
    """Blend general data in -> Rows of which a share comes from it.

    mixture: "FILE:RATIO", anything that --dataset names and the share of it in the result; 0.15 to
    0.3 is the usual advice against forgetting. The rows are drawn at random, each once as long as
    they last. options: those of `open_rows`.
    """
    name, _, ratio = mixture.rpartition(":")
    try:
        count = round(len(rows) * float(ratio) / (1 - float(ratio))) if 0 < float(ratio) < 1 else 0
    except ValueError:
        count = 0
    if not name or not count:
        raise UserError(
            f"--mix {mixture}: must be FILE:RATIO with a ratio between 0 and 1 that "
            f"comes to at least one row beside {len(rows)}"
        )
    general = open_rows(name, seed=seed, say=say, **options)
    say(f"mixed in {count} rows of {name} to {len(rows)}")
    return rows + general.select(_sample(name, len(general), count, seed, say))


def sum_of(parts):
    """Several Rows as one."""
    return sum(parts[1:], start=parts[0])


def _checked(rows, skipped):
    """The rows of one file, without those known to be broken or blank."""
    records, good, broken = rows.files[0].records, [], []
    whole = records.size <= CHECKED_BYTES
    for number in range(len(rows) if whole else min(len(rows), CHECKED_ROWS)):
        try:
            row = rows[number]
        except BadRow as error:
            broken.append(str(error))
        else:
            if isinstance(row, Row) or row.strip():
                good.append(number)
    if not good:
        what = "text" if rows.files[0].plain_text else "row"
        raise UserError(broken[0] if broken else f"{records.path}: there is no {what} in it")
    if broken and skipped is None:
        share = f"{len(broken)} of {len(good) + len(broken)} rows broken"
        raise UserError(f"{broken[0]} ({share}; --skip_bad_rows leaves them out)")
    if not whole or len(good) == len(rows):
        return rows
    if broken:
        skipped.extend(broken)
    return rows.select(good)


def _sample(name, total, count, seed, say):
    """`count` row numbers below `total` at random, none once more before all have come."""
    rounds, rest = divmod(count, total)
    if rounds and count > total:
        say(f"{name}: has only {total} rows; to make {count}, rows are repeated")
    chosen = np.random.default_rng(seed).choice(total, rest, replace=False)
    return np.concatenate([np.tile(np.arange(total), rounds), np.sort(chosen)])


def _tell_unread(source, files, say):
    """Name columns of the rows that are not read: left out by the entry, or for another stage."""
    for file in files:
        records = file.records
        columns = set()
        for number in range(min(100, len(records))):
            try:
                record = records[number]
            except BadRow:
                continue
            columns |= set(record) if isinstance(record, dict) else set()
        hint = "train.py --stage rm and dpo learn from chosen and rejected"
        compared = columns >= JUDGED and not file.ranking
        if unread := source.description and source.description.unread(columns):
            say(
                f"{source.name}: {records.path} has {', '.join(unread)}, which columns in "
                f"{FILE_NAME} does not name, so it is not read{f'; {hint}' * compared}"
            )
        elif compared:
            say(f"{records.path}: of each row only its one answer is read; {hint}")
