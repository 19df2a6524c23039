"""The files that score.py leaves: written as results come, gone on with, read again by select.py.

    files = ScoreFiles("scores.jsonl", record, num_rows=300, parts=("ifd", "embed"), width=64)
    for scores in ifd.score(model, encoder, files.pending(), batch_tokens=2048):
        files.add(scores)
    files.finish()

    scores.jsonl             one JSON object a row: index, losses and ratios, or a reward, number of
                             tokens, reason
    scores.embeddings.npy    (rows, D) float32
    scores.perplexity.npy    (rows,) float32 of the prompts; NaN: not computed, inf: cannot be
    scores.record.json       what all of this was computed from, by content

A row's index is its number in the files of the data set, from 0. All records count, also broken
ones and those that num_samples in dataset_info.json leaves out, so that it stays the same.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minisft.checkpoints.folders import stored_tensors
from minisft.common.errors import UserError
from minisft.common.json_files import read_json, write_json
from minisft.common.tensor_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from minisft.data.dataset import Rows, open_rows
from minisft.data.records import open_records
from minisft.text.tokenizer import FILES as TOKENIZER_FILES

# Of what num_samples draws: as train.py draws it, unless that is given another --seed.
SEED = 42
NUMBERS = (
    "loss_conditioned",
    "loss_direct",
    "ifd",
    "ifd_ppl",
    "num_answer_tokens",
    "reward",
    "accuracy",
    "margin",
    "reward_chosen",
    "reward_rejected",
)
# What computes those that only some rows have; the others, --mode ifd.
WAY_TO = {
    "reward": "--mode reward computes it, of rows with one answer",
    "margin": "--mode reward computes it, of rows with several answers",
}


def paths(output):
    """{what: path} of the files that belong to `--output`."""
    output = Path(output)
    return {"scores": output} | {
        what: output.with_name(f"{output.stem}.{what}.{ending}")
        for what, ending in (("embeddings", "npy"), ("perplexity", "npy"), ("record", "json"))
    }


def open_every_record(dataset, dataset_dir, skipped, say=print, ranking=False):
    """(all records of the files, bool (records,): which of them `open_rows` would have opened).

    The others are broken, or num_samples in dataset_info.json leaves them out. ranking: None where
    rows may have several answers.
    """
    opened = open_rows(dataset, dataset_dir, False, ranking, skipped, SEED, say)
    every = Rows(opened.files, None, opened.skip_bad_rows)
    drawn = np.zeros(len(every), bool)
    drawn[slice(None) if opened.numbers is None else opened.numbers] = True
    return every, drawn


def record_of_data(rows, drawn):
    """What identifies the rows: of each file its hash, how many records it has and how many of them
    are opened (which they are follows from that), and how columns are named."""
    files = []
    for file, opened in zip(rows.files, np.split(drawn, rows.ends[:-1]), strict=True):
        described = asdict(file.description) if file.description else {}
        described.pop("name", None)
        files.append(
            {
                "sha256": sha256(file.records.path),
                "rows": len(file.records),
                "opened": int(opened.sum()),
            }
            | described
        )
    return files


def record_of_model(model_dir, adapter_dir=None):
    """The hashes of everything in the two folders that a score depends on, by file name."""
    model_dir = Path(model_dir)
    files = {"config.json", *(one.path.name for one in stored_tensors(model_dir).values())}
    files |= {name for name in TOKENIZER_FILES if (model_dir / name).is_file()}
    record = {"model": {name: sha256(model_dir / name) for name in sorted(files)}}
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    record["adapter"] = adapter_dir and {name: sha256(Path(adapter_dir) / name) for name in names}
    return record


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ScoreFiles:
    """The files under `output`, new or gone on with. Nothing is written before the first `add`.

    record: what the scores are computed from; files that were computed from anything else raise
    UserError, unless `overwrite`. width: D of the embeddings.
    """

    def __init__(self, output, record, num_rows, parts, width, overwrite=False):
        self.paths, self.parts, self.record = paths(output), parts, record
        self.shape, self.overwrite, self.has_begun = (num_rows, width), overwrite, False
        self.scored, self.embedded = np.ones(num_rows, bool), np.ones(num_rows, bool)
        self.end = 0  # of the last whole line of the scores, in bytes
        if not overwrite:
            self._check()
        if {"ifd", "reward"} & set(parts):
            self.scored = self._find_scored()
        if "embed" in parts:
            self.embedded = self._find_embedded()

    def pending(self):
        """The numbers of the rows that are still to be computed."""
        return np.flatnonzero(~(self.scored & self.embedded))

    def add(self, scores):
        """Write finished Scores, whatever their order."""
        if not self.has_begun:
            self._begin()
        lines = [
            json.dumps(one.as_dict(), ensure_ascii=False) + "\n"
            for one in scores
            if not self.scored[one.index]
        ]
        if lines:
            with open(self.paths["scores"], "a", encoding="utf-8") as file:
                file.write("".join(lines))
        new = [one for one in scores if not self.embedded[one.index]]
        if new:
            numbers = [one.index for one in new]
            # Mapped for this call only, so that pages which are written do not count as memory.
            embeddings, perplexity = (
                np.load(self.paths[what], mmap_mode="r+") for what in ("embeddings", "perplexity")
            )
            embeddings[numbers] = [
                np.zeros(embeddings.shape[1]) if one.embedding is None else one.embedding
                for one in new
            ]
            perplexity[numbers] = [one.perplexity() for one in new]

    def finish(self):
        """Put the lines of the scores in the order of the rows; the Paths of what is written."""
        written = [
            self.paths[what] for what in ("embeddings", "perplexity") if "embed" in self.parts
        ]
        if {"ifd", "reward"} & set(self.parts):
            self._sort()
            written.insert(0, self.paths["scores"])
        return written

    def _sort(self):
        path = self.paths["scores"]
        records = open_records(path)
        order = np.argsort([records[number]["index"] for number in range(len(records))])
        if (np.diff(order) > 0).all():
            return
        partial = Path(f"{path}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            for number in order:
                file.write(json.dumps(records[int(number)], ensure_ascii=False) + "\n")
        os.replace(partial, path)

    def _begin(self):
        """Make the files ready to be added to."""
        self.has_begun = True
        if self.overwrite:
            for path in self.paths.values():
                path.unlink(missing_ok=True)
        self.paths["record"].parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record, self.paths["record"])
        if {"ifd", "reward"} & set(self.parts):
            with open(self.paths["scores"], "ab") as file:
                file.truncate(self.end)  # a run that was killed may have left part of a line
        if "embed" in self.parts and not self._has_embeddings():
            embeddings, perplexity = self.paths["embeddings"], self.paths["perplexity"]
            np.lib.format.open_memmap(embeddings, "w+", np.float32, self.shape)
            partial = perplexity.with_name(perplexity.name + ".partial")
            with open(partial, "wb") as file:
                np.save(file, np.full(self.shape[0], np.nan, np.float32))
            os.replace(partial, perplexity)

    def _check(self):
        there = [path for what, path in self.paths.items() if what != "record" and path.exists()]
        if there and not self.paths["record"].exists():
            raise UserError(
                f"{there[0]}: is there already, and no {self.paths['record'].name} "
                "that says what it belongs to; choose another --output, or give "
                "--overwrite to lose it"
            )
        found = read_record(self.paths["record"]) if there else self.record
        # What is there was computed with `found`; what is to come, with `self.record`.
        for what, value in self.record.items():
            if what != "names" and found.get(what) != value:
                named = _named(found, self.record, what)
                raise UserError(
                    f"{there[0]}: was computed with another {what}{named}; scores of two "
                    "kinds are never mixed: choose another --output, or give --overwrite to lose "
                    "what is there"
                )

    def _find_scored(self):
        path, num_rows = self.paths["scores"], self.shape[0]
        done = np.zeros(num_rows, bool)
        if self.overwrite or not path.exists():
            return done
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.end += len(line)
                done[_parse(path, line, num_rows)["index"]] = True
        return done

    def _find_embedded(self):
        if self.overwrite or not self._has_embeddings():
            return np.zeros(self.shape[0], bool)
        load_array(self.paths["embeddings"], self.shape)
        return ~np.isnan(load_array(self.paths["perplexity"], self.shape[:1]))

    def _has_embeddings(self):
        return self.paths["embeddings"].exists() and self.paths["perplexity"].exists()


def _parse(path, line, num_rows):
    """One line of scores; UserError where it is none, or of a row that there is not."""
    try:
        score = json.loads(line)
        index = score["index"]
        good = (
            type(index) is int
            and isinstance(score["reason"], str | None)
            and all(
                score.get(name) is None or type(score[name]) in (int, float) for name in NUMBERS
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path}: not a line of score.py: {line[:80].decode(errors='replace')!r}")
    if not 0 <= index < num_rows:
        raise UserError(f"{path}: has a score of row {index + 1}, and the data set has {num_rows}")
    return score


def _named(found, record, what):
    """ " (A, not B)" in words for people, where these differ."""
    old, new = (one.get("names", {}).get(what, one.get(what)) for one in (found, record))
    return f" ({old}, not {new})" if old != new else ", changed since under the same name"


def read_record(path):
    """The object in a record; UserError where there is none."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a record of score.py")
    return record


def check_belongs(path, dataset):
    """UserError unless the results at `path` are of what `record_of_data` gives for `dataset`."""
    path = Path(path)
    stem = path.name.removesuffix(".embeddings.npy") if path.suffix == ".npy" else path.stem
    record_path = path.with_name(f"{stem}.record.json")
    if not path.exists():
        raise UserError(f"{path}: there is no such file; score.py writes it")
    if not record_path.exists():
        raise UserError(
            f"{path}: there is no {record_path.name} beside it, which score.py writes "
            "and which says what file the scores belong to"
        )
    record = read_record(record_path)
    if record.get("dataset") != dataset:
        name = record.get("names", {}).get("dataset")
        raise UserError(
            f"{path}: belongs to another file than --dataset, or that file has changed "
            f"since (it was computed from {name}); run score.py on --dataset"
        )


def read_scores(path, num_rows, needed=None):
    """{name: array (rows,)} of a complete scores.jsonl: the NUMBERS, NaN for null, and `reason`.

    UserError where a row is missing, or does not say what is `needed` of it.
    """
    columns = {name: np.full(num_rows, np.nan) for name in NUMBERS}
    columns["reason"] = np.full(num_rows, None, object)
    done = np.zeros(num_rows, bool)
    with open(path, "rb") as file:
        for line in file:
            score = _parse(path, line, num_rows)
            done[score["index"]] = True
            if needed and needed not in score and score["reason"] is None:
                way = WAY_TO.get(needed, "--mode ifd computes it")
                raise UserError(f"{path}: has no {needed}; score.py {way}")
            for name in columns:
                if score.get(name) is not None:
                    columns[name][score["index"]] = score[name]
    if not done.all():
        raise UserError(
            f"{path}: has {done.sum():,} of {num_rows:,} rows; score.py goes on where "
            "it stopped if it is run again"
        )
    return columns


def load_array(path, shape):
    """A float32 .npy, mapped and not read; UserError unless it has this shape (None: any width)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    fits = array.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != np.float32:
        raise UserError(
            f"{path}: has {array.dtype} of shape {list(array.shape)}, and the data "
            f"set needs float32 of {[n or 'D' for n in shape]}; was it computed from "
            "another file?"
        )
    return array


def perplexity_path(embeddings_path):
    """The Path of the perplexities that belong to embeddings."""
    path = Path(embeddings_path)
    return path.with_name(path.name.removesuffix(".embeddings.npy") + ".perplexity.npy")


def read_embeddings(path, num_rows):
    """(embeddings (rows, D), perplexity (rows,)) that score.py has computed for all rows.

    UserError where one is missing or not a number.
    """
    embeddings = load_array(path, (num_rows, None))
    perplexity = np.array(load_array(perplexity_path(path), (num_rows,)))
    if np.isnan(perplexity).any():
        raise UserError(
            f"{path}: row {np.isnan(perplexity).argmax() + 1} has no embedding yet; "
            "score.py goes on where it stopped if it is run again"
        )
    for start in range(0, num_rows, 4096):
        broken = ~np.isfinite(embeddings[start : start + 4096]).all(1)
        if broken.any():
            raise UserError(
                f"{path}: the embedding of row {start + broken.argmax() + 1} is not "
                "finite; is the model broken, or --dtype too small for it?"
            )
    return embeddings, perplexity
