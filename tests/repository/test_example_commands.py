"""examples/commands.py runs scripts as a user does."""

import os
import signal
import subprocess
import sys

from conftest import ROOT

# Saves its work on Ctrl-C, which takes longer than the quarter of a second of subprocess.run.
SLOW = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_ctrl_c_lets_a_script_save_its_work(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [str(tmp_path / "slow.py"), str(tmp_path / "work")]
    code = f"import sys; sys.path.insert(0, 'examples'); from commands import run; run(*{words})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        while process.stdout.readline() != "ready\n":
            pass
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
    assert process.wait() == 130
    assert (tmp_path / "work").read_text() == "saved"
