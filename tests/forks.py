"""Scripts run as separate processes, forked from one that has loaded torch already.

    done = run_script("train.py", ["--help"])
    done.returncode, done.stdout, done.stderr
    run_script("train.py", flags, processes=2)     # what torchrun would start

Loading torch is most of what a short command takes, and the tests run hundreds of them.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

import render_forks
from standing import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
# torch._dynamo comes with the first optimizer, numpy.ma with the first np.unique, the scripts with
# most of minisft. None of them may ask for a GPU when it is imported: a process that has used CUDA
# can fork no other that does.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.run", "safetensors.torch", "tokenizers"]
PRELOADED += ["numpy.ma", "train", "score", "eval", "export", "chat"]
SERVER.set_forkserver_preload(PRELOADED)


def run_script(script, arguments, processes=1, input=None, newline=None):
    """`python SCRIPT ARGUMENTS` in the project's folder -> subprocess.CompletedProcess.

    Several processes share their output; if one fails, the others are killed. input: the text on
    standard input. newline: as for open(); "" leaves the line ends of the output as they are.
    """
    words = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder, meeting(processes) as environments:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        given = os.devnull
        if input is not None:
            given = Path(folder) / "stdin"
            given.write_bytes(input.encode())
        ranks = [
            SERVER.Process(target=_run, args=(words, {**os.environ, **environment}, said, given))
            for environment in environments
        ]
        for rank in ranks:
            rank.start()
        if not _ended(ranks):
            raise subprocess.TimeoutExpired(
                words, HANG_SECONDS, *(path.read_text() for path in said)
            )
        code = max((rank.exitcode for rank in ranks), key=lambda code: (code > 0, abs(code)))
        output = []
        for path in said:
            with open(path, encoding="utf-8", newline=newline) as file:
                output.append(file.read())
        return subprocess.CompletedProcess(words, code, *output)


class Forked:
    """A script in a forked process, with the methods of subprocess.Popen that tests use."""

    def __init__(self, script, arguments):
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        words = [str(ROOT / script), *map(str, arguments)]
        self._process = SERVER.Process(target=_run, args=(words, dict(os.environ), self._said))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def communicate(self):
        """Wait for the end -> (stdout, stderr)."""
        assert _ended([self._process]), "hangs"
        output, errors = (path.read_text() for path in self._said)
        self._folder.cleanup()
        return output, errors


def _ended(ranks):
    """Wait for processes, and kill the others when one fails; False if they have hung."""
    hangs_at = time.monotonic() + HANG_SECONDS
    while running := [rank for rank in ranks if rank.exitcode is None]:
        connection.wait([rank.sentinel for rank in running], 1)
        if any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.kill()
        elif time.monotonic() > hangs_at:
            for rank in running:
                os.kill(rank.pid, signal.SIGABRT)  # the process then prints its stack
                rank.join()
            return False
    return True


@contextmanager
def meeting(processes):
    """The environment variables that torchrun would set for each process; none for a single one.

    Like torchrun, this process hosts the store in which they meet, so that no port is guessed.
    """
    if processes == 1:
        yield [{}]
        return
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    yield [
        {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(processes)
    ]
    del store


def _run(words, environment, said, given=os.devnull):
    """Become the script, in the new process."""
    for descriptor, path in enumerate([given, *said]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    first = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    ours = [
        path
        for path in sys.path
        if Path(path).is_relative_to(ROOT)  # what tests have added,
        and not Path(path).is_relative_to(sys.prefix)
    ]  # but not an environment that lies here
    sys.path[:] = [*first, *(path for path in sys.path if path and path not in ours)]
    sys.argv = words
    faulthandler.enable()
    multiprocessing.set_start_method(None, force=True)  # as in a fresh process
    render_forks.install()
    runpy.run_path(words[0], run_name="__main__")
