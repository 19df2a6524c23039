"""Chapter 11: the IFD and the embeddings of the embedded data set, with the kinds of its rows."""

import json
from dataclasses import dataclass

import numpy as np

from docs.tour.lab import DATA, base_template, encoded, fine_tune, ifd_scores
from minisft.data.dataset import load_rows

NUM_ROWS, NUM_FIRST = 1000, 300


@dataclass
class ScoredRows:
    """s(A) and s(A|Q) of each row (N,), embeddings (N, D); kind and quality from the file (N,)."""

    direct: np.ndarray
    conditioned: np.ndarray
    embeddings: np.ndarray
    kinds: np.ndarray
    qualities: np.ndarray


def scored_rows() -> ScoredRows:
    """Rows scored by the embedded model after 20 steps on other rows."""
    template, path = base_template(), DATA / "train.json"
    rows, records = load_rows(path), json.loads(path.read_text("utf-8"))
    model, _ = fine_tune(encoded(rows[-NUM_FIRST:], template), num_steps=20)
    scores = ifd_scores(model, template, rows[:NUM_ROWS])
    places = [place for place, score in enumerate(scores) if score.record["ifd"] is not None]
    kept = [scores[place].record for place in places]
    embeddings = [scores[place].embedding for place in places]
    return ScoredRows(
        np.array([record["loss_direct"] for record in kept]),
        np.array([record["loss_conditioned"] for record in kept]),
        np.stack([embedding for embedding in embeddings if embedding is not None]),
        np.array([records[place]["kind"] for place in places]),
        np.array([records[place]["quality"] for place in places]),
    )
