"""Run train.py many times in several processes, loading torch only once.

    python tests/fork_and_train.py runs.json

runs.json: a list of [number of processes, [flags of train.py], step or null], run in order.
The processes of a run are forked from this one and get from the environment what torchrun gives;
the last of them is sent a SIGTERM in that step. The status is 1 as soon as a run fails.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (as sharding does; it and what follows for the children)
import render_forks  # noqa: E402
from forks import meeting  # noqa: E402

import minisft.text.tokenizer  # noqa: E402, F401
import train  # noqa: E402


def start(environment, arguments, signalled, gate):
    """Fork one of the processes of a run; returns its process id.

    gate: (read, write) ends of a pipe. The process runs when the parent closes the write end.
    """
    child = os.fork()
    if child:
        return child
    os.close(gate[1])
    os.read(gate[0], 1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv, status = ["train.py", *arguments], 0
    signal_in(signalled)
    try:
        train.main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def signal_in(step):
    """Have this process send itself a SIGTERM in a step of train.py."""
    train_step = train.train_step

    def signalled(run, batches):
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, batches)

    train.train_step = signalled


def train_with(processes, arguments, signalled=None):
    """True if a run with this number of processes succeeded."""
    expected = 0 if signalled is None else 128 + signal.SIGTERM
    with meeting(processes) as environments:
        last = len(environments) - 1
        # A rank that connects makes the thread of the store look up its name. A rank that is forked
        # meanwhile has a copy of the resolver's lock, and nobody ever unlocks that.
        gate = os.pipe()
        children = {
            start(environment, arguments, signalled if rank == last else None, gate)
            for rank, environment in enumerate(environments)
        }
        for end in gate:
            os.close(end)
        while children:
            child, status = os.wait()
            children.discard(child)
            if os.waitstatus_to_exitcode(status) != expected:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                return False
    return True


def main():
    render_forks.install()
    for run_of in json.loads(Path(sys.argv[1]).read_text()):
        if not train_with(*run_of):
            sys.exit(1)


if __name__ == "__main__":
    main()
