"""Run a script: a user mistake prints one line, a bug prints a traceback."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn, TypeVar

from minisft.common import failure
from minisft.common.errors import UserError, first_line, is_out_of_memory
from minisft.common.threads import share_cores
from minisft.common.torchrun import announced_processes, announced_rank

Result = TypeVar("Result")


def run_script(main: Callable[[], Result]) -> Result:
    """Call `main()` and return its result. A user mistake prints one line; the status is 2.

    `--debug` adds the traceback. Under torchrun the first process to fail prints the reason.
    Scripts call it before they import torch, so that torch has its share of the cores.
    """
    share_cores()
    _open_standard_streams()
    _clean_up_after_signals()
    try:
        result = main()
        sys.stdout.flush()  # a full disk shows here
        return result
    except SystemExit:
        raise
    except BaseException as exception:
        error = exception
        failure.fail(lambda: _print_reason(error))


@contextmanager
def advice_after_ctrl_c(advice: Callable[[], str]) -> Generator[None, None, None]:
    """After Ctrl-C in the body, print `advice()` on rank 0, before run_script says "interrupted".

    It says what is kept, and how to go on; "" prints nothing.
    """
    try:
        yield
    except KeyboardInterrupt:
        if announced_rank() == 0 and (text := advice()):
            print(text, file=sys.stderr, flush=True)
        raise


def _open_standard_streams() -> None:
    """Replace closed streams, and let standard output escape what its encoding lacks."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a file opened later would get the number of a closed stream, and its output
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="replace"))
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _clean_up_after_signals() -> None:
    """End on SIGTERM and SIGHUP as on Ctrl-C, so that temporary files are removed.

    Not under torchrun: a process that waits for the others inside a library must end at once.
    """
    if announced_processes() == 1:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _print_reason(error: BaseException) -> int:
    """Print why the script ends to standard error; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe (`| head`) has exited, so a message would have no reader.
        _discard_output()
        return 141
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    message = _message(error)
    if message is None or "--debug" in sys.argv:
        traceback.print_exception(error)
    if message is None:
        return 1
    print(f"error: {message}", file=sys.stderr)
    if _output_fails():
        _discard_output()  # Python would try again, and change the status
    return 2


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_fails(text: str = "") -> bool:
    """True if standard output cannot be written, because its disk is full, for instance."""
    try:
        print(text, end="", flush=True)
    except (OSError, ValueError):
        return True
    return False


def _message(error: BaseException) -> str | None:
    """The line for an error that is not a bug; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        # print() has dropped the text that it could not flush: try a line break.
        probe = "\n" if error.errno == errno.ENOSPC else ""
        place = error.filename or ("standard output" if _output_fails(probe) else None)
        return f"{place}: {error.strerror}" if place else error.strerror
    if is_out_of_memory(error):
        reason = f" ({first_line(error)})" if str(error) else ""
        return f"out of memory: use smaller batches or a smaller model{reason}"
    return None
