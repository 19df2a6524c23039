"""Kill a training run with SIGKILL many times, and resume it each time, until it ends.

    python tests/kill_and_resume.py KILLS SEED OUTPUT_DIR [flags of train.py]

A child kills itself at a line of Python, counted from its start: of this project, or, every other
time, of anything that saving a checkpoint executes. The numbers are drawn from SEED, so slow and
fast machines are killed at the same lines.

Children are forked from a process that has loaded torch, so that an attempt takes no time to
start. Prints how many were killed, and how many of them in the middle of saving.
"""

import contextlib
import os
import random
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import render_forks  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (which comes with the first optimizer)

import train  # noqa: E402
from minisft.common.script import run_script  # noqa: E402
from minisft.training import resume  # noqa: E402

LINES = 30_000  # of this project, the most before a kill: the start and some twenty steps
LINES_OF_SAVING = 100_000  # some three checkpoints


def attempt(arguments, prepare=lambda: None):
    """Start train.py in a child, where prepare() is called first; returns its process id."""
    child = os.fork()
    if child == 0:
        os.register_at_fork(after_in_child=lambda: sys.settrace(None))  # not its workers
        torch.set_num_threads(1)
        sys.argv = ["train.py", *arguments]
        prepare()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run_script(train.main)
        os._exit(0)
    return child


def killer(number, folder):
    """A trace function that kills this process at a line of the files in a folder."""

    def trace(frame, event, _):
        nonlocal number
        if not frame.f_code.co_filename.startswith(str(folder)):
            return None
        number -= event == "line"
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def kill_at(number):
    """Have this process killed at a line of this project."""
    sys.settrace(killer(number, ROOT))


def kill_in_saving(number):
    """Have this process killed at one of the lines, of any file, executed while it saves."""
    trace, save = killer(number, "/"), resume.save_checkpoint

    def save_traced(run):
        sys.settrace(trace)
        save(run)
        sys.settrace(None)

    resume.save_checkpoint = save_traced


def main():
    render_forks.install()
    kills, seed, output_dir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    arguments = [*sys.argv[4:], "--output_dir", str(output_dir), "--resume_from_checkpoint", "auto"]
    generator, in_saving = random.Random(seed), 0
    for number in range(kills):
        kill, lines = [(kill_at, LINES), (kill_in_saving, LINES_OF_SAVING)][number % 2]
        line = generator.randint(1, lines)
        child = attempt(arguments, lambda kill=kill, line=line: kill(line))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"attempt {number} had ended by itself: give the run more steps")
        in_saving += any(output_dir.glob("*.partial"))
    _, status = os.waitpid(attempt(arguments), 0)
    print(f"{kills} killed, {in_saving} of them in the middle of saving")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
