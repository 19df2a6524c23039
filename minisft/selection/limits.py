"""Notes on the limits of a choice: small clusters, rows outside the band, long rows."""

from argparse import Namespace

import numpy as np


def cluster_limits(assignment: np.ndarray, is_chosen: np.ndarray, options: Namespace) -> list[str]:
    """Notes if clusters have fewer rows than --per_cluster, or if all rows were chosen.

    assignment, is_chosen: the cluster of each row, and whether it was chosen (rows,).
    """
    wanted = options.per_cluster
    if is_chosen.all():
        return [
            f"Chose all {len(is_chosen):,} rows: none of the {options.clusters} clusters has more "
            f"than --per_cluster {wanted} rows. Lower --clusters or --per_cluster, or give "
            "--sample_rate."
        ]
    sizes = np.bincount(assignment, minlength=options.clusters)
    taken = np.bincount(assignment[is_chosen], minlength=options.clusters)
    is_small = sizes < wanted
    low, high = options.band
    reasons = [
        f"{count} {'has' if count == 1 else 'have'} fewer rows {where}".rstrip()
        for count, where in (
            (int(is_small.sum()), ""),
            (int(((taken < wanted) & ~is_small).sum()), f"in --band {low:g},{high:g}"),
        )
        if count
    ]
    if not reasons:
        return []
    return [
        f"{is_chosen.sum():,} rows, not {options.clusters} clusters x {wanted}: "
        f"{', '.join(reasons)}."
    ]


def band_limits(
    assignment: np.ndarray, perplexity: np.ndarray, is_chosen: np.ndarray, options: Namespace
) -> list[str]:
    """A note if rows outside --band were chosen: small clusters are taken completely.

    assignment, perplexity, is_chosen: of each row (rows,).
    """
    if is_chosen.all():
        return []
    is_outside = np.zeros(len(assignment), bool)
    for cluster in np.unique(assignment[is_chosen]):
        members = assignment == cluster
        low, high = np.percentile(perplexity[members], options.band)
        is_outside |= members & ((perplexity < low) | (perplexity > high))
    low, high = options.band
    if count := int((is_outside & is_chosen).sum()):
        return [
            f"{count:,} of {is_chosen.sum():,} chosen rows are outside --band {low:g},{high:g}: "
            "clusters with too few rows are taken completely. Choose fewer rows, or give fewer "
            "--clusters."
        ]
    return []


def length_limits(
    num_tokens: np.ndarray, chosen: np.ndarray, scored: int | None, trained: int
) -> list[str]:
    """Warnings about chosen rows that scoring could not see, or that training will truncate.

    num_tokens: the lengths of all rows (rows,), NaN if unknown. scored: --cutoff_len of score.py.
    trained: the default --cutoff_len of train.py.
    """
    lengths, notes = num_tokens[chosen], []
    if scored and (count := int((lengths > scored).sum())):
        notes.append(
            f"warning: {count:,} of {len(chosen):,} chosen rows are longer than {scored:,} "
            "tokens, the --cutoff_len of the scores, and have no score."
        )
    if count := int((lengths > trained).sum()):
        notes.append(
            f"warning: {count:,} of {len(chosen):,} chosen rows are longer than {trained:,} "
            "tokens, and train.py truncates them by default. "
            f"--cutoff_len {int(np.nanmax(lengths))} keeps all of them whole."
        )
    return notes
