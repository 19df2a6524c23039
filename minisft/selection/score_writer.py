"""Write the files of score.py result by result, and continue them after an interruption.

writer = ScoreWriter("scores.jsonl", record, num_rows=300, parts=("ifd", "embed"), width=64)
for scores in score_rows(model, reader, writer.pending(), batch_tokens=1024):
    writer.add(scores)
writer.finish()
"""

import json
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.common.json_files import read_json, write_json
from minisft.common.outputs import atomic_path, atomic_write
from minisft.common.reserved_space import allocate
from minisft.data.records import Lines
from minisft.selection.passes import Score
from minisft.selection.provenance import check_same_record, read_pooling
from minisft.selection.score_files import ScorePaths, load_array, parse_line


class ScoreWriter:
    """The files of `output`, new or continued. Nothing is written before the first `add`.

    record: the data and the model of the scores, from provenance.py. UserError if existing files
    have another record, unless `overwrite`. parts: "ifd" or "reward" for scores, "embed" for
    embeddings of `width`. pooling: that of the embeddings; scores do not depend on it.
    """

    def __init__(
        self,
        output: str | Path,
        record: dict[str, Any],
        num_rows: int,
        parts: Collection[str],
        width: int,
        overwrite: bool = False,
        pooling: str = "mean",
    ) -> None:
        self.paths, self.record, self.overwrite = ScorePaths(output), record, overwrite
        self.pooling = pooling
        self.num_rows, self.width = num_rows, width
        self.writes_scores = "ifd" in parts or "reward" in parts
        self.writes_embeddings = "embed" in parts
        self.has_begun = False
        self.valid_bytes = 0  # the scores up to the end of the last complete line
        # Rows that need no computation.
        self.is_scored = np.full(num_rows, not self.writes_scores)
        self.is_embedded = np.full(num_rows, not self.writes_embeddings)
        if not overwrite:
            self._check_record()
            if self.writes_scores:
                self._find_scored()
            if self.writes_embeddings and self._has_embeddings():
                load_array(self.paths.embeddings, (num_rows, width))
                self.is_embedded = ~np.isnan(load_array(self.paths.perplexity, (num_rows,)))

    def _check_record(self) -> None:
        """UserError for existing files with another record, or without one."""
        paths = self.paths
        existing = [
            path for path in (paths.scores, paths.embeddings, paths.perplexity) if path.exists()
        ]
        if existing and not paths.record.exists():
            raise UserError(
                f"{existing[0]} exists, but there is no {paths.record.name} to say what it belongs "
                "to. Choose another --output, or add --overwrite to lose it."
            )
        if existing:
            check_same_record(existing[0], read_json(paths.record), self.record)
        if self._has_embeddings():
            old_pooling = read_pooling(paths.embeddings)
            if self.writes_embeddings and old_pooling != self.pooling:
                raise UserError(
                    f"{paths.embeddings} was computed with --pooling {old_pooling}. Choose another "
                    "--output, or add --overwrite to lose it."
                )
            self.pooling = old_pooling

    def _find_scored(self) -> None:
        if not self.paths.scores.exists():
            return
        with open(self.paths.scores, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # a killed run has left part of a line
                self.valid_bytes += len(line)
                self.is_scored[parse_line(self.paths.scores, line, self.num_rows)["index"]] = True

    def _has_embeddings(self) -> bool:
        return self.paths.embeddings.exists() and self.paths.perplexity.exists()

    def pending(self) -> np.ndarray:
        """The numbers of the rows that are still to be computed."""
        return np.flatnonzero(~(self.is_scored & self.is_embedded))

    def add(self, scores: Sequence[Score]) -> None:
        """Write finished rows, in any order. UserError if the disk is full."""
        with self._saying_how_to_go_on():
            self._add(scores)

    def _add(self, scores: Sequence[Score]) -> None:
        if not self.has_begun:
            self._begin()
        lines = [
            json.dumps(score.record, ensure_ascii=False) + "\n"
            for score in scores
            if not self.is_scored[score.index]
        ]
        if lines:
            with open(self.paths.scores, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        new = [score for score in scores if not self.is_embedded[score.index]]
        if new:
            self._write_embeddings(new)

    def _begin(self) -> None:
        """Prepare the files for `add`."""
        self.has_begun = True
        paths = self.paths
        if self.overwrite:
            for path in paths.all():
                path.unlink(missing_ok=True)
        paths.record.parent.mkdir(parents=True, exist_ok=True)
        write_json({**self.record, "pooling": self.pooling}, paths.record)
        if self.writes_scores:
            with open(paths.scores, "ab") as file:
                file.truncate(self.valid_bytes)
        if self.writes_embeddings and not self._has_embeddings():
            shape = (self.num_rows, self.width)
            with atomic_path(paths.embeddings) as partial:
                np.lib.format.open_memmap(partial, "w+", np.float32, shape)
                with open(partial, "r+b") as file:
                    allocate(file.fileno(), partial.stat().st_size)
            with atomic_write(paths.perplexity, "wb") as file:
                np.save(file, np.full(self.num_rows, np.nan, np.float32))

    def _write_embeddings(self, scores: Sequence[Score]) -> None:
        # Ordinary writes: on a full disk, a write to a mapped file kills the process (SIGBUS).
        zeros = np.zeros(self.width, np.float32)
        vectors = {
            score.index: zeros if score.embedding is None else score.embedding for score in scores
        }
        # The perplexity comes last, because it marks a row as embedded.
        _write_rows(self.paths.embeddings, vectors)
        _write_rows(self.paths.perplexity, {score.index: score.perplexity for score in scores})

    def finish(self) -> list[Path]:
        """Put the scores in the order of the rows; returns the paths of what is written."""
        written = []
        if self.writes_scores:
            with self._saying_how_to_go_on():
                self._sort_scores()
            written.append(self.paths.scores)
        if self.writes_embeddings:
            written += [self.paths.embeddings, self.paths.perplexity]
        return written

    @contextmanager
    def _saying_how_to_go_on(self) -> Generator[None, None, None]:
        """Add to an error of the disk how to go on."""
        go_on = "Make room; the same command continues where it stopped."
        if self.overwrite:
            go_on = "Make room; the same command without --overwrite continues where it stopped."
        try:
            yield
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise UserError(f"{error}. {go_on}") from error
        except OSError as error:
            path = error.filename or self.paths.scores
            raise UserError(f"{path}: could not be written: {error.strerror}. {go_on}") from error

    def _sort_scores(self) -> None:
        lines = Lines(self.paths.scores, is_json=True)
        order = np.argsort([lines[number]["index"] for number in range(len(lines))])
        if (np.diff(order) > 0).all():
            return
        with atomic_write(self.paths.scores, "wb") as file:
            for number in order:
                file.write(lines.raw(number) + b"\n")


def _write_rows(path: Path, rows: Mapping[int, np.ndarray | float]) -> None:
    """Replace some rows of a float32 .npy file. The OSError of a full disk names the file."""
    array = np.load(path, mmap_mode="r")
    row_bytes = array[0].nbytes
    try:
        with open(path, "r+b") as file:
            for index, row in rows.items():
                file.seek(array.offset + index * row_bytes)
                file.write(np.asarray(row, np.float32).tobytes())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
