"""eval.py through the command line, and the figures it reports."""

import csv
import json
from dataclasses import replace

import pytest
from conftest import command
from scipy import stats

from minisft.common.errors import UserError
from minisft.common.outputs import save_options
from minisft.evaluation.benchmarks import Question, Subject
from minisft.evaluation.choice_report import (
    compare_with_baseline,
    other_protocol,
    summarize,
    summary_lines,
)
from minisft.evaluation.confidence import macro_interval, mcnemar, mean_interval, wilson
from minisft.evaluation.options import parse_options
from minisft.evaluation.predictions import (
    Prediction,
    read_baseline,
    read_finished,
    read_predictions,
    write_predictions,
)


def question_of(id, answer="A"):
    return Question(id, "Q", ("a", "b", "c", "d"), answer)


def row(id, answer, prediction, run=0, num_fewshot=1):
    scores, digest = [-1.25, -2.0, -3.0, -4.5], question_of(id, answer).digest
    return Prediction(run, id, digest, answer, prediction, scores, num_fewshot, is_cut=False)


def subject_of(key, count, group=""):
    questions = [question_of(str(number)) for number in range(count)]
    return Subject(key, key, group, questions, questions)


def test_intervals_and_p_values_equal_scipy():
    for right, total in ((0, 5), (3, 7), (835, 1346), (9, 9)):
        interval = stats.binomtest(right, total).proportion_ci(method="wilson")
        assert wilson(right / total, total) == pytest.approx((interval.low, interval.high))
    for lost, gained in ((0, 0), (3, 9), (20, 18), (0, 6)):
        expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1
        assert mcnemar(lost, gained) == pytest.approx(expected)
    low, high = macro_interval([(0.6, 1346)])
    assert (high - low) / (2 * 1.96) == pytest.approx(0.0134, abs=1e-4)  # 1.3 points
    # Four parts of 100 are as good as one of 400, up to the smoothing of the rates.
    low, high = macro_interval([(0.5, 100)] * 4)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / 400**0.5, abs=1e-3)
    low, high = macro_interval([(1.0, 5), (1.0, 5)])
    assert low == pytest.approx(1 - 1.96 * (6 / 49 / 5 / 2) ** 0.5, abs=1e-3) and high == 1
    mean, low, high = mean_interval([1.0, 2.0, 3.0], 0, 4)
    assert (mean, high - mean) == (2.0, pytest.approx(1.96 / 3**0.5, abs=1e-3))
    assert mean_interval([0.0, 1.0], 0, 1)[1:] == (0, 1)
    assert mean_interval([0.25], -1, 1) == (0.25, -1, 1)


def test_averages_over_subjects_and_over_questions():
    subjects = [subject_of("law", 4, "Humanities"), subject_of("art", 1, "Humanities")]
    rows_of = {"law": [row(str(n), "A", "ABBB"[n]) for n in range(4)], "art": [row("0", "A", "A")]}
    summary = summarize(subjects, rows_of, num_fewshot=3)
    assert summary["macro"]["accuracy"] == pytest.approx((0.25 + 1) / 2)
    assert summary["weighted"]["accuracy"] == pytest.approx(2 / 5)
    assert summary["weighted"]["interval"] == wilson(2 / 5, 5)
    assert summary["groups"]["Humanities"]["macro"] == summary["macro"]
    # --num_fewshot 3: law has three demonstrations or more, art has one.
    assert summary["dropped_demonstrations"] == 4 * 2
    assert summary["questions_with_dropped_demonstrations"] == 4
    text = "\n".join(summary_lines(summary))
    assert "mean over subjects" in text and "62.5 %" in text


def test_repetitions_are_averaged_and_do_not_narrow_the_interval():
    subject = subject_of("law", 2)
    once = [row("0", "A", "A"), row("1", "A", "B")]
    again = [row("0", "A", "A", run=1), replace(row("1", "A", "A", run=1), is_cut=True)]
    once[1] = replace(once[1], is_cut=True)
    summary = summarize([subject], {"law": once + again}, 1)
    assert summary["weighted"]["accuracy"] == 0.75
    assert summary["weighted"]["interval"] == wilson(0.75, 2)
    assert summary["macro_of_each_run"] == [0.5, 1.0]
    assert (summary["num_questions"], summary["questions_cut"]) == (2, 1)


def test_predictions_are_read_back_and_compared_with_a_baseline(tmp_path):
    rows = [row(str(n), "A", "AABA"[n]) for n in range(4)]
    write_predictions(tmp_path / "law.csv", [row(str(n), "A", "ABAB"[n]) for n in range(4)])
    assert [one.prediction for one in read_predictions(tmp_path / "law.csv")] == list("ABAB")
    assert read_predictions(tmp_path / "law.csv")[0] == row("0", "A", "A")
    baseline = read_baseline([subject_of("law", 4)], tmp_path)
    change = compare_with_baseline(baseline, {"law": [*rows, row("0", "A", "B", run=1)]})
    assert (change["only_baseline_right"], change["only_this_right"]) == (1, 2)
    assert (change["num_questions"], change["difference"], change["p_value"]) == (4, 0.25, 1.0)
    assert change["interval"] == pytest.approx((-0.688, 1), abs=1e-3)
    same = compare_with_baseline(baseline, {"law": read_predictions(tmp_path / "law.csv")})
    assert same["interval"] is None  # not (0, 0)
    with pytest.raises(UserError, match="there is no .*art.csv"):
        read_baseline([subject_of("art", 1)], tmp_path)
    other = replace(subject_of("law", 1), questions=[Question("9", "Q", ("",) * 4, "A")])
    with pytest.raises(UserError, match="no question in common"):
        read_baseline([other], tmp_path)
    # The same ids, but other questions: nothing can be paired.
    other = [replace(one, text="Q?") for one in subject_of("law", 4).questions]
    with pytest.raises(UserError, match="no question in common"):
        read_baseline([replace(subject_of("law", 4), questions=other)], tmp_path)
    (tmp_path / "law.csv").write_text("run,id\n0,1\n")
    with pytest.raises(UserError, match="not the results of a subject"):
        read_predictions(tmp_path / "law.csv")


def test_a_run_with_other_questions_is_not_continued(tmp_path):
    path, law = tmp_path / "law.csv", subject_of("law", 2)
    rows = [row(str(n), "A", "B", run=run) for run in range(2) for n in range(2)]
    write_predictions(path, rows)
    assert read_finished(path, law, 2) == rows
    for wrong in (rows[:3], [], rows[:2], [row("0", "B", "B"), *rows[1:]], [*rows[:3], rows[0]]):
        write_predictions(path, wrong)
        with pytest.raises(UserError, match="law.csv: its questions are not those"):
            read_finished(path, law, 2)
    write_predictions(path, rows)
    corrected = [replace(law.questions[0], options=("a", "b", "c", "e")), law.questions[1]]
    with pytest.raises(UserError, match="law.csv: its questions are not those"):
        read_finished(path, replace(law, questions=corrected), 2)


@pytest.fixture
def benchmark_dir(tmp_path):
    """Two subjects in the form of C-Eval; the test split has no answers."""
    folder = tmp_path / "ceval"
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True)
        for key, count in (("law", 3), ("art", 2)):
            answer = "" if split == "test" else ",B"
            lines = ["id,question,A,B,C,D" + ",answer" * bool(answer)]
            lines += [f"{10 + n},Who {n}?,the cat,the rat,a hat,it{answer}" for n in range(count)]
            (folder / split / f"{key}_{split}.csv").write_text("\n".join(lines) + "\n")
    names = {
        "law": {"name": "法学", "category": "Humanities"},
        "art": {"name": "艺术学", "category": "STEM"},
    }
    (folder / "subject_mapping.json").write_text(json.dumps(names))
    return folder


def ceval(checkpoint, benchmark_dir, output_dir, *more, torchrun=None):
    return command(
        "ceval",
        "--model_name_or_path",
        checkpoint,
        "--data_dir",
        benchmark_dir,
        "--num_fewshot",
        2,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--output_dir",
        output_dir,
        *more,
        script="eval.py",
        torchrun=torchrun,
    )


def predictions(path):
    with open(path, encoding="utf-8") as file:
        return [line["prediction"] for line in csv.DictReader(file)]


def test_a_run_resume_and_two_processes(checkpoint, benchmark_dir, tmp_path):
    done = ceval(checkpoint, benchmark_dir, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert set(summary["subjects"]) == {"law", "art"} and set(summary["groups"]) == {
        "Humanities",
        "STEM",
    }
    assert summary["num_questions"] == 5 and "2-shot" in summary["protocol"]
    rows_dir = tmp_path / "one" / "ceval-val"
    right = [one == "B" for one in predictions(rows_dir / "law.csv")]
    assert summary["subjects"]["law"]["accuracy"] == sum(right) / 3
    assert f"{100 * summary['macro']['accuracy']:.1f} %" in done.stdout

    # --resume keeps the finished subjects and does the others. Other options are refused.
    kept = (rows_dir / "law.csv").read_text().removesuffix("0\n") + "1\n"
    (rows_dir / "law.csv").write_text(kept)
    expected = (rows_dir / "art.csv").read_text()
    (rows_dir / "art.csv").unlink()
    assert ceval(checkpoint, benchmark_dir, tmp_path / "one").returncode == 2
    done = ceval(checkpoint, benchmark_dir, tmp_path / "one", "--resume")
    assert done.returncode == 0 and "2 questions in 1 subject\n" in done.stdout
    assert (rows_dir / "law.csv").read_text() == kept
    assert (rows_dir / "art.csv").read_text() == expected
    done = ceval(checkpoint, benchmark_dir, tmp_path / "one", "--resume", "--split", "test")
    assert done.returncode == 2 and "split val, not test" in done.stderr
    (checkpoint / "config.json").touch()
    done = ceval(checkpoint, benchmark_dir, tmp_path / "one", "--resume")
    assert done.returncode == 2 and "the files of a model have changed" in done.stderr

    done = ceval(
        checkpoint,
        benchmark_dir,
        tmp_path / "two",
        "--n_times",
        2,
        "--baseline_dir",
        tmp_path / "one",
        torchrun=2,
    )
    assert done.returncode == 0, done.stderr
    assert "the baseline had" not in done.stdout
    assert (tmp_path / "two" / "ceval-val" / "art.csv").read_text().startswith(expected)
    assert done.stdout.count("mean over subjects") == 1 and "McNemar" in done.stdout


def test_a_baseline_of_another_protocol_is_named(tmp_path):
    """A difference between 5 shots and none says nothing about the models."""
    words = ["ceval", "--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"]
    words += ["--baseline_dir", str(tmp_path)]
    (_, before), (_, now) = (
        parse_options("", [*words, *more])
        for more in (["--num_fewshot", "2", "--max_samples", "9"], ["--template", "auto"])
    )
    assert other_protocol(now) == {}  # a folder without a record
    save_options(before, tmp_path / "options.toml")
    assert other_protocol(before) == {}
    assert other_protocol(now) == {"num_fewshot": 2, "template": "none"}
    known = {("0", question_of("0").digest): True}
    change = compare_with_baseline({"law": known}, {"law": [row("0", "A", "A")]})
    change["other_protocol"] = other_protocol(now)
    counts = dict.fromkeys(("dropped_demonstrations", "questions_cut"), 0)
    line = summary_lines({"baseline": change, **counts})[-1]
    assert line.startswith("the baseline had --num_fewshot 2, --template none: ")
    before = summary_lines({"baseline": change, **counts})[-2]
    assert before.endswith("over 1 questions: +0.0 points (no question differs), McNemar's p = 1")


def test_questions_are_not_their_own_demonstrations():
    words = ["mmlu", "--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"]
    with pytest.raises(UserError, match="--split dev: .*Add --num_fewshot 0"):
        parse_options("", [*words, "--split", "dev"])


def test_a_split_without_answers_gives_a_submission(checkpoint, benchmark_dir, tmp_path):
    done = ceval(
        checkpoint,
        benchmark_dir,
        tmp_path / "out",
        "--split",
        "test",
        "--template",
        "chatml",
        "--subjects",
        "law",
    )
    assert done.returncode == 0, done.stderr
    handed_in = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert "submission.json, a part of what is submitted" in done.stdout  # law alone
    assert list(handed_in) == ["law"] and list(handed_in["law"]) == ["10", "11", "12"]
    assert list(handed_in["law"].values()) == predictions(
        tmp_path / "out" / "ceval-test" / "law.csv"
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "macro" not in summary and "template chatml" in summary["protocol"]


def test_a_bad_baseline_is_reported_before_anything_is_computed(
    checkpoint, benchmark_dir, tmp_path
):
    done = ceval(checkpoint, benchmark_dir, tmp_path / "out", "--baseline_dir", tmp_path / "none")
    assert done.returncode == 2 and "art.csv. Give the output folder" in done.stderr
    write_predictions(tmp_path / "base" / "ceval-test" / "law.csv", [row("10", "A", "A")])
    done = ceval(
        checkpoint,
        benchmark_dir,
        tmp_path / "out",
        "--baseline_dir",
        tmp_path / "base",
        "--split",
        "test",
        "--subjects",
        "law, law",
    )
    assert done.returncode == 2 and "the answers of law are secret" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["hellaswag"], "'hellaswag' is not something to measure"),
        (["mmlu", "--model_name_or_path", "x"], "--data_dir"),
        (
            [
                "cmmlu",
                "--data_dir",
                "x",
                "--model_name_or_path",
                "x",
                "--output_dir",
                "y",
                "--split",
                "val",
            ],
            "--split: invalid choice: 'val'",
        ),
        (["ceval", "--data_di", "x"], "did you mean --data_dir"),
        (
            [
                "ceval",
                "--data_dir",
                "x",
                "--model_name_or_path",
                "x",
                "--output_dir",
                "y",
                "--seed",
                "3",
            ],
            "--seed chooses the demonstrations of repetitions: it needs --n_times",
        ),
        (
            [
                "ceval",
                "--data_dir",
                "x",
                "--model_name_or_path",
                "x",
                "--output_dir",
                "y",
                "--num_fewshot",
                "0",
                "--n_times",
                "2",
            ],
            "--n_times changes the demonstrations; --num_fewshot 0 has none",
        ),
        (
            [
                "mmlu",
                "--data_dir",
                "x",
                "--model_name_or_path",
                "x",
                "--output_dir",
                "y",
                "--resume",
                "--overwrite_output_dir",
            ],
            "Give one of them",
        ),
    ],
)
def test_mistakes_give_a_message_of_one_line(words, said):
    done = command(*words, script="eval.py")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_the_first_word_is_explained():
    done = command("--help", script="eval.py")
    assert done.returncode == 0 and "ceval, cmmlu, mmlu or compare" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100  # no command is one long line
