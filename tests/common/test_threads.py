"""Threads of a process: the cores that it may use, divided by the processes of torchrun."""

import os
import subprocess
import sys

import pytest

from minisft.common.threads import busy_note, cpu_quota, physical_cores, share_cores


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with eight cores of two hyperthreads each; the user has not chosen."""
    for number in range(16):
        folder = tmp_path / f"devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 8},{number % 8 + 8}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "num_processes, quota, threads",
    [
        (1, None, None),  # torch chooses well
        (1, "max 100000", None),
        (1, "250000 100000", "2"),
        (1, "50000 100000", "1"),
        (1, "1600000 100000", None),
        (2, None, "4"),
        (3, None, "2"),
        (2, "400000 100000", "2"),
        (64, None, "1"),
    ],
)
def test_processes_share_the_cores(system, monkeypatch, num_processes, quota, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is restored afterwards
    del os.environ["OMP_NUM_THREADS"]
    if quota:
        (system / "fs/cgroup").mkdir(parents=True)
        (system / "fs/cgroup/cpu.max").write_text(f"{quota}\n")
    assert physical_cores(system) == 8
    share_cores(system)
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_the_choice_of_the_user_wins(system, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    share_cores(system)
    assert os.environ["OMP_NUM_THREADS"] == "3" and cpu_quota(system) == float("inf")


def test_a_busy_machine_gets_a_note(system, monkeypatch):
    """Other programs and two threads: every product waits for the slower thread."""
    monkeypatch.setattr(os, "getloadavg", lambda: (12.5, 0.0, 0.0))
    line = busy_note(4, system)
    assert "load average is 12.5 on 8 cores" in line and "OMP_NUM_THREADS=1" in line
    assert busy_note(1, system) == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 40.0, 40.0))
    assert busy_note(4, system) == ""


# As torchrun does it: set OMP_NUM_THREADS, then start a process.
LAUNCHER = """
import os, subprocess, sys
os.environ |= {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
SHOW = """
import os
from minisft.common import threads
threads.physical_cores = lambda system: 8
threads.share_cores()
print(os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the environment of a process is in /proc")
@pytest.mark.parametrize("chosen, threads", [(None, "4"), ("1", "1"), ("5", "5")])
def test_the_choice_of_torchrun_is_not_that_of_the_user(chosen, threads):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": chosen} if chosen else {}
    words = [sys.executable, "-c", LAUNCHER, SHOW]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == threads
