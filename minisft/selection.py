"""Which rows to train on: the strategies of select.py, as functions of arrays.

    chosen = highest(scores["ifd"], np.flatnonzero(scores["ifd"] < 1), number=150)

`rows` is an array of the row numbers that may be chosen; everything else is indexed by row number.
Each function returns row numbers. Where two rows are equal, the earlier one in the file is taken.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minisft.formats import BadRow
from minisft.kmeans import Space
from minisft.options import UserError

# Near-identical texts: hashes of a signature, and how many of them must agree for a closer look.
NUM_HASHES, BAND = 128, 4
SHINGLE = 5  # characters
# random_matched: the lengths to match are cut into so many ranges of equally many rows.
LENGTH_RANGES = 20


@dataclass
class Inputs:
    """What there is to choose by; arrays are indexed by row number."""

    scores: dict | None = None  # columns, as scores.read_scores gives them
    embeddings: np.ndarray | None = None  # (rows, D)
    perplexity: np.ndarray | None = None  # of the instructions
    reference: list | None = None  # the rows of the selection whose lengths to match
    lengths: np.ndarray | None = None  # of the answers
    unit: str = ""  # of the lengths
    clustered: tuple | None = None  # (row numbers, cluster of each)
    hashes: dict = field(default_factory=dict)  # of the files


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
            lengths[number] = sum(len(message["content"]) for message in messages
                                  if message["role"] == "assistant")
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
        return "\n".join(text for message in messages if message["role"] == "user"
                         for text in (message["content"], message.get("input")) if text)


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
        raise UserError(f"{number:,} rows are wanted and only {len(rows):,} can be chosen from; "
                        "lower --sample_number or --sample_rate")
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
    space = Space(embeddings[rows])
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
        inside = rows[(lengths[rows] > below) & (lengths[rows] >= first)
                      & (lengths[rows] <= above)]
        count = int(((wanted > below) & (wanted <= above)).sum())
        if count > len(inside):
            raise UserError(f"--match has {count:,} rows of a length that only {len(inside):,} of "
                            "the rows have which can be chosen here; choose --match with the same "
                            "--dedup and --skip_bad_rows")
        chosen.append(at_random(inside, count, generator) if count else inside[:0])
        below = above
    return np.concatenate(chosen)


def near_duplicates(texts, similarity):
    """bool (N,): texts that are nearly one before them.

    That is, of the runs of five characters that either of the two has, they share at least
    `similarity`; case, punctuation and white space do not count. texts: a sequence, of which
    those that are compared are read again. Candidates come from MinHash signatures (Broder 1997),
    which find practically all pairs from 0.7 on.
    """
    generator = np.random.default_rng(0)
    factors = generator.integers(1, 2**63, (2, NUM_HASHES), dtype=np.uint64) | np.uint64(1)
    duplicate, kept = np.zeros(len(texts), bool), {}
    for number in range(len(texts)):
        shingles = shingles_of(texts[number])
        # In blocks: of a text of a million characters all hashes at once would fill the memory.
        signature = np.min([(shingles[start : start + 4096, None] * factors[0] + factors[1]).min(0)
                            for start in range(0, len(shingles), 4096)], axis=0)
        keys = [(band, signature[band : band + BAND].tobytes())
                for band in range(0, NUM_HASHES, BAND)]
        candidates = {kept[key] for key in keys if key in kept}
        if any(overlap(shingles, shingles_of(texts[other])) >= similarity
               for other in sorted(candidates)):
            duplicate[number] = True
        else:
            for key in keys:
                kept.setdefault(key, number)
    return duplicate


def shingles_of(text):
    """The distinct runs of five characters of a text as hashes, uint64 (n,), n at least 1."""
    text = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    text = text.ljust(SHINGLE)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, SHINGLE)
    hashes = np.zeros(len(windows), np.uint64)
    for column in windows.T:
        hashes = (hashes + column + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def overlap(left, right):
    """The share of their elements that two sets have in common (Jaccard)."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)


def principal_components(points, number=2, steps=8, seed=0):
    """Points (N, D) -> (N, number), their projections on the directions of largest variance.

    Subspace iteration in blocks (Halko et al. 2011): the points are read `steps` times.
    """
    space = Space(points)
    width = min(number + 8, points.shape[1])
    basis = np.random.default_rng(seed).standard_normal((points.shape[1], width))
    for _ in range(steps):
        image = np.zeros_like(basis)
        for _, block in space.blocks():
            centered = block - space.mean
            image += centered.T @ (centered @ basis.astype(np.float32))
        basis, variances, _ = np.linalg.svd(image, full_matrices=False)
    axes = basis[:, :number].astype(np.float32)
    return np.concatenate([(block - space.mean) @ axes for _, block in space.blocks()])


def draw(inputs, chosen, strategy, output):
    """Draw what there is, scores and embeddings, with the chosen rows marked; returns the path."""
    from matplotlib.figure import Figure

    panels = (inputs.scores is not None) + (inputs.embeddings is not None)
    figure = Figure(figsize=(6 * panels, 4.5), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    if inputs.scores is not None:
        has_rewards = np.isfinite(inputs.scores["reward"]).any()
        name = "reward" if has_rewards else "ifd_ppl" if strategy == "ifd_ppl" else "ifd"
        values = inputs.scores[name]
        shown = values[np.isfinite(values)]
        bins = np.linspace(0, max(1.2, np.percentile(shown, 99)) if len(shown) else 1.2, 80)
        if has_rewards:
            bins = np.linspace(shown.min(), shown.max() + 1e-6, 80)
        else:
            axes[0].axvline(1, color="black", linewidth=0.8)
        axes[0].hist(shown, bins, color="#b0b8c0", label="all rows")
        axes[0].hist(values[chosen], bins, color="#d1495b", label="chosen")
        axes[0].set(xlabel=name, ylabel="rows")
        axes[0].legend()
    if inputs.embeddings is not None:
        rows, cluster = inputs.clustered or (np.arange(len(inputs.embeddings)), None)
        points = principal_components(inputs.embeddings)
        colors = {"color": "#b0b8c0"} if cluster is None else {"c": cluster, "cmap": "tab20"}
        axes[-1].scatter(*points[rows].T, s=4, alpha=0.5, linewidths=0, **colors)
        axes[-1].scatter(*points[chosen].T, s=14, facecolors="none", edgecolors="black",
                         linewidths=0.6, label="chosen")
        axes[-1].set(xlabel="first principal component", ylabel="second")
        axes[-1].legend()
    figure.suptitle(f"{strategy}: {len(chosen):,} rows chosen")
    path = Path(output).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path
