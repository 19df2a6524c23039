"""How each strategy of the selection study chooses rows for a budget.

    folder = Path("runs/selection")               # prepare() of selection.py has filled it
    rows = choose_rows(folder, "ifd", Budget.parse("300"), seed=0)
    rows = choose_rows(folder, "ifd", Budget.parse("300t"), seed=0)      # as many answer tokens

A budget of N rows is the same number of rows for all. A budget of N "t" is the same number of
answer tokens: that of N rows of mean length. Strategies that like long answers then get fewer rows.
"""

from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from bench.measure import flags
from bench.selection_options import ALL_ROWS, STRATEGIES, Budget
from minisft.selection import strategies
from minisft.selection.choose import Candidates, choose, read_row_data
from minisft.selection.provenance import dataset_record
from minisft.selection.rows import answer_lengths, open_every_row
from minisft.selection.score_files import read_scores
from minisft.selection.select_options import parse_options


@cache
def scored(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file of scores, by row."""
    return read_scores(path, len(path.read_bytes().splitlines()))


def choose_rows(
    folder: Path, strategy: str, budget: Budget, seed: int, clusters: int = 100
) -> np.ndarray:
    """The numbers of the chosen rows of folder/pool.json, sorted.

    seed: of random choice and k-means; the other strategies choose the same rows for every seed.
    """
    scores = scored(folder / "ifd.jsonl")
    lengths, num_rows = scores["num_answer_tokens"], len(scores["num_answer_tokens"])
    if strategy in ALL_ROWS:
        return np.arange(num_rows)
    if strategy == "random_matched":
        reference = choose_rows(folder, "ifd", budget, seed, clusters)
        generator = np.random.default_rng(seed)
        rows = strategies.at_random_with_lengths(lengths, np.arange(num_rows), reference, generator)
        return np.sort(rows)

    if strategy == "random" and budget.is_tokens:  # the first rows of one drawn order
        order = np.random.default_rng(seed).permutation(num_rows)
        limit = budget.num_rows * float(lengths.mean())
        return within_tokens(lambda number: np.sort(order[:number]), lengths, limit, num_rows)

    def of_size(number: int) -> np.ndarray:
        if strategy == "ifd_lowest":
            below_1 = np.flatnonzero(scores["ifd"] < 1)
            return np.sort(strategies.highest(-scores["ifd"], below_1, number))
        return select(folder, strategy, number, seed, clusters)

    if not budget.is_tokens:
        return of_size(budget.num_rows)
    limit = budget.num_rows * float(lengths.mean())
    return within_tokens(of_size, lengths, limit, num_rows // 2)


def select(folder: Path, strategy: str, number: int, seed: int, clusters: int) -> np.ndarray:
    """`number` rows, as select.py chooses them."""
    needs = STRATEGIES[strategy].needs
    scores = folder / ("pre_ifd.jsonl" if "pre_ifd" in needs else "ifd.jsonl")
    embeddings, target = None, None
    if needs == ("embed",):
        embeddings = folder / "embed.embeddings.npy"
    if "weighted" in needs:
        embeddings = folder / "weighted.embeddings.npy"
        target = folder / f"{needs[1]}.embeddings.npy"
    words = flags(dataset=folder / "pool.json", scores=scores, embeddings=embeddings, target=target)
    words += flags(sample_number=number, seed=seed, output=folder / "chosen.json")
    if strategy == "kmeans":
        words += flags(clusters=clusters)
    options = parse_options([*words, *STRATEGIES[strategy].flags])
    rows, is_drawn = open_every_row(options.dataset, options.dataset_dir, False, False)
    data = read_row_data(
        options, len(rows), dataset_record(rows, is_drawn), answer_lengths(rows, is_drawn)[0]
    )
    return choose(options, data, Candidates(len(rows)), number).rows


def within_tokens(
    of_size: Callable[[int], np.ndarray], lengths: np.ndarray, limit: float, most: int
) -> np.ndarray:
    """The largest choice, of up to `most` rows, whose answers have at most `limit` tokens.

    of_size: number of rows -> the rows. Larger choices should have more tokens; where that holds
    only about, as for random rows, the result is only about the largest.
    """

    def num_tokens(number: int) -> float:
        return float(lengths[of_size(number)].sum())

    number = bisect_right(range(1, most + 1), limit, key=num_tokens)
    return of_size(max(1, number))
