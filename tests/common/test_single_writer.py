"""Two writers on one output: the second is refused, a dead one is not in the way."""

import errno
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from full_disk import file_size_limit

from minisft.common.errors import UserError
from minisft.common.outputs import check_output_dir
from minisft.common.single_writer import single_writer

HOLD = """
import sys
from minisft.common.single_writer import single_writer
with single_writer(sys.argv[1], True):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    """A process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    with hold(tmp_path / "out") as process:
        message = rf"out: process {process.pid} on {os.uname().nodename} is writing to it"
        with pytest.raises(UserError, match=message), single_writer(tmp_path / "out", True):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / "out/.lock").exists()
    assert check_output_dir(tmp_path / "out", overwrite=False)  # a lock alone is no content
    with single_writer(tmp_path / "out", True):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_stays(tmp_path):
    """Not the lock, and no empty folders."""
    with pytest.raises(KeyError), single_writer(tmp_path / "a/b/scores.jsonl"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_on_a_full_disk(tmp_path):
    """A full disk has room for the name of a file, not for its content."""
    for output in ("out", "new/out"):
        with file_size_limit(0):
            with pytest.raises(UserError, match="out: could not be written: File too large"):
                with single_writer(tmp_path / output, is_folder=True):
                    pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_host_is_respected(tmp_path):
    """Nobody here can know whether its process is alive."""
    lock = tmp_path / "scores.jsonl.lock"
    lock.write_text("process 12 on node-7\n")
    message = f"scores.jsonl: process 12 on node-7 is writing to it. .* has ended, remove {lock}"
    with pytest.raises(UserError, match=message), single_writer(tmp_path / "scores.jsonl"):
        pass
    assert lock.read_text() == "process 12 on node-7\n"
    lock.unlink()
    with single_writer(tmp_path / "scores.jsonl"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The process of the lock file decides."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock, host = tmp_path / "scores.jsonl.lock", os.uname().nodename
    lock.write_text(f"process {os.getppid()} on {host}\n")
    with pytest.raises(UserError, match="Wait until"), single_writer(tmp_path / "scores.jsonl"):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock.write_text(f"process {dead.pid} on {host}\n")
    with single_writer(tmp_path / "scores.jsonl"):
        assert lock.read_text() == f"process {os.getpid()} on {host}\n"


def test_another_file_with_the_name_of_a_lock_is_kept(tmp_path):
    lock = tmp_path / "poetry.lock"
    lock.write_text("[[package]]\n")
    with pytest.raises(UserError, match="is not a lock file"), single_writer(tmp_path / "poetry"):
        pass
    assert lock.read_text() == "[[package]]\n"
    (tmp_path / "folder.lock").mkdir()
    with pytest.raises(UserError, match="folder.lock is a folder"):
        with single_writer(tmp_path / "folder"):
            pass
    os.mkfifo(tmp_path / "fifo.lock")
    with pytest.raises(UserError, match="is not a lock file"), single_writer(tmp_path / "fifo"):
        pass


def test_a_link_and_its_target_have_one_lock(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "scores.jsonl")
    with single_writer(tmp_path / "link.jsonl"):
        assert (tmp_path / "scores.jsonl.lock").exists()


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for output in ("file/out", "file/more/out"):
        with pytest.raises(UserError, match="out: a part of this path is a file"):
            with single_writer(tmp_path / output):
                pass


def test_links_that_lead_to_each_other(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_output_dir(tmp_path / "loop", False, tmp_path)
    with pytest.raises(UserError, match="loop: "), single_writer(tmp_path / "loop", True):
        pass
