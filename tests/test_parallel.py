"""Several processes under torchrun: when one fails, one says why and all end.

That 1, 2 and 3 processes train alike is in test_train.py.
"""

import pytest
from conftest import ROOT, command
from standing import HANG_SECONDS

from minisft.common import failure

# The first is found before the processes have met, the second after.
MISTAKES = {"--lora_rnk": "did you mean --lora_rank",
            "--dataset": "nowhere.json: there is no such file"}


@pytest.fixture
def flags(checkpoint, rows_file, tmp_path):
    return ["--model_name_or_path", checkpoint, "--dataset", rows_file, "--template", "plain",
            "--output_dir", tmp_path / "out", "--dataloader_num_workers", 0]


def torchrun(processes, *arguments, script="train.py"):
    return command(*arguments, script=script,
                   before=["-m", "torch.distributed.run", "--nproc_per_node", str(processes)])


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_told_once(flag, flags, tmp_path):
    done = torchrun(2, *flags, flag, "nowhere.json")
    assert done.stdout.count("error: ") + done.stderr.count("error: ") == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert MISTAKES[flag] in line
    # torchrun has a status of its own; it shows that of the process which told.
    assert done.returncode == 1 and "exitcode  : 2 " in done.stderr.partition("Root Cause")[2]
    assert done.stderr.count("Traceback") == 1  # torchrun's
    assert not (tmp_path / "out").exists()


CRASHES = """
import signal, sys
sys.path.insert(0, {root!r})
import train
from minisft.common import processes as parallel

train_step = train.train_step

def step(run, batches):
    if run.progress.step == 2 and parallel.rank() == 0:
        while True:  # as if inside a library: no signal is acted on, no broken connection seen
            signal.pause()
    if run.progress.step == 2 and parallel.rank() == 1:
        raise ZeroDivisionError("one has crashed")
    return train_step(run, batches)  # here process 2 waits for the others

train.train_step = step
train.run_script(train.main)
"""


def test_a_crash_ends_all(flags, tmp_path, monkeypatch):
    """One process crashes, one waits for it in a reduction, one is where nothing reaches it."""
    script = tmp_path / "crashes.py"
    script.write_text(CRASHES.format(root=str(ROOT)))
    # torchrun then waits for process 0, and would kill it if it did not end by itself. It has as
    # much time for that as the whole test, on a slow machine too.
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(2 * HANG_SECONDS))
    done = torchrun(3, *flags, script=script)
    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError: one has crashed") == 1
    assert done.stderr.count("Traceback") == 2  # of the crash, and torchrun's
    assert "rank      : 1" in done.stderr.partition("Root Cause")[2]
    assert "SIGKILL" not in done.stderr


def test_the_first_to_fail_speaks(tmp_path, monkeypatch):
    assert failure.claim() and failure.claim()  # alone, whenever it fails
    with pytest.raises(SystemExit, match="2"):
        failure.leave(2)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert failure.claim() == (rank == 0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "removed" / "0" / "error.json"))
    assert failure.claim()  # where there is nowhere to agree
    failure.told()
