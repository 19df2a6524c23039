"""Standard streams that are closed, full, or cannot express a text."""

import os
import subprocess
import sys

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


def test_full_standard_output_is_named(tmp_path):
    done = run(tmp_path / "file", "> /dev/full", PYTHONUNBUFFERED="")
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"
