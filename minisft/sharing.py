"""What conversations share: turns at the device, keys and values, the weights themselves.

    turns, caches = Turns(), Caches(partial(KeyValueCache, model.config), limit=8)
    cache = caches.take(ids)            # holds as much of the beginning of ids as is known
    with turns:                         # one at a time, in the order of asking
        model(torch.tensor([ids[cache.length :]]), cache=cache)
    caches.give_back(ids, cache)
"""

import copy
from collections import deque
from threading import Condition, Lock, get_ident

import torch
from torch import nn


class Turns:
    """A lock that threads get in the order in which they ask.

    With threading.Lock, one that asks again at once mostly gets it before those that wait.
    """

    def __init__(self):
        self._changed, self._waiting = Condition(), deque()  # of threads, the first has its turn

    def __enter__(self):
        me = get_ident()
        with self._changed:
            self._leave(me)  # what Ctrl-C at a bad moment may have left
            self._waiting.append(me)
            try:
                self._changed.wait_for(lambda: self._waiting[0] == me)
            except BaseException:
                self._leave(me)
                raise

    def __exit__(self, *_):
        with self._changed:
            self._leave(get_ident())

    def _leave(self, thread):
        if thread in self._waiting:
            self._waiting.remove(thread)
            self._changed.notify_all()

    def call(self, function, *arguments):
        """`function(*arguments)` when it is our turn."""
        with self:
            return function(*arguments)


class Caches:
    """The keys and values of the last conversations, for any thread to go on from.

    new_cache: makes an empty KeyValueCache.
    """

    def __init__(self, new_cache, limit):
        self.new_cache, self.limit = new_cache, limit
        self._kept, self._lock = [], Lock()  # (ids, cache), the latest used last

    def take(self, ids):
        """A KeyValueCache with as much of the beginning of `ids` as is known, never all of it."""
        # The last id is computed in any case: what follows it is wanted.
        with self._lock:
            overlaps = [common_prefix(known, ids[:-1]) for known, _ in self._kept]
            best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
            if best is None:
                return self.new_cache()
            known, cache = self._kept[best]
            if self.limit > 1 and 10 * overlaps[best] < 9 * len(known):
                # Another conversation, perhaps with the same system prompt: it keeps its own.
                return copy_of_beginning(cache, overlaps[best], self.new_cache())
            self._kept.pop(best)
        cache.truncate(overlaps[best])
        return cache

    def give_back(self, ids, cache):
        """Keep a cache that holds `ids`; the one that has not been used for longest goes."""
        with self._lock:
            if cache.length:
                self._kept = [*self._kept, (ids, cache)][-self.limit :]


@torch.inference_mode()
def copy_of_beginning(cache, length, empty):
    """The cache `empty`, which from then on has the first `length` tokens of another."""
    for layer, (keys, values) in enumerate(cache.pairs):
        empty.append(layer, keys[:, :, :length], values[:, :, :length])
    empty.length, empty.angles = length, cache.angles
    return empty


def sharing_weights(model):
    """A copy of a model with the same tensors in memory, to which an adapter can be added."""
    shared = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
              for parameter in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}  # of quantised layers
    return copy.deepcopy(model, shared)


def common_prefix(left, right):
    """How many ids at the beginning are the same."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
