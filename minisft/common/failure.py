"""A failing run under torchrun: one process prints the reason, then all processes end.

    fail(print_reason)              # called by the process that failed
    exit_when_another_fails()       # called by all processes at the start

A mistake in the options fails in every process at once, and a lost connection fails in every
process that is left. The user should read the reason once. torchrun gives each process the path
RUN/RANK/error.json in a temporary folder. The processes of a machine share one more file there:

    RUN/minisft_failure exists          a process has failed and is printing its reason
    RUN/minisft_failure has content     the reason is printed; all other processes end

torch's own recording of errors (`elastic.multiprocessing.errors.record`) does not replace this.
It prints a traceback for a mistake in the options, and it cannot end a process that waits for the
others inside a library.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Seconds to wait for the reason of the process that failed first, in case it hangs, and then for
# torchrun to see its end.
PATIENCE, SEEN_WITHIN = 60, 3


def fail(print_reason: Callable[[], int]) -> NoReturn:
    """End this process. The first process to fail calls `print_reason`, which returns the status.

    Without torchrun every process prints its own reason.
    """
    shared = _shared_file()
    if shared is None:
        sys.exit(print_reason())
    try:
        shared.open("x").close()
    except FileExistsError:
        _exit_after_the_first(shared)
    except OSError:  # without the file, every process prints its reason
        pass
    status = print_reason()
    if shared.exists():
        shared.write_text(str(os.getpid()))
    _exit_now(status)


def exit_when_another_fails() -> None:
    """Start a thread that ends this process when another one has failed.

    The main thread may be waiting for that process inside a library, where neither signals nor
    exceptions reach it.
    """
    if shared := _shared_file():
        threading.Thread(target=_watch, args=(shared,), daemon=True).start()


def _watch(shared: Path) -> None:
    while not (shared.exists() and shared.read_text() not in ("", str(os.getpid()))):
        time.sleep(0.5)
    _exit_after_the_first(shared)


def _exit_after_the_first(shared: Path) -> NoReturn:
    _wait(lambda: shared.exists() and not shared.read_text(), PATIENCE)
    # torchrun reports the process that it sees end first as the root cause. It has seen the end
    # once that process is gone. After Ctrl-C it does not look: it waits for the ranks in order.
    _wait(lambda: shared.exists() and not _is_gone(shared.read_text()), SEEN_WITHIN)
    _exit_now(1)


def _wait(is_early: Callable[[], bool], seconds: float) -> None:
    """Wait while `is_early()` is True, but at most so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and is_early():
        time.sleep(0.1)


def _is_gone(process_id: str) -> bool:
    """True if the process has printed its reason and no longer exists, not even as a zombie."""
    if not process_id:
        return False
    try:
        os.kill(int(process_id), 0)
    except OSError:
        return True
    return False


def _exit_now(status: int) -> NoReturn:
    """End without the usual clean-up, which may wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _shared_file() -> Path | None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path).parent.parent / "minisft_failure" if path else None
