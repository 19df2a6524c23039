"""Data workers that the system kills, as it does when memory runs out: one line says what to do."""

import multiprocessing
import os

import pytest
from conftest import ROOT, as_flags, command
from forks import run_script

from minisft.data.workers import WorkerKilled, read_ahead

# Runs a script and kills its data workers in a call of a function.
KILLS = """
import multiprocessing, os, sys
sys.path.insert(0, {root!r})
import {script} as script
from minisft.selection import scoring

scoring.WINDOW_ROWS = 4
owner, calls = {owner}, []
original = owner.{name}

def killing(*arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK", "1") == "1":
        for worker in multiprocessing.active_children():
            worker.kill()
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    return original(*arguments)

owner.{name} = killing
script.run_script(script.main)
"""
MESSAGE = "error: a data worker was killed (DataLoader worker (pid "
ADVICE = "). The memory has probably run out: lower --dataloader_num_workers."


def killing(folder, script, owner, name):
    path = folder / f"kills_workers_of_{script}.py"
    path.write_text(KILLS.format(root=str(ROOT), script=script, owner=owner, name=name))
    return path


@pytest.fixture
def flags(checkpoint, rows_file, tmp_path):
    return as_flags(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        output_dir=tmp_path / "out",
        num_train_epochs=3,
        dataloader_num_workers=1,
    )


def test_in_training(flags, tmp_path):
    """The steps before are saved, and the run continues from there."""
    script = killing(tmp_path, "train", "script", "train_step")
    done = run_script(script, flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(MESSAGE) and ADVICE in done.stderr
    assert "Saved at step 3: continue with --resume_from_checkpoint auto." in done.stderr
    done = command(*flags, resume_from_checkpoint="auto")
    assert done.returncode == 0 and "checkpoint-3" in done.stdout, done.stderr


def test_in_training_under_torchrun(flags, tmp_path):
    """Rank 1 misses its worker; both ranks end."""
    script = killing(tmp_path, "train", "script", "train_step")
    done = command(*flags, script=script, torchrun=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(MESSAGE) and line.endswith(ADVICE)
    assert done.returncode == 1 and "exitcode  : 2 " in done.stderr.partition("Root Cause")[2]
    assert done.stderr.count("Traceback") == 1  # torchrun's


def test_in_scoring(checkpoint, rows_file, tmp_path):
    script = killing(tmp_path, "score", "script.ScoreWriter", "add")
    flags = as_flags(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        output=tmp_path / "scores.jsonl",
        dataloader_num_workers=1,
    )
    done = run_script(script, flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(MESSAGE) and ADVICE in done.stderr
    done = command(*flags, script="score.py")
    assert done.returncode == 0 and "24 rows, 24 to do" not in done.stdout


class Squares:
    def __getitem__(self, number):
        return number * number


def test_only_the_wait_for_a_worker_is_interrupted():
    """torch would raise the error in the middle of an optimizer step."""
    items = read_ahead(Squares(), range(100), num_workers=1)
    assert next(items) == 0
    (worker,) = multiprocessing.active_children()
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    sum(range(1000))  # Python runs the handler of SIGCHLD here
    with pytest.raises(WorkerKilled, match="lower --dataloader_num_workers"):
        next(items)
    assert list(read_ahead(Squares(), range(5), num_workers=1)) == [0, 1, 4, 9, 16]
