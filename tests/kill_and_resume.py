"""Kill a training run with SIGKILL at random moments, resume it, until it ends.

    python tests/kill_and_resume.py KILLS SEED OUTPUT_DIR [flags of train.py]

Children are forked from a process that has loaded torch, so that an attempt takes no time to
start. Prints how many were killed, and how many of them in the middle of saving.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (which comes with the first optimizer)

import train  # noqa: E402
from minisft.common.script import run_script  # noqa: E402


def attempt(arguments):
    """Start train.py in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        sys.argv = ["train.py", *arguments]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run_script(train.main)
        os._exit(0)
    return child


def main():
    kills, seed, output_dir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    arguments = [*sys.argv[4:], "--output_dir", str(output_dir), "--resume_from_checkpoint", "auto"]
    generator, in_saving = random.Random(seed), 0
    for number in range(kills):
        child = attempt(arguments)
        if number % 2:  # every other time, once it is seen saving
            while not any(output_dir.glob("*.partial")):
                time.sleep(0.0002)
            time.sleep(generator.uniform(0.0, 0.01))
        else:
            time.sleep(generator.uniform(0.0, 1.0))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"attempt {number} had ended by itself: give the run more steps")
        in_saving += any(output_dir.glob("*.partial"))
    _, status = os.waitpid(attempt(arguments), 0)
    print(f"{kills} killed, {in_saving} of them in the middle of saving")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
