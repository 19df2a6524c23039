"""Signals that end training: finish the step, save a checkpoint, then stop.

Ctrl-C      the user
SIGTERM     a cluster, `kill`, torchrun
SIGHUP      the terminal is gone: a closed window or ssh connection
SIGUSR1     a warning before the time limit: Slurm's --signal=USR1@120
"""

import os
import signal
import stat
import sys
from contextlib import suppress
from types import FrameType

from minisft.common.torchrun import announced_rank

NOTICE = b"\nstopping after this step; Ctrl-C again stops at once, without saving\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interruption:
    """Inside `with`, the first signal is kept in `signal`; a second Ctrl-C interrupts.

    Other repetitions do nothing: a cluster sends SIGTERM to all processes, and torchrun passes it
    on. An ignored SIGHUP stays ignored, so a run under nohup continues.
    """

    def __enter__(self) -> "Interruption":
        self.signal: int | None = None
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            self.__exit__()
            signal.raise_signal(number)
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.signal is None and number == signal.SIGINT and announced_rank() == 0:
            # print is not safe in a handler. Behind `2>&1 | tee log`, Ctrl-C has ended tee, too.
            with suppress(OSError):
                os.write(2, NOTICE)
        self.signal = self.signal or number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Discard output to a terminal that is gone, because every print would fail."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        # A terminal that is gone is still a device, but no terminal any more.
        is_device = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
        if is_device and not os.isatty(stream.fileno()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
