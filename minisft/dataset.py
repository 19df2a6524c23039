"""Files in any supported format -> rows: conversations to learn from, or texts to read.

    rows = load_rows("examples/data/train.json")
    print(rows[0].messages)     # [{"role": "user", "content": ...}, {"role": "assistant", ...}]

A file holds a JSON array or JSON lines; which of them, its content says. `formats.py` lists the
columns that are known. A row that cannot be learned from is an error which names the file and the
row, unless the caller asks for such rows to be collected instead.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from minisft.formats import BadRow, conversation, parse_json, text_of
from minisft.options import UserError


@dataclass
class Row:
    """One example: a conversation that ends with the assistant, and where it came from."""

    messages: list[dict]
    tools: list | None = None
    source: str = ""
    index: int = 0  # in its file, from 0, counting broken rows too


def load_rows(dataset, skipped=None):
    """Read the file or the comma-separated files `dataset` -> list[Row], in the files' order.

    A broken row raises UserError. If `skipped` is a list, such rows are left out and a message for
    each goes there instead; a file without a single good row is an error either way.
    """
    rows = []
    for path in _files(dataset):
        good, broken = [], []
        for index, place, record in _records(path):
            try:
                good.append(Row(*conversation(record), source=str(path), index=index))
            except BadRow as error:
                broken.append(f"{path}, {place}: {error}")
        if not good:
            raise UserError(broken[0] if broken else f"{path}: there are no rows in it")
        if broken and skipped is None:
            share = f"{len(broken)} of {len(good) + len(broken)} rows broken"
            raise UserError(f"{broken[0]} ({share}; --skip_bad_rows leaves them out)")
        rows.extend(good)
        if skipped is not None:
            skipped.extend(broken)
    return rows


def load_texts(dataset):
    """Read plain text for pre-training from one file or several, separated by commas -> list[str].

    Each line of a .txt file is a document, as is each row's "text" of a JSON file.
    """
    texts = []
    for path in _files(dataset):
        if path.suffix.lower() == ".txt":
            found = _read(path).replace("\r\n", "\n").split("\n")
        else:
            found = list(_text_column(path))
        texts.extend(text for text in found if text.strip())
    if not texts:
        raise UserError(f"{dataset}: there is no text in it")
    return texts


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
    chosen = set(random.Random(seed).sample(range(len(rows)), int(count)))
    training = [row for number, row in enumerate(rows) if number not in chosen]
    return training, [rows[number] for number in sorted(chosen)]


# Files -> records


def _files(dataset):
    paths = [Path(name.strip()) for name in str(dataset).split(",") if name.strip()]
    for path in paths:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "there is no such file"
            raise UserError(f"{path}: {what}")
    if not paths:
        raise UserError("--dataset names no file")
    return paths


def _read(path):
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; convert the file") from error


def _records(path):
    """Yield (index, place for people, record); a broken JSON line is yielded as its BadRow."""
    text = _read(path)
    start = text.lstrip()[:1]
    if start == "[":
        yield from _array_records(path, text)
    elif start == "{":
        yield from _line_records(text)
    else:
        what = "neither a JSON array nor JSON lines (plain text is for --stage pt, in a .txt file)"
        raise UserError(f"{path}: {what if start else 'the file is empty'}")


def _text_column(path):
    for _, place, record in _records(path):
        try:
            yield text_of(record)
        except BadRow as error:
            raise UserError(f"{path}, {place}: {error}") from error


def _array_records(path, text):
    try:
        records = parse_json(text)
    except BadRow as error:
        raise UserError(f"{path}, {error}") from error
    for index, record in enumerate(records):
        yield index, f"row {index + 1}", record


def _line_records(text):
    index = 0
    # Not str.splitlines(): it also splits at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = parse_json(line, number)
            except BadRow as error:
                record = error
            yield index, f"row {index + 1} (line {number})", record
            index += 1
