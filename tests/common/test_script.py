"""Standard streams that are closed, full, or cannot express a text."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from standing import HANG_SECONDS

SAYS = """
import os, sys
from minisft.common.script import run_script

def main():
    print("said 你好", flush=True)
    print("noted", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        os.write(1, b"by a library")
        os.write(2, b"by a library")
        file.write("content")

run_script(main)
"""


def run(path, streams="", **environment):
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-c", SAYS, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=HANG_SECONDS,
    )


def test_closed_streams_lose_their_output_and_nothing_else(tmp_path):
    """A file that a program opens must not get the number of a closed stream."""
    done = run(tmp_path / "file", "<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "file").read_text() == "content"


def test_an_encoding_that_lacks_characters(tmp_path):
    done = run(tmp_path / "file", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("said \\u4f60\\u597d\n"), done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_standard_output_is_named(unbuffered, tmp_path):
    done = run(tmp_path / "file", "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"


ENDS = """
import os, sys
from minisft.common.outputs import atomic_write, temporary_folder
from minisft.common.script import run_script

def main():
    with atomic_write(sys.argv[1]) as file:
        print(temporary_folder(), flush=True)
        os.kill(os.getpid(), int(sys.argv[2]))
        print("lives", flush=True)

run_script(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_files(number, tmp_path):
    words = [sys.executable, "-c", ENDS, str(tmp_path / "file"), str(int(number))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 128 + number and done.stderr == "", done.stderr
    assert list(tmp_path.iterdir()) == [] and not Path(done.stdout.strip()).exists()


def test_an_ignored_signal_stays_ignored(tmp_path):
    """nohup ignores SIGHUP for the programs that it starts."""
    words = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", ENDS]
    words += [str(tmp_path / "file"), str(int(signal.SIGHUP))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0 and done.stdout.endswith("lives\n"), done.stderr
    assert (tmp_path / "file").exists()
