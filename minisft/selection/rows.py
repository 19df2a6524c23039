"""The rows that score.py and select.py work on, numbered as in their files."""

from collections.abc import Callable

import numpy as np

from minisft.common.errors import UserError
from minisft.data.dataset import Row, Rows, open_rows, unused_values
from minisft.data.placeholders import PlaceholderNote
from minisft.data.row_values import BadRow
from minisft.data.sources import find_sources
from minisft.selection.strategies import at_random
from minisft.text.messages import is_learned

# How the reason begins why a row is not among those that train.py would use.
LEFT_OUT = "left out by"
# Draws the rows of num_samples as train.py does by default.
SEED = 42


def open_every_row(
    dataset: str,
    dataset_dir: str,
    skip_bad_rows: bool,
    with_rankings: bool,
    max_samples: int | None = None,
    say: Callable[[str], None] = print,
    replace: str | None = None,
    replace_flag: str | None = "--replace",
) -> tuple[Rows, np.ndarray]:
    """(all rows of the files, bool (rows,): True for those that train.py would use).

    The others are broken, or max_samples or num_samples in dataset_info.json leaves them out.
    with_rankings: accept rows with several answers. replace, replace_flag: see open_rows.
    """
    skipped = [] if skip_bad_rows else None
    ranking = None if with_rankings else False
    used = open_rows(
        dataset,
        dataset_dir,
        ranking=ranking,
        skipped=skipped,
        seed=SEED,
        say=say,
        max_samples=max_samples,
        replace=replace,
        replace_flag=replace_flag,
    )
    if note := unused_values(used.files):
        say(note)
    rows = Rows(used.files, None, used.skip_bad_rows)
    is_drawn = np.full(len(rows), used.numbers is None)
    if used.numbers is not None:
        is_drawn[used.numbers] = True
    return rows, is_drawn


def left_out_by(dataset: str, dataset_dir: str, max_samples: int | None) -> str:
    """What leaves out the rows that open_every_row does not draw."""
    if not max_samples:
        return f"{LEFT_OUT} num_samples"
    sources = find_sources(dataset, dataset_dir, False, True, offline=True)
    draws = any(source.num_samples for source in sources)
    return f"{LEFT_OUT} {'num_samples or ' if draws else ''}--max_samples"


def placeholder_note(rows: Rows, numbers: np.ndarray) -> str:
    """The warning about placeholders in the chosen rows; empty if they have none.

    select.py copies rows as they are, so train.py fills them in.
    """
    note, files = PlaceholderNote(), {str(file.records.path): file for file in rows.files}
    for number in numbers.tolist():
        row = rows[number]
        place = files[row.source].records.place(row.index)
        note.add(row.messages, f"{row.source}, {place}")
    return note.line(f"{len(numbers):,} chosen rows", "train.py --replace")


def read_row(rows: Rows, number: int, is_drawn: bool = True) -> Row | BadRow:
    """The row, or why it is broken: as a BadRow if `rows` skip bad rows, else as UserError.

    is_drawn: False for a row that train.py would not read. It may be broken.
    """
    try:
        return rows[number]
    except BadRow as error:
        if is_drawn and not rows.skip_bad_rows:
            raise UserError(f"{error} (--skip_bad_rows leaves such rows out)") from error
        return error


def answer_lengths(rows: Rows, is_drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(characters of the answers (rows,), bool (rows,): True for broken rows).

    is_drawn: bool (rows,), see read_row.
    """
    lengths, is_broken = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for number in range(len(rows)):
        length = answer_length(rows, number, bool(is_drawn[number]))
        is_broken[number], lengths[number] = length is None, length or 0
    return lengths, is_broken


def answer_length(rows: Rows, number: int, is_drawn: bool = True) -> int | None:
    """The characters of the answers to learn, with thoughts and tool calls; None: a broken row.

    is_drawn: see read_row.
    """
    row = read_row(rows, number, is_drawn)
    if isinstance(row, BadRow):
        return None
    return sum(
        len(str(message.get(part) or ""))
        for message in row.messages
        if message["role"] == "assistant" and is_learned(message)
        for part in ("content", "reasoning_content", "tool_calls")
    )


def draw_readable(
    rows: Rows, numbers: np.ndarray, number: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw random rows and read only these: for files of millions of rows.

    Broken rows are drawn again. numbers: the rows to draw from. Returns (the chosen rows, sorted;
    the broken ones among those read; characters of the answers (all rows,), 0 for other rows).
    """
    lengths, chosen, broken = np.zeros(len(rows), np.int64), [], []
    while missing := number - len(chosen):
        if missing > len(numbers):
            raise UserError(
                f"cannot choose {number:,} rows: at least {len(broken):,} rows are broken, and at "
                f"most {len(chosen) + len(numbers):,} are left. Lower --sample_number or "
                "--sample_rate."
            )
        drawn = at_random(numbers, missing, generator)
        numbers = np.setdiff1d(numbers, drawn)
        for row in drawn.tolist():
            length = answer_length(rows, row)
            (chosen if length is not None else broken).append(row)
            lengths[row] = length or 0
    return np.sort(chosen), np.array(broken, np.int64), lengths


def row_sources(rows: Rows) -> np.ndarray:
    """The number of each row's source (rows,).

    A source is a file, or a value of the column `source` or `dataset` if there is only one file.
    UserError if that file has neither column.
    """
    if len(rows.files) > 1:
        return np.repeat(np.arange(len(rows.files)), [len(file.records) for file in rows.files])
    names = []
    for number in range(len(rows)):
        try:
            record = rows.files[0].records[number]
        except BadRow:
            record = {}
        columns = (record.get("source"), record.get("dataset")) if isinstance(record, dict) else ()
        names.append(str(next((name for name in columns if name is not None), "")))
    if not any(names):
        raise UserError(
            f"--balance source: {rows.files[0].records.path} is one file without a column "
            "`source`. Give several files, or use --balance cluster."
        )
    return np.unique(names, return_inverse=True)[1]


class Instructions:
    """The instructions of rows with these numbers. Indexing reads a row."""

    def __init__(self, rows: Rows, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        texts = []
        for message in self.rows[int(self.numbers[index])].messages:
            if message["role"] == "user":
                texts += [message["content"], message.get("input")]
        return "\n".join(filter(None, texts))
