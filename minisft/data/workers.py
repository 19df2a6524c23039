"""Worker processes that read and encode windows of rows ahead of training."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from minisft.common.errors import UserError, first_line
from minisft.data.dataset import Rows
from minisft.data.encode_report import EncodeReport
from minisft.data.encoding import Encode, Example, read_and_encode


@dataclass
class Window:
    """Consecutive steps of an epoch, whose rows are read and sorted by length at once."""

    first_step: int
    num_steps: int
    numbers: np.ndarray  # row numbers
    seed: list[int]


class WorkerKilled(UserError):
    """A worker process has ended before its work was done."""


class WindowReader:
    """`reader[window]`: the window with its examples, or with the UserError of a broken row."""

    def __init__(self, rows: Rows | Sequence[Example], encode: Encode) -> None:
        self.rows, self.encode = rows, encode

    def __getitem__(self, window: Window) -> tuple[Window, list[Example] | UserError, EncodeReport]:
        try:
            examples, report = read_and_encode(self.rows, self.encode, window.numbers)
        except UserError as error:
            # Raised by the training process, without the traceback of a worker.
            return window, UserError(str(error)), EncodeReport()
        return window, examples, report


def read_ahead(reader: Any, tasks: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield `reader[task]` for every task, in order. Workers read tasks ahead.

    reader: anything with __getitem__ that can be sent to a worker process, and never returns None.
    WorkerKilled if the system has killed a worker, as it does when memory runs out.
    """
    if num_workers == 0:
        for task in tasks:
            yield reader[task]
        return
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=1,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        # Its own generator: otherwise the loader draws from the generator that dropout uses.
        generator=torch.Generator(),
    )
    try:
        yield from _until_a_worker_dies(loader)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise WorkerKilled(
            f"a data worker was killed ({first_line(error).rstrip('. ')}). The memory has probably "
            "run out: lower --dataloader_num_workers."
        ) from error


def _until_a_worker_dies(loader: DataLoader) -> Iterator[Any]:
    """Yield the items of a loader. RuntimeError between two items if a worker has been killed.

    torch raises this error in its handler of SIGCHLD, wherever the main thread is then: an
    optimizer step would end with some weights updated and others not.
    """
    items = iter(loader)  # sets torch's handler
    raise_if_killed = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(raise_if_killed):
        yield from items
        return
    is_waiting = False

    def handle(number: int, frame: FrameType | None) -> None:
        if is_waiting:
            raise_if_killed(number, frame)

    signal.signal(signal.SIGCHLD, handle)
    try:
        while True:
            is_waiting = True
            raise_if_killed(signal.SIGCHLD, None)  # during the last item
            item = next(items, None)
            is_waiting = False
            if item is None:
                return
            yield item
    finally:
        signal.signal(signal.SIGCHLD, raise_if_killed)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    # The training process handles these signals and ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # DataLoader watches its parent too, but not while a full queue blocks it, nor if the parent
    # died before the worker started.
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
