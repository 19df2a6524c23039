"""Apply a strategy: drop the rows that it cannot use, then choose among the rest.

candidates = Candidates(num_rows=len(rows))
candidates.drop(is_broken, "broken")
choice = choose(options, data, candidates, number=150)
choice.rows, candidates.dropped            # row numbers, {"broken": 3}
"""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.common.hashes import sha256
from minisft.common.json_files import is_integer, read_json
from minisft.selection import strategies
from minisft.selection.kmeans import ArrayRows, kmeans
from minisft.selection.provenance import check_computed_from
from minisft.selection.score_files import ScorePaths, read_embeddings, read_scores

# The score that a strategy ranks by.
SCORE_OF = {
    "ifd": "ifd",
    "ifd_ppl": "ifd_ppl",
    "ppl": "loss_conditioned",
    "reward": "reward",
    "margin": "margin",
    "ifd+kcenter": "ifd",
}


def no_numbers() -> np.ndarray:
    """An empty array, where the user gave no file."""
    return np.empty(0)


@dataclass
class RowData:
    """Data about the rows, by row number; empty where the user gave no file."""

    lengths: np.ndarray  # of the answers
    length_unit: str = "characters"
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # from read_scores
    embeddings: np.ndarray = field(default_factory=no_numbers)  # (rows, D)
    perplexity: np.ndarray = field(default_factory=no_numbers)  # of the prompts
    match: np.ndarray = field(default_factory=no_numbers)  # row numbers of another selection
    hashes: dict[str, str] = field(default_factory=dict)  # of the files


class Candidates:
    """The rows that may still be chosen, and the number of dropped rows by reason."""

    def __init__(self, num_rows: int) -> None:
        self.rows = np.arange(num_rows)
        self.dropped: dict[str, int] = {}

    def drop(self, mask: np.ndarray, reason: str) -> None:
        """Drop the rows where the mask, bool (all rows,), is True."""
        is_dropped = mask[self.rows]
        if is_dropped.any():
            self.rows = self.rows[~is_dropped]
            self.dropped[reason] = self.dropped.get(reason, 0) + int(is_dropped.sum())

    def drop_unscored(self, reasons: np.ndarray) -> None:
        """Drop the rows with a reason, counted by its kind: the part before the colon."""
        kinds = np.array([reason and reason.split(":")[0] for reason in reasons], object)
        for kind in sorted(set(kinds) - {None}):
            self.drop(kinds == kind, kind)


@dataclass
class Choice:
    """The chosen rows, sorted. details: more entries for the manifest."""

    rows: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)
    clusters: tuple[np.ndarray, np.ndarray] | None = None  # (row numbers, the cluster of each)


def read_row_data(
    options: Namespace, num_rows: int, dataset: list[dict[str, Any]], lengths: np.ndarray
) -> RowData:
    """Read --scores, --embeddings and --match. UserError if they belong to another data set.

    dataset: the result of `dataset_record` for the rows. lengths: of the answers, in characters.
    """
    data, paths = RowData(lengths), {}
    if options.scores:
        check_computed_from(options.scores, dataset)
        data.scores = read_scores(options.scores, num_rows, SCORE_OF.get(options.strategy))
        data.lengths, data.length_unit = data.scores["num_answer_tokens"], "tokens"
        paths["scores"] = options.scores
    if options.embeddings:
        check_computed_from(options.embeddings, dataset)
        data.embeddings, data.perplexity = read_embeddings(options.embeddings, num_rows)
        paths["embeddings"] = options.embeddings
        paths["perplexity"] = ScorePaths(options.embeddings).perplexity
    if options.match:
        data.match = read_match(options.match, num_rows, dataset)
        paths["match"] = options.match
    data.hashes = {name: sha256(path) for name, path in paths.items()}
    return data


def read_match(path: str, num_rows: int, dataset: list[dict[str, Any]]) -> np.ndarray:
    """The row numbers in the manifest of another selection."""
    manifest = read_json(Path(f"{path}.manifest"))
    if manifest.get("dataset") != dataset:
        raise UserError(
            f"--match {path}: was chosen from another file than --dataset. Give --dataset the "
            "file that it was chosen from."
        )
    numbers = manifest.get("chosen")
    is_valid = isinstance(numbers, list) and all(
        is_integer(number, most=num_rows - 1) for number in numbers
    )
    if not numbers or not is_valid:
        raise UserError(
            f"--match {path}: {path}.manifest does not say which rows were chosen. Give a file "
            "that select.py wrote."
        )
    return np.array(numbers)


def choose(options: Namespace, data: RowData, candidates: Candidates, number: int) -> Choice:
    """Choose `number` rows by options.strategy. UserError if there are not enough."""
    strategy, scores = options.strategy, data.scores
    drop_unusable(strategy, data, candidates)
    rows = candidates.rows
    generator = np.random.default_rng(options.seed)
    if strategy in ("ifd", "ifd_ppl", "reward", "margin"):
        chosen = strategies.highest(scores[strategy], rows, number)
    elif strategy == "ppl":
        chosen = strategies.middle(scores["loss_conditioned"], rows, number)
    elif strategy == "longest":
        chosen = strategies.highest(data.lengths, rows, number)
    elif strategy == "random":
        chosen = strategies.at_random(rows, number, generator)
    elif strategy == "random_matched":
        chosen = strategies.at_random_with_lengths(data.lengths, rows, data.match, generator)
        num_common = len(np.intersect1d(chosen, data.match))
        return Choice(np.sort(chosen), {"also_in_match": num_common})
    elif strategy == "kcenter":
        chosen = strategies.k_center(data.embeddings, rows, number)
    elif strategy == "ifd+kcenter":
        strategies.check_enough(rows, number)
        pool_size = min(len(rows), round(options.pool * number))
        pool = strategies.highest(scores["ifd"], rows, pool_size)
        chosen = strategies.k_center(data.embeddings, np.sort(pool), number)
    else:
        return choose_by_cluster(options, data, rows)
    return Choice(np.sort(chosen))


def drop_unusable(strategy: str, data: RowData, candidates: Candidates) -> None:
    """Drop the rows that have no score, and rows that the strategy never chooses."""
    if strategy in SCORE_OF:
        candidates.drop_unscored(data.scores["reason"])
    if strategy in ("ifd", "ifd_ppl", "ifd+kcenter"):
        name = SCORE_OF[strategy]
        candidates.drop(~(data.scores[name] < 1), f"{name} of 1 or more")
    if strategy == "cluster":
        candidates.drop(np.isinf(data.perplexity), "no perplexity")


def choose_by_cluster(options: Namespace, data: RowData, rows: np.ndarray) -> Choice:
    """k-means of the embeddings, then some rows of each cluster."""
    points = ArrayRows(data.embeddings, rows)
    result = kmeans(points, options.clusters, options.seed, options.starts)
    chosen = strategies.spread_over_clusters(
        result.assignment, data.perplexity, rows, options.per_cluster, options.band
    )
    if len(chosen) == 0:
        raise UserError("no row is in the --band of any cluster. Widen the band.")
    sizes = np.bincount(result.assignment, minlength=options.clusters).tolist()
    details = {"inertia": result.inertia, "steps": result.num_steps, "sizes": sizes}
    return Choice(np.sort(chosen), {"clusters": details}, (rows, result.assignment))
