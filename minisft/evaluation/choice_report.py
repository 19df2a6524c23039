"""What a multiple-choice run leaves behind: a CSV per subject, summary.json, submission.json.

    write_rows("runs/ceval/ceval-val/law.csv", rows)
    summary = summarize(subjects, {"law": read_rows("runs/ceval/ceval-val/law.csv")}, num_fewshot=5)
    print(table(summary))

Rows are the dicts of `multiple_choice.answer_subject`. Shares are from 0 to 1, intervals 95 %.
"""

import csv
import io
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.outputs import atomic_write
from minisft.evaluation.benchmarks import LETTERS
from minisft.evaluation.confidence import macro_interval, mcnemar, mean_interval, wilson

COLUMNS = ("run", "id", "answer", "prediction", *LETTERS, "num_fewshot", "is_cut")


def write_rows(path, rows):
    """Write a subject's rows, all or nothing: a file that is there is complete."""
    path = Path(path)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                **row,
                **{letter: f"{row[letter]:.6f}" for letter in LETTERS},
                "is_cut": int(row["is_cut"]),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue())


def read_rows(path):
    """The rows that `write_rows` wrote."""
    kinds = {
        "run": int,
        "num_fewshot": int,
        "is_cut": lambda text: text == "1",
        "answer": lambda text: text or None,
        **dict.fromkeys(LETTERS, float),
    }
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                {name: kinds.get(name, str)(row[name]) for name in COLUMNS}
                for row in csv.DictReader(file)
            ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a subject's results ({error}); remove it") from error


def read_finished(path, subject, num_runs):
    """The rows of a finished subject; UserError if they are not of the questions it has now."""
    rows = read_rows(path)
    wanted = [(run, one.id, one.answer) for run in range(num_runs) for one in subject.questions]
    if [(row["run"], row["id"], row["answer"]) for row in rows] != wanted:
        raise UserError(
            f"{path}: is not about the questions that {subject.key} has now; remove "
            "it, or give another --output_dir"
        )
    return rows


def read_baseline(subjects, folder):
    """Which questions an earlier run got right: {subject: {question id: bool}}.

    folder: of that run's CSV files. Of repetitions the first one counts. UserError where there is
    nothing to compare with.
    """
    found, common = {}, 0
    for subject in subjects:
        path, asked = Path(folder) / f"{subject.key}.csv", {one.id for one in subject.questions}
        if not path.is_file():
            raise UserError(
                f"--baseline_dir: {path} is not there; give the output folder of a run "
                "over the same benchmark, split and subjects"
            )
        if any(one.answer is None for one in subject.questions):
            raise UserError(
                f"--baseline_dir: the answers of {subject.key} are not told in this "
                "split, so nobody knows which run was right"
            )
        found[subject.key] = {
            row["id"]: row["prediction"] == row["answer"]
            for row in read_rows(path)
            if row["run"] == 0
        }
        common += len(asked & set(found[subject.key]))
    if not common:
        raise UserError(f"--baseline_dir {folder}: has no question in common with this run")
    return found


def summarize(subjects, rows_of, num_fewshot):
    """Accuracies of subjects, groups and all, with intervals, and what was dropped; a dict.

    rows_of: subject key -> rows. `macro` is the plain mean over subjects, `weighted` counts every
    question alike. Without answers there are counts alone.
    """
    all_rows = [row for subject in subjects for row in rows_of[subject.key]]
    # Repetitions ask the same questions again, so they do not make the sample larger.
    first = [row for row in all_rows if row["run"] == 0]
    shown = {one.key: min(num_fewshot, len(one.demonstrations)) for one in subjects}
    dropped = [
        shown[one.key] - row["num_fewshot"]
        for one in subjects
        for row in rows_of[one.key]
        if row["run"] == 0
    ]
    summary = {
        "num_questions": len(first),
        "questions_with_dropped_demonstrations": sum(number > 0 for number in dropped),
        "dropped_demonstrations": sum(dropped),
        "questions_cut": sum(row["is_cut"] for row in first),
    }
    if any(row["answer"] is None for row in all_rows):
        return summary
    each = {}
    for subject in subjects:
        rows = rows_of[subject.key]
        count, rate = len(subject.questions), _rate(rows)
        each[subject.key] = {
            "name": subject.name,
            "group": subject.group,
            "num_questions": count,
            "accuracy": rate,
            "interval": wilson(rate, count),
        }
    groups = {}
    for name in sorted({entry["group"] for entry in each.values()} - {""}):
        groups[name] = _averages([entry for entry in each.values() if entry["group"] == name])
    summary |= _averages(list(each.values()))
    runs = sorted({row["run"] for row in all_rows})
    if len(runs) > 1:
        summary["macro_of_each_run"] = [
            sum(_rate([row for row in rows_of[one.key] if row["run"] == run]) for one in subjects)
            / len(subjects)
            for run in runs
        ]
    return summary | {"groups": groups, "subjects": each}


def _rate(rows):
    return sum(row["prediction"] == row["answer"] for row in rows) / len(rows)


def _averages(entries):
    counts = [(entry["accuracy"], entry["num_questions"]) for entry in entries]
    total = sum(count for _, count in counts)
    weighted = sum(rate * count for rate, count in counts) / total
    return {
        "macro": {
            "accuracy": sum(rate for rate, _ in counts) / len(counts),
            "interval": macro_interval(counts),
        },
        "weighted": {"accuracy": weighted, "interval": wilson(weighted, total)},
        "num_questions": total,
    }


def submission(subjects, rows_of):
    """The predictions of the first run as C-Eval takes them: {subject: {id: letter}}."""
    return {
        one.key: {row["id"]: row["prediction"] for row in rows_of[one.key] if row["run"] == 0}
        for one in subjects
    }


def compare_with(baseline, rows_of):
    """The difference to an earlier run over the questions of both: interval, McNemar's test.

    baseline: what `read_baseline` found. Of repetitions the first one counts.
    """
    pairs = [
        (before[row["id"]], row["prediction"] == row["answer"])
        for key, before in baseline.items()
        for row in rows_of[key]
        if row["run"] == 0 and row["id"] in before
    ]
    difference, low, high = mean_interval([after - before for before, after in pairs], -1, 1)
    lost, gained = (
        sum(pair == wanted for pair in pairs) for wanted in ((True, False), (False, True))
    )
    return {
        "num_questions": len(pairs),
        "difference": difference,
        "interval": (low, high),
        "only_baseline_right": lost,
        "only_this_right": gained,
        "p_value": mcnemar(lost, gained),
    }


def table(summary):
    """The summary as lines for a terminal, in percent."""
    lines = []
    for key, entry in summary["subjects"].items():
        lines.append(_line(key, entry["num_questions"], entry))
    for name, entry in summary["groups"].items():
        lines.append(_line(name, entry["num_questions"], entry["macro"]))
    lines.append(_line("mean over subjects", summary["num_questions"], summary["macro"]))
    lines.append(_line("mean over questions", summary["num_questions"], summary["weighted"]))
    return "\n".join(lines)


def _line(name, count, entry):
    low, high = entry["interval"]
    return (
        f"{name:<40} {count:>6} {100 * entry['accuracy']:>6.1f} %"
        f"  ({100 * low:.1f} to {100 * high:.1f})"
    )
