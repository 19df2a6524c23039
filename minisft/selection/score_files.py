"""The files of score.py, and how select.py reads them.

    scores.jsonl             one JSON object per row: index, scores, number of tokens, reason
    scores.embeddings.npy    (rows, D) float32; zeros: the row has no text to embed
    scores.perplexity.npy    (rows,) float32, of the prompts; NaN: not computed yet, inf: undefined
    scores.record.json       the data and model that all of this was computed from

    columns = read_scores("scores.jsonl", num_rows=300, needed="ifd")
    embeddings, perplexity = read_embeddings("scores.embeddings.npy", num_rows=300)

The index of a row is its number in the files of the data set, from 0. Broken rows and rows that
num_samples leaves out count too, so an index never changes.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError

IFD_FIELDS = ("loss_conditioned", "loss_direct", "ifd", "ifd_ppl")
PREFERENCE_FIELDS = ("accuracy", "margin", "reward_chosen", "reward_rejected")
# All numbers that a record may have.
NUMBERS = (*IFD_FIELDS, "num_answer_tokens", "num_tokens", "reward", *PREFERENCE_FIELDS)
# How to get a score that a file lacks.
ADVICE = {
    "reward": "score.py --mode reward computes it, of rows with one answer",
    "margin": "score.py --mode reward computes it, of rows with several answers",
}


class ScorePaths:
    """The files of one `score.py --output`. path: the scores, or the embeddings."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        is_embeddings = path.name.endswith(".embeddings.npy")
        stem = path.name.removesuffix(".embeddings.npy") if is_embeddings else path.stem
        self.scores = path.with_name(f"{stem}.jsonl")
        self.embeddings = path.with_name(f"{stem}.embeddings.npy")
        self.perplexity = path.with_name(f"{stem}.perplexity.npy")
        self.record = path.with_name(f"{stem}.record.json")

    def all(self) -> list[Path]:
        """The four paths."""
        return [self.scores, self.embeddings, self.perplexity, self.record]


def read_scores(
    path: str | Path, num_rows: int, needed: str | None = None
) -> dict[str, np.ndarray]:
    """{name: array (rows,)} of a complete file of scores: NUMBERS, NaN for null, and `reason`.

    UserError if a row is missing or appears twice, if the file has the lines of several modes, or
    if a scored row lacks the score `needed`.
    """
    modes: set[str] = set()
    columns = {name: np.full(num_rows, np.nan) for name in NUMBERS}
    columns["reason"] = np.full(num_rows, None, object)
    is_present = np.zeros(num_rows, bool)
    with open(path, "rb") as file:
        for line in file:
            record = parse_line(path, line, num_rows)
            index = record["index"]
            modes.add("ifd" if "ifd" in record else "reward")
            fault = f"row {index + 1} appears twice" if is_present[index] else None
            if len(modes) > 1:
                fault = "it has lines of --mode ifd and of --mode reward"
            if fault:
                raise UserError(
                    f"{path}: {fault}: two runs of score.py wrote to it. Run score.py with "
                    "--overwrite."
                )
            is_present[index] = True
            if needed and needed not in record and record["reason"] is None:
                advice = ADVICE.get(needed, "score.py --mode ifd computes it")
                raise UserError(f"{path} has no {needed}: {advice}")
            for name, column in columns.items():
                if record.get(name) is not None:
                    column[index] = record[name]
    if not is_present.all():
        raise UserError(
            f"{path} has {is_present.sum():,} of {num_rows:,} rows. Run score.py again: it "
            "continues where it stopped."
        )
    return columns


def parse_line(path: str | Path, line: bytes, num_rows: int) -> dict[str, Any]:
    """The record in a line of scores. UserError if it is malformed or its row does not exist."""
    try:
        record = json.loads(line)
        is_valid = (
            type(record["index"]) is int
            and isinstance(record["reason"], str | None)
            and all(_is_number(record.get(name)) for name in NUMBERS)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        record, is_valid = {}, False
    if not is_valid:
        shown = line[:80].decode(errors="replace").rstrip()
        shown = repr(shown) if shown.isprintable() else "binary data"
        raise UserError(
            f"{path}: not a line of score.py: {shown}. Give the .jsonl that it writes, or run it "
            "again."
        )
    if not 0 <= record["index"] < num_rows:
        raise UserError(
            f"{path} has a score of row {record['index'] + 1}, but the data set has {num_rows} "
            "rows. Give the scores of this data set."
        )
    return record


def _is_number(value: Any) -> bool:
    """True for null, a finite float, and an integer that a float can hold."""
    if type(value) is float:
        return math.isfinite(value)  # Python reads NaN and Infinity, which score.py never writes
    return value is None or type(value) is int and abs(value) < 2**1023


def read_embeddings(path: str | Path, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (rows, D), memory-mapped; perplexity (rows,)) of all rows.

    UserError if one is missing or not finite.
    """
    embeddings = load_array(path, (num_rows, None))
    perplexity = np.array(load_array(ScorePaths(path).perplexity, (num_rows,)))
    if np.isnan(perplexity).any():
        raise UserError(
            f"{path}: row {np.isnan(perplexity).argmax() + 1} has no embedding yet. Run score.py "
            "again: it continues where it stopped."
        )
    for start in range(0, num_rows, 4096):
        is_broken = ~np.isfinite(embeddings[start : start + 4096]).all(1)
        if is_broken.any():
            raise UserError(
                f"{path}: the embedding of row {start + is_broken.argmax() + 1} is not finite. "
                "Run score.py with --dtype float32, or check the model."
            )
    return embeddings, perplexity


def zero_rows(embeddings: np.ndarray) -> np.ndarray:
    """bool (rows,): True for rows that score.py has not embedded, since they have no text."""
    blocks = [embeddings[start : start + 4096] for start in range(0, len(embeddings), 4096)]
    return np.concatenate([~block.any(1) for block in blocks])


def load_array(path: str | Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """A float32 .npy file, memory-mapped. UserError if its shape differs (None: any size)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    has_shape = array.ndim == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, array.shape, strict=True)
    )
    if not has_shape or array.dtype != np.float32:
        expected = ", ".join(str(size or "D") for size in shape)
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}, but the data set needs float32 of "
            f"shape ({expected}). Was it computed from another file?"
        )
    return array
