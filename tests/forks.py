"""Scripts run as processes of their own, forked from one that has loaded torch already.

    done = run_script("train.py", ["--help"])
    done.returncode, done.stdout, done.stderr
    run_script("train.py", flags, processes=2)     # what torchrun would start

Loading torch is most of what a short command takes, and the tests run hundreds of them.
"""

import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300
SERVER = multiprocessing.get_context("forkserver")
# torch._dynamo comes with the first optimizer. None of them may ask for a GPU when it is imported:
# a process that has used CUDA can fork no other that does.
PRELOADED = ["torch", "torch._dynamo", "safetensors.torch", "tokenizers"]
SERVER.set_forkserver_preload(PRELOADED)


def run_script(script, arguments, processes=1):
    """`python SCRIPT ARGUMENTS` in the project's folder -> subprocess.CompletedProcess.

    Of several processes the output is together, and where one fails the others are ended.
    """
    words = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        ranks = [SERVER.Process(target=_run, args=(words, environment, said))
                 for environment in _environments(processes)]
        for rank in ranks:
            rank.start()
        ends = time.monotonic() + SECONDS
        while any(rank.exitcode is None for rank in ranks):
            connection.wait([rank.sentinel for rank in ranks if rank.exitcode is None], 1)
            late = time.monotonic() > ends
            if late or any(rank.exitcode for rank in ranks):
                for rank in ranks:
                    rank.kill()
            if late:
                raise subprocess.TimeoutExpired(words, SECONDS, *(one.read_text() for one in said))
        code = max((rank.exitcode for rank in ranks), key=lambda code: (code > 0, abs(code)))
        return subprocess.CompletedProcess(words, code,
                                           *(path.read_text() for path in said))


def _environments(processes):
    """What torchrun would put into the environment of each process; nothing for a single one."""
    if processes == 1:
        return [dict(os.environ)]
    port = random.randint(20000, 32000)  # below those that connections are given meanwhile
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost",
             "MASTER_PORT": port}
    return [{**os.environ, **{name: str(value) for name, value in world.items()},
             "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run(words, environment, said):
    """What the new process does: become the script."""
    for descriptor, path in enumerate([os.devnull, *said]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    first = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    ours = [path for path in sys.path if Path(path).is_relative_to(ROOT)  # what tests have added,
            and not Path(path).is_relative_to(sys.prefix)]  # but not an environment that lies here
    sys.path[:] = [*first, *(path for path in sys.path if path and path not in ours)]
    sys.argv = words
    multiprocessing.set_start_method(None, force=True)  # what it would be in a fresh process
    runpy.run_path(words[0], run_name="__main__")
