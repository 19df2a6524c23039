"""Several processes under torchrun: when one fails, one process prints the reason and all end.

test_train.py checks that 1, 2 and 3 processes train alike.
"""

import sys

import pytest
from conftest import ROOT, as_flags, command
from standing import HANG_SECONDS

from minisft.common import failure

# The first fails before the processes join, the second after.
MISTAKES = {
    "--lora_rnk": "did you mean --lora_rank",
    "--dataset": "nowhere.json: there is no such file",
}


@pytest.fixture
def flags(checkpoint, rows_file, tmp_path):
    return as_flags(
        model_name_or_path=checkpoint,
        dataset=rows_file,
        template="plain",
        output_dir=tmp_path / "out",
        dataloader_num_workers=0,
    )


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_printed_once(flag, flags, tmp_path):
    done = command(*flags, flag, "nowhere.json", torchrun=2)
    assert done.stdout.count("error: ") + done.stderr.count("error: ") == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert MISTAKES[flag] in line
    # torchrun has its own exit status, but reports the status of the process that printed.
    assert done.returncode == 1 and "exitcode  : 2 " in done.stderr.partition("Root Cause")[2]
    assert done.stderr.count("Traceback") == 1  # torchrun's
    assert not (tmp_path / "out").exists()


CRASHES = """
import signal, sys
sys.path.insert(0, {root!r})
import train
from minisft.common import processes

train_step = train.train_step

def step(run, batches):
    if run.progress.step == 2 and processes.rank() == 0:
        while True:  # as if inside a library, where signals and lost connections do not reach it
            signal.pause()
    if run.progress.step == 2 and processes.rank() == 1:
        raise ZeroDivisionError("rank 1 has crashed")
    return train_step(run, batches)  # rank 2 waits here for the others

train.train_step = step
train.run_script(train.main)
"""


def test_a_crash_ends_all(flags, tmp_path, monkeypatch):
    """Rank 1 crashes, rank 2 waits for it in an all-reduce, rank 0 cannot be reached."""
    script = tmp_path / "crashes.py"
    script.write_text(CRASHES.format(root=str(ROOT)))
    # torchrun then waits for process 0, and would kill it if it did not end by itself. The limit
    # is that of the whole test, so that a slow machine has enough time.
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(2 * HANG_SECONDS))
    done = command(*flags, script=script, torchrun=3)
    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError: rank 1 has crashed") == 1
    assert done.stderr.count("Traceback") == 2  # of the crash, and torchrun's
    assert "rank      : 1" in done.stderr.partition("Root Cause")[2]
    assert "SIGKILL" not in done.stderr


def status_of_failing(reason, printed):
    """The exit status of a process that fails for this reason; printed collects the reasons."""
    with pytest.raises(SystemExit) as ended:
        failure.fail(lambda: printed.append(reason) or 2)
    return ended.value.code


def test_only_the_first_process_to_fail_prints_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("os._exit", sys.exit)
    # This process fails first, and continues, as a rank that torchrun does not wait for yet.
    monkeypatch.setattr(failure, "PATIENCE", 2 * HANG_SECONDS)
    monkeypatch.setattr(failure, "SEEN_WITHIN", 0)
    printed = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert status_of_failing(rank, printed) == (2 if rank == 0 else 1)
    assert printed == [0]


@pytest.mark.parametrize("error_file", [None, "removed/0/error.json"])
def test_processes_that_share_no_file_all_print_their_reason(error_file, tmp_path, monkeypatch):
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if error_file:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / error_file))
    printed = []
    assert [status_of_failing(rank, printed) for rank in range(2)] == [2, 2]
    assert printed == [0, 1]
