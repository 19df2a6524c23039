"""A thread that does all work with the model, for a server whose answers come from many threads.

    thread = ModelThread()
    assistant = thread.run(Assistant, "examples/base")
    for piece in thread.iterate(assistant.stream(messages)):    # from any thread
        print(piece, end="")

Every thread that computes with torch on a CPU gets helpers of its own, one for each further core.
With more of them than cores, OpenMP lets helpers sleep between two operations, and waking them
takes longer than a small product. On two cores, SmolLM2-135M in 8 bits decoded 61 tokens/s on the
page when every visitor had a thread, and 93 with this one.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class ModelThread:
    """Calls functions one after the other, in the order in which threads ask."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        # The process may end while a call is in progress.
        Thread(target=self._work, daemon=True).start()

    def run(self, function: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T:
        """function(*arguments, **more), with its result or its exception."""
        result: Future[T] = Future()
        self._calls.put((result, partial(function, *arguments, **more)))
        return result.result()

    def iterate(self, items: Iterable[T]) -> Iterator[T]:
        """The items of an iterable; each one is computed in the thread."""
        iterator = iter(items)

        def step() -> tuple[T] | None:
            """The next item, in a tuple; None after the last one."""
            for item in iterator:
                return (item,)
            return None

        while (item := self.run(step)) is not None:
            yield item[0]

    def _work(self) -> None:
        while True:
            result, call = self._calls.get()
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)
