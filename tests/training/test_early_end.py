"""What a run says when it ends early, and what the next command says about its folder."""

from types import SimpleNamespace

import pytest
import torch
from run_builder import training_options

from minisft.common.errors import UserError
from minisft.common.outputs import check_output_dir
from minisft.evaluation import resume
from minisft.training import early_end
from minisft.training.options import parse_options
from minisft.training.resume import can_resume


@pytest.fixture
def run_dir(tmp_path):
    """An interrupted run, which has saved two checkpoints."""
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-16.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "options.toml").write_text('model_name_or_path = "base"\n')
    return tmp_path


def options_for(folder, *words):
    return training_options(*words, output_dir=folder)


def run_at(step, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    progress = SimpleNamespace(step=step)
    return SimpleNamespace(options=options, optimizer=optimizer, progress=progress)


def test_a_second_ctrl_c_names_the_last_checkpoint(run_dir, capsys):
    run = run_at(14, options_for(run_dir))
    with pytest.raises(KeyboardInterrupt), early_end.going_on_later(run):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert f"the last checkpoint is {run_dir / 'checkpoint-12'}" in said
    record = run_dir / "options.toml"
    assert f"python train.py --config {record} --resume_from_checkpoint auto\n" in said


def test_a_second_ctrl_c_before_the_first_checkpoint(tmp_path, capsys):
    run = run_at(3, options_for(tmp_path))
    with pytest.raises(KeyboardInterrupt), early_end.going_on_later(run):
        raise KeyboardInterrupt
    assert "without a checkpoint: --overwrite_output_dir starts again" in capsys.readouterr().err


def refusal(options):
    hint = early_end.unfinished_run_hint(options)
    with pytest.raises(UserError) as refused:
        check_output_dir(options.output_dir, False, hint=hint)
    return str(refused.value)


def test_an_interrupted_run_can_go_on(run_dir):
    """--overwrite_output_dir alone would lose it."""
    ways = "Continue the interrupted run in it with --resume_from_checkpoint auto, choose another"
    assert f"{run_dir} is not empty. {ways}" in refusal(options_for(run_dir))
    (run_dir / "complete.json").write_text('{"step": 20, "files": {}}')
    said = refusal(options_for(run_dir))
    assert "is not empty. Choose another folder, or add --overwrite" in said


def test_a_folder_without_a_run_cannot_go_on(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "continue" not in refusal(options_for(tmp_path)).lower()


def test_a_checkpoint_that_does_not_exist_is_said_first(run_dir):
    """Not that the folder is full: another folder would not help."""
    options = options_for(run_dir, "--resume_from_checkpoint", "nowhere/checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3: there is no such folder"):
        can_resume(options)


def test_resuming_without_a_model_or_rows_names_the_record(run_dir):
    record = f"; --config {run_dir / 'options.toml'} has the options of that run (see --help)"
    without_rows = ["--output_dir", str(run_dir), "--model_name_or_path", "M"]
    for words, missing in (
        (["--output_dir", str(run_dir), "--resume_from_checkpoint", "auto"], "--model_name_or_"),
        (["--resume_from_checkpoint", str(run_dir / "checkpoint-4")], "--model_name_or_path"),
        ([*without_rows, "--resume_from_checkpoint", "auto"], "give --dataset or --train_dir"),
    ):
        with pytest.raises(UserError) as refused:
            parse_options(words)
        assert missing in str(refused.value) and str(refused.value).endswith(record)
    for words in (["--output_dir", str(run_dir)], without_rows):
        with pytest.raises(UserError) as refused:
            parse_options(words)
        assert "--config" not in str(refused.value)


def evaluation(folder, **changes):
    values = {"output_dir": str(folder), "overwrite_output_dir": False, "resume": False, "seed": 1}
    return SimpleNamespace(**values | changes)


def test_an_evaluation_says_how_to_go_on(run_dir, capsys):
    (run_dir / "options.toml").write_text("seed = 1\n")
    with pytest.raises(UserError, match="Continue with --resume, which keeps its answers, choose"):
        resume.check_output(evaluation(run_dir), [], ["seed"])
    with pytest.raises(UserError, match="is not empty. Choose another folder, or add"):
        resume.check_output(evaluation(run_dir, seed=2), [], ["seed"])
    for changes, said in (
        ({}, f"what is finished is in {run_dir}; the same command with --resume continues"),
        ({"resume": True}, "; the same command continues from there"),
        ({"seed": 2}, ""),  # the folder still has the results of another run
    ):
        options = evaluation(run_dir, **changes)
        with pytest.raises(KeyboardInterrupt), resume.saying_how_to_go_on(options, ["seed"]):
            raise KeyboardInterrupt
        output = capsys.readouterr().err
        assert said in output and bool(said) == bool(output)
