"""The commands that score.py and select.py print at the end: the next script accepts them."""

import json
import shlex

import pytest
from conftest import as_flags

import score
from minisft.selection import score_options, select_options
from minisft.selection.next_command import select_command, train_command
from minisft.training.options import parse_options as parse_training

SCORING = ["--model_name_or_path", "base", "--output", "my runs/s.jsonl", "--dataset", "a b.json"]
CHOOSING = ["--dataset", "rows.json", "--sample_rate", "0.1", "--output", "runs/few.json"]


@pytest.mark.parametrize(
    "words, has_preferences, strategy, more",
    [
        ([], False, "ifd", {"scores": "my runs/s.jsonl", "max_samples": None}),
        (["--mode", "all", "--max_samples", "9"], False, "ifd", {"max_samples": 9}),
        (["--mode", "embed"], False, "cluster", {"embeddings": "my runs/s.embeddings.npy"}),
        (["--mode", "reward", "--skip_bad_rows"], False, "reward", {"skip_bad_rows": True}),
        (["--mode", "reward", "--dataset_dir", "d"], True, "margin", {"dataset_dir": "d"}),
    ],
)
def test_the_selection_after_scores(words, has_preferences, strategy, more):
    """It parses the words of the command, which names rows and scores."""
    line = select_command(score_options.parse_options([*SCORING, *words]), has_preferences)
    python, script, *arguments = shlex.split(line)
    assert (python, script) == ("python", "select.py")
    options = vars(select_options.parse_options(arguments))
    assert (options["dataset"], options["strategy"]) == ("a b.json", strategy)
    assert {name: options[name] for name in more} == more


def test_no_selection_where_another_file_is_missing():
    """RDS+ needs embeddings of a target task as well."""
    words = ["--mode", "embed", "--pooling", "weighted"]
    assert select_command(score_options.parse_options([*SCORING, *words])) == ""


def test_the_training_after_a_selection(tmp_path):
    def command(*words):
        line = train_command(select_options.parse_options([*CHOOSING, *map(str, words)]))
        python, script, *arguments = shlex.split(line)
        assert (python, script) == ("python", "train.py")
        return parse_training(arguments)

    options = command("--strategy", "random")
    assert (options.model_name_or_path, options.dataset) == ("M", "runs/few.json")
    assert (options.output_dir, options.template) == ("runs/few", "auto")
    record = {"names": {"model": "my base"}, "template": "alpaca"}
    (tmp_path / "s.record.json").write_text(json.dumps(record))
    options = command("--strategy", "ifd", "--scores", tmp_path / "s.jsonl")
    assert (options.model_name_or_path, options.template) == ("my base", "alpaca")
    options = command("--strategy", "margin", "--scores", tmp_path / "s.jsonl")
    assert (options.model_name_or_path, options.stage) == ("M", "dpo")


@pytest.mark.parametrize("strategy, by_this_model", [("ifd", True), ("reward", False)])
def test_the_training_reads_the_rows_as_score_py_did(
    strategy, by_this_model, checkpoint, rows_file, tmp_path, here
):
    """Its prompts only if the model is the one to train, not a reward model."""
    flags = as_flags(
        default_system="Be\nkind.", template_kwargs='{"mood": 1}', replace="name=Pebble"
    )
    flags += as_flags(enable_thinking="false", template="alpaca")
    words = ["--model_name_or_path", checkpoint, "--dataset", rows_file, *flags]
    here(score, *words, "--output", tmp_path / "s.jsonl", "--device", "cpu")
    more = ["--strategy", strategy, "--scores", str(tmp_path / "s.jsonl")]
    line = train_command(select_options.parse_options([*CHOOSING, *more]))
    options = parse_training(shlex.split(line)[2:])
    assert options.replace == "name=Pebble"
    shown = [options.template, options.default_system, options.template_kwargs]
    expected = ["alpaca", "Be\nkind.", '{"mood": 1}'] if by_this_model else ["auto", None, None]
    assert shown == expected and options.enable_thinking is (False if by_this_model else None)
