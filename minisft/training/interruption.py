"""SIGTERM and Ctrl-C while training: finish the step, save, then stop."""

import signal
from types import FrameType


class Interruption:
    """Inside `with`, the first SIGTERM or Ctrl-C is kept in `signal`; a second Ctrl-C interrupts.

    A second SIGTERM does nothing: a cluster sends it to all processes, and torchrun passes it on.
    """

    def __enter__(self) -> "Interruption":
        self.signal: int | None = None
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            self.__exit__()
            signal.raise_signal(number)
        self.signal = self.signal or number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
