"""Apply a strategy: drop the rows that it cannot use, then choose among the rest.

candidates = Candidates(num_rows=len(rows))
candidates.drop(is_broken, "broken")
choice = choose(options, data, candidates, number=150)
choice.rows, candidates.dropped            # row numbers, {"broken": 3}
"""

from argparse import Namespace
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minisft.common.errors import UserError
from minisft.common.hashes import sha256
from minisft.common.json_files import is_integer, read_json
from minisft.selection import strategies
from minisft.selection.facility_location import facility_location
from minisft.selection.kmeans import ArrayRows, Clusters, kmeans
from minisft.selection.limits import band_limits, cluster_limits
from minisft.selection.provenance import (
    check_computed_from,
    check_same_model,
    covered_rows,
    is_other_limit,
    max_samples_of,
)
from minisft.selection.rds import nearest_to_targets, similarity_to_targets
from minisft.selection.score_files import (
    ScorePaths,
    load_array,
    read_embeddings,
    read_scores,
    zero_rows,
)

# The score that a strategy ranks by.
SCORE_OF = {
    "ifd": "ifd",
    "ifd_ppl": "ifd_ppl",
    "mid_ppl": "loss_conditioned",
    "reward": "reward",
    "margin": "margin",
    "ifd+kcenter": "ifd",
    "ifd_ppl+facility": "ifd_ppl",
}
# k-means makes this many clusters, if there are rows for them.
NUM_CLUSTERS = 100
# Strategies that look at the embeddings of the rows.
BY_EMBEDDING = ("cluster", "kcenter", "ifd+kcenter", "facility", "ifd_ppl+facility", "rds")


def no_numbers() -> np.ndarray:
    """An empty array, where the user gave no file."""
    return np.empty(0)


@dataclass
class RowData:
    """Data about the rows, by row number; empty where the user gave no file."""

    lengths: np.ndarray  # answer lengths, in length_unit
    length_unit: str = "characters"
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # from read_scores
    embeddings: np.ndarray = field(default_factory=no_numbers)  # (rows, D)
    perplexity: np.ndarray = field(default_factory=no_numbers)  # prompt perplexities
    match: np.ndarray = field(default_factory=no_numbers)  # row numbers of another selection
    tasks: list[np.ndarray] = field(default_factory=list)  # embeddings (n, D) of target rows
    sources: np.ndarray = field(default_factory=no_numbers)  # the number of each row's source
    cutoff_len: int | None = None  # longer rows got no score
    hashes: dict[str, str] = field(default_factory=dict)  # {flag: the hash of its file}


class Candidates:
    """The rows that may still be chosen, and the number of dropped rows by reason."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.rows = num_rows, np.arange(num_rows)
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

    def check_enough(self, number: int) -> None:
        """UserError if there are fewer than `number` rows; it says what became of the others."""
        if number <= len(self.rows):
            return
        if not self.dropped:
            raise UserError(
                f"cannot choose {number:,} rows: the data set has only {self.num_rows:,}. Lower "
                "--sample_number."
            )
        dropped = "; ".join(f"{count:,}: {reason}" for reason, count in self.dropped.items())
        if len(self.rows) == 0:
            raise UserError(f"none of the {self.num_rows:,} rows is left (dropped {dropped}).")
        raise UserError(
            f"cannot choose {number:,} rows: only {len(self.rows):,} of {self.num_rows:,} are left "
            f"(dropped {dropped}). Lower --sample_number or --sample_rate."
        )


@dataclass
class Choice:
    """The chosen rows, sorted. details: more entries for the manifest. notes: for people."""

    rows: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    clusters: tuple[np.ndarray, np.ndarray] | None = None  # (row numbers, the cluster of each)


def read_row_data(
    options: Namespace, num_rows: int, dataset: list[dict[str, Any]], lengths: np.ndarray
) -> RowData:
    """Read --scores, --embeddings, --target and --match.

    UserError if they belong to another data set, or targets and rows to different models.
    dataset: the result of `dataset_record` for the rows. lengths: answer lengths in characters.
    """
    data, paths = RowData(lengths), {}
    if options.scores:
        check_computed_from(options.scores, dataset)
        data.scores = read_scores(options.scores, num_rows, SCORE_OF.get(options.strategy))
        data.lengths, data.length_unit = data.scores["num_answer_tokens"], "tokens"
        data.cutoff_len = read_json(ScorePaths(options.scores).record).get("cutoff_len")
        paths["scores"] = options.scores
    if options.embeddings:
        check_computed_from(options.embeddings, dataset)
        data.embeddings, data.perplexity = read_embeddings(options.embeddings, num_rows)
        paths["embeddings"] = options.embeddings
        paths["perplexity"] = ScorePaths(options.embeddings).perplexity
    for number, path in enumerate(options.target or []):
        data.tasks.append(read_target(path, options.embeddings))
        paths[f"target {number + 1}"] = path
    if options.match:
        data.match = read_match(options.match, num_rows, dataset)
        paths["match"] = options.match
    data.hashes = {name: sha256(path) for name, path in paths.items()}
    return data


def read_target(path: str, embeddings: str) -> np.ndarray:
    """The embeddings (n, D) of the rows of a target task, without rows that have none."""
    for name in (path, ScorePaths(path).record):
        if not Path(name).exists():
            raise UserError(f"--target {path}: there is no {name}. score.py writes it.")
    check_same_model(path, embeddings)
    num_rows = len(load_array(path, (None, None)))
    targets = np.array(read_embeddings(path, num_rows)[0])
    targets = targets[~zero_rows(targets)]
    if len(targets) == 0:
        raise UserError(f"--target {path}: no row has an embedding")
    return targets


def read_match(path: str, num_rows: int, dataset: list[dict[str, Any]]) -> np.ndarray:
    """The row numbers in the manifest of another selection."""
    manifest = read_json(Path(f"{path}.manifest"))
    chosen_from = manifest.get("dataset", [])
    if chosen_from != dataset and is_other_limit(chosen_from, dataset):
        limit = max_samples_of(chosen_from)
        change = f"give --max_samples {limit}" if limit else "leave out --max_samples"
        raise UserError(f"--match {path}: was chosen among {covered_rows(limit)}: {change}.")
    if chosen_from != dataset:
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


def choose(options: Namespace, data: RowData, candidates: Candidates, number: int | None) -> Choice:
    """Choose `number` rows by options.strategy. UserError if there are not enough.

    number: None leaves it to --per_cluster or --match; other strategies need one.
    """
    strategy, scores = options.strategy, data.scores
    # Like --sample_rate, of the rows that the filters leave, with a score or without.
    pool_size = round(options.top_rate * len(candidates.rows))
    drop_unusable(options, data, candidates)
    if number is not None:
        candidates.check_enough(number)
    rows = candidates.rows
    generator = np.random.default_rng(options.seed)
    if strategy == "random_matched":
        return choose_matched(data, rows, number, generator)
    if strategy == "cluster":
        return choose_by_cluster(options, data, rows, number)
    assert number is not None
    if strategy in ("ifd", "ifd_ppl", "reward", "margin"):
        chosen = strategies.highest(scores[strategy], rows, number)
    elif strategy == "mid_ppl":
        chosen = strategies.middle(scores["loss_conditioned"], rows, number)
    elif strategy == "longest":
        chosen = strategies.highest(data.lengths, rows, number)
    elif strategy == "random" and options.balance:
        return choose_balanced(options, data, rows, number)
    elif strategy == "random":
        chosen = strategies.at_random(rows, number, generator)
    elif strategy == "rds":
        similarities = similarity_to_targets(data.embeddings, rows, data.tasks)
        chosen = nearest_to_targets(similarities, rows, number)
    elif strategy == "facility":
        chosen = facility_location(data.embeddings, rows, number)
    elif strategy == "ifd_ppl+facility":
        if pool_size < number:
            raise UserError(
                f"--top_rate {options.top_rate:g} leaves {pool_size:,} rows, fewer than the "
                f"{number:,} to choose. Raise it."
            )
        pool = strategies.highest(scores["ifd_ppl"], rows, min(len(rows), pool_size))
        chosen = facility_location(data.embeddings, np.sort(pool), number)
    elif strategy == "kcenter":
        chosen = strategies.k_center(data.embeddings, rows, number)
    else:  # ifd+kcenter
        pool_size = min(len(rows), round(options.pool * number))
        pool = strategies.highest(scores["ifd"], rows, pool_size)
        chosen = strategies.k_center(data.embeddings, np.sort(pool), number)
    return Choice(np.sort(chosen))


def drop_unusable(options: Namespace, data: RowData, candidates: Candidates) -> None:
    """Drop the rows that have no score, and rows that the strategy never chooses."""
    strategy = options.strategy
    if strategy in SCORE_OF:
        candidates.drop_unscored(data.scores["reason"])
    if SCORE_OF.get(strategy) in ("ifd", "ifd_ppl"):
        name = SCORE_OF[strategy]
        candidates.drop(~(data.scores[name] < 1), f"{name} of 1 or more")
    if strategy == "cluster":
        candidates.drop(np.isinf(data.perplexity), "no perplexity")
    if strategy in BY_EMBEDDING or options.balance == "cluster":
        candidates.drop(zero_rows(data.embeddings), "no embedding")


def choose_matched(
    data: RowData, rows: np.ndarray, number: int | None, generator: np.random.Generator
) -> Choice:
    """Random rows with the lengths of --match, or of `number` of its rows, evenly spread."""
    reference = data.match
    if number is not None:
        by_length = reference[np.argsort(data.lengths[reference], kind="stable")]
        reference = by_length[strategies.evenly_spread(len(by_length), number)]
    chosen = strategies.at_random_with_lengths(data.lengths, rows, reference, generator)
    return Choice(np.sort(chosen), {"also_in_match": len(np.intersect1d(chosen, data.match))})


def choose_balanced(options: Namespace, data: RowData, rows: np.ndarray, number: int) -> Choice:
    """Random rows, the same number from each source or cluster."""
    generator, clusters, notes = np.random.default_rng(options.seed), None, []
    if options.balance == "source":
        groups = data.sources[rows]
        if len(np.unique(groups)) == 1:
            notes.append(
                "--balance source: all rows have one source, so the choice is simply random"
            )
    else:
        notes = choose_num_clusters(options, rows, number)
        groups = cluster(options, data, rows).assignment
        clusters = rows, groups
    chosen = np.sort(strategies.balanced(groups, rows, number, generator))
    sizes = np.bincount(groups[np.isin(rows, chosen)], minlength=groups.max() + 1).tolist()
    return Choice(chosen, {"balance": {"chosen": sizes}}, notes, clusters)


def choose_by_cluster(
    options: Namespace, data: RowData, rows: np.ndarray, number: int | None
) -> Choice:
    """k-means of the embeddings, then some rows of each cluster, together `number` if given."""
    notes = choose_num_clusters(options, rows, number)
    result = cluster(options, data, rows)

    def spread(per_cluster: int) -> np.ndarray:
        """At most `per_cluster` rows of each cluster."""
        return strategies.spread_over_clusters(
            result.assignment, data.perplexity, rows, per_cluster, options.band
        )

    sizes = np.bincount(result.assignment, minlength=options.clusters)
    if number is None:
        chosen = spread(options.per_cluster)
        notes += cluster_limits(result.assignment, np.isin(rows, chosen), options)
    else:
        # The smallest number per cluster that gives enough rows; then the clusters take turns.
        levels = range(1, sizes.max() + 1)
        level = levels[bisect_left(levels, number, key=lambda level: len(spread(level)))]
        chosen = np.sort(spread(level))
        groups = result.assignment[np.searchsorted(rows, chosen)]
        generator = np.random.default_rng(options.seed)
        chosen = strategies.balanced(groups, chosen, number, generator)
    if len(chosen) == 0:
        raise UserError("no row is in the --band of any cluster. Widen the band.")
    is_chosen = np.isin(rows, chosen)
    notes += band_limits(result.assignment, data.perplexity[rows], is_chosen, options)
    details = {"inertia": result.inertia, "steps": result.num_steps, "sizes": sizes.tolist()}
    return Choice(np.sort(chosen), {"clusters": details}, notes, (rows, result.assignment))


def choose_num_clusters(options: Namespace, rows: np.ndarray, number: int | None) -> list[str]:
    """Set --clusters, if it is not given: no more clusters than rows to choose. Returns notes.

    number: the rows to choose; None if all `rows` may be chosen.
    """
    if options.clusters is not None:
        return []
    most = min(len(rows), number or len(rows))
    options.clusters = min(NUM_CLUSTERS, most)
    if options.clusters == NUM_CLUSTERS:
        return []
    return [
        f"{most} clusters, not {NUM_CLUSTERS}: there are only {most} rows to choose. --clusters "
        "sets another number."
    ]


def cluster(options: Namespace, data: RowData, rows: np.ndarray) -> Clusters:
    """k-means of the embeddings of these rows."""
    return kmeans(ArrayRows(data.embeddings, rows), options.clusters, options.seed, options.starts)
