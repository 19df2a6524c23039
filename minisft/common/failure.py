"""When one of the processes under torchrun fails: one of them says why, and all end.

    if not claim():
        give_way()
    print("error: ...", file=sys.stderr)
    told()
    leave(2)

A mistake in the options is found by every process at once, a broken connection by those that are
left when one has crashed; either should be read once. torchrun gives each process the name of a
file, RUN/RANK/error.json, in a folder that it makes and removes; the processes of this machine
agree by a file there. Without torchrun, every process speaks for itself.
"""

import os
import sys
import threading
import time
from pathlib import Path

PATIENCE = 60  # seconds to wait for the first to fail, lest one that hangs keeps all


def claim():
    """Whether this process is the first to fail of those on this machine, and is to say why."""
    path = _file()
    if path is None:
        return True
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    except OSError:  # nowhere to agree: better said twice than never
        pass
    return True


def told():
    """The reason has been said: the other processes may end."""
    path = _file()
    if path and path.exists():
        path.write_text(str(os.getpid()))


def leave(status):
    """End this process; under torchrun at once, without the exit in order, which may wait."""
    if _file() is None:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def give_way():
    """End this process, which is not the first to fail, after that one."""
    path, ends = _file(), time.monotonic() + PATIENCE
    # torchrun names as the cause the process that it sees end first; it has seen it once the
    # process is gone.
    while time.monotonic() < ends and path.exists() and not _is_gone(path.read_text()):
        time.sleep(0.1)
    leave(1)


def _is_gone(process_id):
    """Whether no such process is there, not even one whose end its parent has not noted."""
    if not process_id:
        return False  # it has not said yet why it fails
    try:
        os.kill(int(process_id), 0)
    except OSError:
        return True
    return False


def end_with_others():
    """From now on end this process, wherever it is, when another one has failed and said why.

    It may be waiting for that one inside a library, where neither signals nor errors reach it.
    """
    if path := _file():
        threading.Thread(target=_watch, args=(path,), daemon=True).start()


def _watch(path):
    while not (path.exists() and path.read_text() not in ("", str(os.getpid()))):
        time.sleep(0.5)
    give_way()


def _file():
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path).parent.parent / "minisft_failure" if path else None
