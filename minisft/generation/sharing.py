"""Resources that conversations share: the device, in turns; KV caches; the weights.

turns, caches = Turns(), Caches(partial(KeyValueCache, model.config), limit=8)
cache = caches.take(ids)                # holds the longest known prefix of ids
with turns:                             # one thread at a time
    model(torch.tensor([ids[cache.length :]]), cache=cache)
caches.give_back(ids, cache)
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Lock, get_ident

import torch
from torch import nn

from minisft.common.sequences import common_prefix_length
from minisft.model.cache import KeyValueCache
from minisft.model.decoder import CausalLM


class Turns:
    """A fair lock: threads get it in the order in which they ask.

    threading.Lock mostly goes to the thread that has just released it: one answer would be finished
    while the others wait.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: deque[int] = deque()  # ids of threads; the first holds the lock

    def __enter__(self) -> None:
        thread = get_ident()
        with self._changed:
            # Ctrl-C between __enter__ and the body of a `with` leaves the thread in the queue.
            self._remove(thread)
            self._waiting.append(thread)
            try:
                self._changed.wait_for(lambda: self._waiting[0] == thread)
            except BaseException:
                self._remove(thread)
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._remove(get_ident())

    def _remove(self, thread: int) -> None:
        if thread in self._waiting:
            self._waiting.remove(thread)
            self._changed.notify_all()


class Caches:
    """The KV caches of the latest conversations. Threads may use it at the same time.

    new_cache: creates an empty KeyValueCache. limit: the number of caches; more exist only while
    more conversations are answered at once.
    """

    def __init__(self, new_cache: Callable[[], KeyValueCache], limit: int = 1):
        self.new_cache, self.limit = new_cache, limit
        self._kept: list[tuple[Sequence[int], KeyValueCache]] = []  # the latest used last
        self._num_in_use = 0
        self._returned: deque[tuple[Sequence[int], KeyValueCache]] = deque()
        self._lock = Lock()

    def take(self, ids: Sequence[int]) -> KeyValueCache:
        """A cache that holds the longest known prefix of `ids`, but never all of them.

        The last id has to be computed again, because its hidden state predicts the next token.
        """
        self._keep_returned()
        with self._lock:
            cache = self._best_cache(ids[:-1])
            self._num_in_use += 1
        self._keep_returned()  # those that came back meanwhile
        return cache

    def give_back(self, ids: Sequence[int], cache: KeyValueCache) -> None:
        """Keep a cache that holds `ids`; beyond the limit, the least recently used is dropped.

        It never waits for the lock. Python closes an answer that was left in the middle whenever it
        collects garbage, even while the same thread is in `take`.
        """
        self._returned.append((ids, cache))
        self._keep_returned()

    def _keep_returned(self) -> None:
        """Keep what was given back, unless the lock is taken; its owner does it afterwards."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                if not self._returned:  # the last owner of the lock has kept it
                    return
                ids, cache = self._returned.popleft()
                self._num_in_use -= 1
                if cache.length:
                    self._kept = [*self._kept, (ids, cache)][-self.limit :]
            finally:
                self._lock.release()

    def _best_cache(self, ids: Sequence[int]) -> KeyValueCache:
        if not self._kept:
            return self.new_cache()
        lengths = [common_prefix_length(known, ids) for known, _ in self._kept]
        length = max(lengths)
        place = lengths.index(length)
        known, cache = self._kept[place]
        if length >= 0.9 * len(known):  # the same conversation continues
            del self._kept[place]
            cache.truncate(length)
            return cache
        # Another conversation, perhaps with the same system prompt, keeps its own cache.
        target = self._unused_cache()
        if target is not cache:
            copy_prefix(cache, length, target)
        target.truncate(length)
        return target

    def _unused_cache(self) -> KeyValueCache:
        """A new cache; at the limit, the least recently used one."""
        if len(self._kept) + self._num_in_use < self.limit:
            return self.new_cache()
        return self._kept.pop(0)[1]


@torch.inference_mode()
def copy_prefix(source: KeyValueCache, length: int, target: KeyValueCache) -> None:
    """Replace the content of `target` by the first `length` tokens of `source`."""
    target.truncate(0)
    for layer, pair in enumerate(source.pairs):
        if pair is not None:
            target.append(layer, pair[0][:, :, :length], pair[1][:, :, :length])
    target.length = length


def share_weights(model: CausalLM) -> CausalLM:
    """A copy of a model on the same tensors in memory, to which an adapter can be added."""
    # deepcopy takes an object from this table instead of copying it.
    shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, shared)
