"""The rows that score.py and select.py work on, numbered as in their files."""

from collections.abc import Callable

import numpy as np

from minisft.common.errors import UserError
from minisft.data.dataset import Row, Rows, open_rows
from minisft.data.row_values import BadRow

# Draws the rows of num_samples as train.py does by default.
SEED = 42


def open_every_row(
    dataset: str,
    dataset_dir: str,
    skip_bad_rows: bool,
    with_rankings: bool,
    max_samples: int | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Rows, np.ndarray]:
    """(all rows of the files, bool (rows,): True for those that train.py would use).

    The others are broken, or max_samples or num_samples in dataset_info.json leaves them out.
    with_rankings: accept rows with several answers.
    """
    skipped = [] if skip_bad_rows else None
    ranking = None if with_rankings else False
    used = open_rows(dataset, dataset_dir, False, ranking, skipped, SEED, say, max_samples)
    rows = Rows(used.files, None, used.skip_bad_rows)
    is_drawn = np.full(len(rows), used.numbers is None)
    if used.numbers is not None:
        is_drawn[used.numbers] = True
    return rows, is_drawn


def read_row(rows: Rows, number: int) -> Row | BadRow:
    """The row, or why it is broken: as a BadRow if `rows` skip bad rows, else as UserError."""
    try:
        return rows[number]
    except BadRow as error:
        if not rows.skip_bad_rows:
            raise UserError(f"{error} (--skip_bad_rows leaves such rows out)") from error
        return error


def answer_lengths(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(characters of the answers (rows,), bool (rows,): True for broken rows)."""
    lengths, is_broken = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for number in range(len(rows)):
        row = read_row(rows, number)
        if isinstance(row, BadRow):
            is_broken[number] = True
        else:
            for message in row.messages:
                if message["role"] == "assistant":
                    lengths[number] += len(message["content"])
    return lengths, is_broken


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
