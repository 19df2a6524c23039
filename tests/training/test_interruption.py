"""Signals that end training, and those that do not."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from standing import HANG_SECONDS, lines_in, standing_still, wait_until

from minisft.training.interruption import SIGNALS, Interruption


@pytest.fixture
def standing_run(checkpoint, rows_file, tmp_path):
    """The words of a run of six steps that pauses in its fourth until a signal comes."""
    words = [
        sys.executable,
        *standing_still("train:train_step", [4], tmp_path / "told"),
        ROOT / "train.py",
        *("--model_name_or_path", checkpoint, "--dataset", rows_file, "--template", "plain"),
        *("--per_device_train_batch_size", 2, "--max_steps", 6),
        *("--dataloader_num_workers", 1, "--output_dir", tmp_path / "out"),
    ]
    return list(map(str, words))


def saved_steps(tmp_path):
    return [
        json.loads(path.read_text())["step"]
        for path in (tmp_path / "out").glob("checkpoint-*/complete.json")
    ]


def test_a_closed_terminal(standing_run, tmp_path):
    """The run discards its output from then on, and saves a checkpoint."""
    terminal, inside = pty.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", take_terminal, *standing_run],
        cwd=ROOT,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    wait_until(lambda: lines_in(tmp_path / "told") == 1, process)
    os.close(terminal)  # the kernel sends SIGHUP
    assert process.wait(HANG_SECONDS) == 128 + signal.SIGHUP
    assert saved_steps(tmp_path) == [4]


def test_nohup():
    """SIGHUP stays ignored, as nohup sets it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_kept_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as interruption:
        assert interruption.signal is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_behind_a_pipe_whose_reader_has_ended():
    """As with `2>&1 | tee log`: Ctrl-C ends tee as well, and the step must still be finished."""
    read, write = os.pipe()
    os.close(read)
    saved = os.dup(2)
    os.dup2(write, 2)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(write)
    assert interruption.signal == signal.SIGINT


def test_the_first_ctrl_c_says_what_a_second_does(capfd):
    with Interruption():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after this step; Ctrl-C again") == 1
