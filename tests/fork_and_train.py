"""Run train.py many times in several processes, loading torch only once.

    python tests/fork_and_train.py FOLDER

FOLDER/runs.json: a list of [number of processes, [flags of train.py], step or null], which run in
that folder, in order.
The ranks are forked once and train in run after run, so that torch prepares its first steps once.
They get from the environment what torchrun gives. The last rank of a run gets a SIGTERM in that
step. The status is 1 as soon as a run fails.
"""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing import connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import render_forks  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (as sharding does; it and what follows for the children)
from forks import meeting  # noqa: E402

import minisft.text.tokenizer  # noqa: E402, F401
import train  # noqa: E402

FORK = multiprocessing.get_context("fork")
TRAIN_STEP = train.train_step


class Rank:
    """A forked process that trains as it is told."""

    def __init__(self):
        self.pipe, told = FORK.Pipe()
        self.process = FORK.Process(target=work, args=(told,))
        self.process.start()


def work(told):
    torch.set_num_threads(1)
    usual = dict(os.environ)
    while True:
        environment, arguments, signalled = told.recv()
        os.environ.clear()
        os.environ.update(usual | environment)
        told.send(status_of(arguments, signalled))


def status_of(arguments, signalled):
    """The exit status of a run; signalled: the step in which this process gets a SIGTERM."""

    def train_step(run, batches):
        if run.progress.step == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return TRAIN_STEP(run, batches)

    sys.argv, train.train_step = ["train.py", *arguments], train_step
    try:
        train.main()
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def train_with(ranks, processes, arguments, signalled=None):
    """True if a run with this number of processes succeeded."""
    expected = 0 if signalled is None else 128 + signal.SIGTERM
    with meeting(processes) as environments:
        running = [rank.pipe for rank in ranks[:processes]]
        for number, (pipe, environment) in enumerate(zip(running, environments, strict=True)):
            is_last = number == processes - 1
            pipe.send((environment, arguments, signalled if is_last else None))
        while running:
            for pipe in connection.wait(running):
                running.remove(pipe)
                if pipe.recv() != expected:
                    return False
    return True


def main():
    render_forks.install()
    os.chdir(sys.argv[1])
    runs = json.loads(Path("runs.json").read_text())
    # Forked before `meeting` starts the thread of a store, whose locks they would copy.
    ranks = [Rank() for _ in range(max(processes for processes, *_ in runs))]
    try:
        succeeded = all(train_with(ranks, *run) for run in runs)
    except EOFError:  # a rank has crashed
        succeeded = False
    for rank in ranks:
        rank.process.kill()
    sys.exit(not succeeded)


if __name__ == "__main__":
    main()
