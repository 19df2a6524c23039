"""The answers of a model to a benchmark, as CSV files: one for each subject.

write_predictions("runs/ceval/ceval-val/law.csv", predictions)
predictions = read_finished("runs/ceval/ceval-val/law.csv", subject, num_runs=1)
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.outputs import atomic_write
from minisft.evaluation.benchmarks import LETTERS, Subject

COLUMNS = ("run", "id", "question", "answer", "prediction", *LETTERS, "num_fewshot", "is_cut")
# Subject -> {(id, digest) of a question: whether the baseline answered it right}.
Baseline = dict[str, dict[tuple[str, str], bool]]


@dataclass(frozen=True)
class Prediction:
    """The letter that a model chose for a question, and why."""

    run: int  # number of the repetition
    id: str  # the question
    question: str  # its digest
    answer: str | None  # the right letter; None if it is secret
    prediction: str  # the letter with the highest log-likelihood
    log_likelihoods: list[float]  # for A, B, C, D
    num_fewshot: int  # demonstrations in the prompt
    is_cut: bool  # whether the question lost its beginning

    @property
    def is_right(self) -> bool:
        """True if the model chose the right letter."""
        return self.prediction == self.answer


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write the predictions of a subject. If its file exists, the subject is finished."""
    path = Path(path)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in predictions:
        scores = [f"{value:.6f}" for value in row.log_likelihoods]
        begin = [row.run, row.id, row.question, row.answer, row.prediction]
        writer.writerow([*begin, *scores, row.num_fewshot, int(row.is_cut)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue())


def read_predictions(path: str | Path) -> list[Prediction]:
    """The predictions in a file that `write_predictions` wrote."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                Prediction(
                    int(row["run"]),
                    row["id"],
                    row["question"],
                    row["answer"] or None,
                    row["prediction"],
                    [float(row[letter]) for letter in LETTERS],
                    int(row["num_fewshot"]),
                    row["is_cut"] == "1",
                )
                for row in csv.DictReader(file)
            ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the results of a subject ({error}). Remove it.") from error


def read_finished(path: str | Path, subject: Subject, num_runs: int) -> list[Prediction]:
    """The predictions of a finished subject. UserError if its questions have changed since."""
    predictions = read_predictions(path)
    expected = [
        (run, question.id, question.digest)
        for run in range(num_runs)
        for question in subject.questions
    ]
    if [(row.run, row.id, row.question) for row in predictions] != expected:
        raise UserError(
            f"{path}: its questions are not those that {subject.key} has now. Remove it, or "
            "give another --output_dir."
        )
    return predictions


def unfinished_subjects(subjects: Sequence[Subject], folder: Path, num_runs: int) -> list[Subject]:
    """The subjects without a file of predictions. UserError for a file that does not fit."""
    unfinished = []
    for subject in subjects:
        path = folder / f"{subject.key}.csv"
        if path.is_file():
            read_finished(path, subject, num_runs)
        else:
            unfinished.append(subject)
    return unfinished


def read_baseline(subjects: Sequence[Subject], folder: str | Path) -> Baseline:
    """Which questions an earlier run answered right, in its first repetition.

    folder: holds the CSV files of that run. UserError if there is nothing to compare with.
    """
    baseline: Baseline = {}
    num_common = 0
    for subject in subjects:
        path = Path(folder) / f"{subject.key}.csv"
        if not path.is_file():
            raise UserError(
                f"--baseline_dir: there is no {path}. Give the output folder of a run with the "
                "same benchmark, split and subjects."
            )
        if any(question.answer is None for question in subject.questions):
            raise UserError(
                f"--baseline_dir: the answers of {subject.key} are secret in this split, so runs "
                "cannot be compared"
            )
        rows = read_predictions(path)
        baseline[subject.key] = {
            (row.id, row.question): row.is_right for row in rows if row.run == 0
        }
        known = baseline[subject.key]
        num_common += sum((one.id, one.digest) in known for one in subject.questions)
    if not num_common:
        raise UserError(
            f"--baseline_dir {folder}: has no question in common with this run. Give the output "
            "folder of a run on the same data."
        )
    return baseline
