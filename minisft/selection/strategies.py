"""Which rows to train on: the strategies of select.py, as functions of arrays.

    chosen = highest(scores["ifd"], np.flatnonzero(scores["ifd"] < 1), number=150)

`rows` is an array of the row numbers that may be chosen; everything else is indexed by row number.
Each function returns row numbers. Where two rows are equal, the earlier one in the file is taken.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minisft.common.errors import UserError
from minisft.data.row_values import BadRow
from minisft.selection.kmeans import Space
from minisft.selection.near_duplicates import near_duplicates

# random_matched: the lengths to match are cut into so many ranges of equally many rows.
LENGTH_RANGES = 20


@dataclass
class Inputs:
    """What there is to choose by; arrays are indexed by row number."""

    rows: np.ndarray | None = None  # numbers of all that are neither broken nor left out
    scores: dict | None = None  # columns, as scores.read_scores gives them
    embeddings: np.ndarray | None = None  # (rows, D)
    perplexity: np.ndarray | None = None  # of the instructions
    reference: list | None = None  # the rows of the selection whose lengths to match
    lengths: np.ndarray | None = None  # of the answers
    unit: str = "characters"  # of the lengths
    clustered: tuple | None = None  # (row numbers, cluster of each)
    hashes: dict = field(default_factory=dict)  # of the files


@dataclass
class Chosen:
    """Some rows of an array (N, D), which may be mapped: copied only as they are asked for."""

    points: np.ndarray
    rows: np.ndarray  # their numbers

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, places):
        return self.points[self.rows[places]]

    @property
    def shape(self):
        """(rows, D)"""
        return len(self.rows), self.points.shape[1]


class Candidates:
    """The rows that may be chosen, fewer and fewer, and how many were dropped for what reason."""

    def __init__(self, num_rows):
        self.rows, self.dropped = np.arange(num_rows), {}

    def drop(self, mask, why):
        """Drop the rows where the mask (all rows,) is True."""
        gone = mask[self.rows]
        if gone.any():
            self.rows = self.rows[~gone]
            self.dropped[why] = self.dropped.get(why, 0) + int(gone.sum())

    def drop_unscored(self, reasons):
        """Drop the rows that have a reason, counted by the kind of reason."""
        kinds = np.array([reason and reason.split(":")[0] for reason in reasons], object)
        for kind in sorted(set(kinds) - {None}):
            self.drop(kinds == kind, kind)


def lengths_of(rows, candidates):
    """Characters of the answers (rows,), 0 for broken rows, which are dropped.

    UserError for a broken row, unless `rows` were opened to skip them.
    """
    lengths, broken = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for number in range(len(rows)):
        try:
            messages = rows[number].messages
        except BadRow as error:
            if not rows.skip_bad_rows:
                raise UserError(f"{error} (--skip_bad_rows leaves such rows out)") from error
            broken[number] = True
        else:
            lengths[number] = sum(
                len(message["content"]) for message in messages if message["role"] == "assistant"
            )
    candidates.drop(broken, "broken")
    return lengths


def drop_duplicates(rows, candidates, similarity):
    """Drop the candidates whose instruction is nearly that of one before them."""
    duplicate = np.zeros(len(rows), bool)
    texts = Instructions(rows, candidates.rows)
    duplicate[candidates.rows] = near_duplicates(texts, similarity)
    candidates.drop(duplicate, "near-identical instruction")


class Instructions(Sequence):
    """What the user says in the rows of these numbers, read when it is asked for."""

    def __init__(self, rows, numbers):
        self.rows, self.numbers = rows, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        messages = self.rows[int(self.numbers[index])].messages
        return "\n".join(
            text
            for message in messages
            if message["role"] == "user"
            for text in (message["content"], message.get("input"))
            if text
        )


def highest(values, rows, number):
    """The `number` rows with the highest values."""
    return rows[np.argsort(-values[rows], kind="stable")[: enough(rows, number)]]


def middle(values, rows, number):
    """The `number` rows around the median of the values."""
    order = rows[np.argsort(values[rows], kind="stable")]
    start = (len(order) - enough(rows, number)) // 2
    return order[start : start + number]


def at_random(rows, number, generator):
    """`number` rows, each as likely as any other."""
    return generator.choice(rows, enough(rows, number), replace=False)


def enough(rows, number):
    """`number`; UserError where there are fewer rows to choose from."""
    if number > len(rows):
        raise UserError(
            f"{number:,} rows are wanted and only {len(rows):,} can be chosen "
            "from (the others have no score, or were dropped); lower --sample_number "
            "or --sample_rate"
        )
    return number


def from_clusters(assignment, perplexity, rows, per_cluster, band):
    """`per_cluster` rows of every cluster, spread evenly over a band of its perplexities.

    assignment: the cluster of each of `rows`. band: two percentiles. A cluster that has no more
    than `per_cluster` rows, or fewer in the band, gives those it has (arXiv 2308.12032, section 2).
    """
    chosen = [rows[:0]]
    for cluster in np.unique(assignment):
        members = rows[assignment == cluster]
        if len(members) > per_cluster:
            low, high = np.percentile(perplexity[members], band)
            inside = (perplexity[members] >= low) & (perplexity[members] <= high)
            members = members[inside]
            members = members[np.argsort(perplexity[members], kind="stable")]
            spread = np.linspace(0, len(members) - 1, min(per_cluster, len(members)))
            members = members[np.unique(spread.round().astype(int))]
        chosen.append(members)
    return np.concatenate(chosen)


def k_center(embeddings, rows, number):
    """`number` rows, each as far as can be from those before it (Gonzalez 1985).

    The first is the row nearest to the mean of all.
    """
    space = Space(Chosen(embeddings, rows))
    chosen = [space.squares.argmin()] if enough(rows, number) else []
    nearest = np.full(len(rows), np.inf, np.float32)
    while len(chosen) < number:
        distances = space.distances(space.points[chosen[-1:]] - space.mean)[0]
        nearest = np.minimum(nearest, distances)
        nearest[chosen] = -1  # never twice, however many rows are equal
        chosen.append(nearest.argmax())
    return rows[np.array(chosen, int)]


def matched(lengths, rows, reference, generator):
    """Random rows with the distribution of lengths that the rows `reference` have.

    Their lengths are cut into ranges that hold equally many of them; from all rows in a range as
    many are drawn. Where few rows are as long as those, most of them come again.
    """
    wanted = np.sort(lengths[reference])
    ranges = np.array_split(wanted, min(LENGTH_RANGES, len(wanted)))
    chosen, below = [], -math.inf
    for number, part in enumerate(ranges):
        last = number + 1 == len(ranges)
        # Halfway to the next range, so that every length between the extremes is in one.
        above = part[-1] if last else (part[-1] + ranges[number + 1][0]) / 2
        first = wanted[0] if number == 0 else below
        inside = rows[(lengths[rows] > below) & (lengths[rows] >= first) & (lengths[rows] <= above)]
        count = int(((wanted > below) & (wanted <= above)).sum())
        if count > len(inside):
            raise UserError(
                f"--match has {count:,} rows of a length that only {len(inside):,} of "
                "the rows have which can be chosen here; choose --match with the same "
                "--dedup and --skip_bad_rows"
            )
        chosen.append(at_random(inside, count, generator) if count else inside[:0])
        below = above
    return np.concatenate(chosen)


def write(files, chosen, manifest, output):
    """Write the chosen records, as they are in their files, and the manifest; both or none.

    JSON lines to a .jsonl, an array to a .json; to another name what the files are.
    """
    ends = np.cumsum([len(file.records) for file in files])
    array = {".jsonl": False, ".json": True}.get(
        output.suffix, all(not hasattr(file.records, "raw") for file in files)
    )
    begin, between, end = ("[\n", ",\n", "\n]\n") if array else ("", "\n", "\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, manifest_partial = (
        output.with_name(output.name + ending) for ending in (".partial", ".manifest.partial")
    )
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for count, number in enumerate(chosen.tolist()):
                place = int(np.searchsorted(ends, number, side="right"))
                records = files[place].records
                local = number - int(ends[place]) + len(records)
                raw = (
                    records.raw(local).decode()
                    if hasattr(records, "raw")
                    else json.dumps(records[local], ensure_ascii=False)
                )
                file.write((between if count else begin) + raw.strip())
            file.write(end)
        manifest_partial.write_text(json.dumps(manifest, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, output)
        os.replace(manifest_partial, f"{output}.manifest")
    finally:
        partial.unlink(missing_ok=True)
        manifest_partial.unlink(missing_ok=True)
