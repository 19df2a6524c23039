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

    new_cache: makes an empty KeyValueCache. limit: how many there are, kept or in use, unless more
    are in use at the same time.
    """

    def __init__(self, new_cache, limit):
        self.new_cache, self.limit = new_cache, limit
        self._kept, self._lock = [], Lock()  # (ids, cache), the latest used last
        self._in_use = 0

    def take(self, ids):
        """A KeyValueCache with as much of the beginning of `ids` as is known, never all of it."""
        with self._lock:
            # The last id is computed in any case: what follows it is wanted.
            cache = self._taken(ids[:-1])
            self._in_use += 1
        return cache

    def _taken(self, ids):
        if not self._kept:
            return self.new_cache()
        overlaps = [common_prefix(known, ids) for known, _ in self._kept]
        best = max(range(len(overlaps)), key=overlaps.__getitem__)
        known, cache = self._kept[best]
        if 10 * overlaps[best] >= 9 * len(known):
            del self._kept[best]
        else:
            # Another conversation, perhaps with the same system prompt: it keeps its own.
            source, cache = cache, self._unused()
            if cache is not source:
                return copy_of_beginning(source, overlaps[best], cache)
        cache.truncate(overlaps[best])
        return cache

    def _unused(self):
        """A new cache, or the one that has not been used for longest if there are enough."""
        if len(self._kept) + self._in_use < self.limit:
            return self.new_cache()
        return self._kept.pop(0)[1]

    def give_back(self, ids, cache):
        """Keep a cache that holds `ids`; the one that has not been used for longest goes."""
        with self._lock:
            self._in_use -= 1
            if cache.length:
                self._kept = [*self._kept, (ids, cache)][-self.limit :]


@torch.inference_mode()
def copy_of_beginning(source, length, cache):
    """`cache`, which from then on has the first `length` tokens of another and no others."""
    cache.truncate(0)
    for layer, (keys, values) in enumerate(source.pairs):
        cache.append(layer, keys[:, :, :length], values[:, :, :length])
    cache.length, cache.angles = length, source.angles
    return cache


def sharing_weights(model):
    """A copy of a model with the same tensors in memory, to which an adapter can be added."""
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
    }
    shared |= {id(buffer): buffer for buffer in model.buffers()}  # of quantised layers
    return copy.deepcopy(model, shared)


def common_prefix(left, right):
    """How many ids at the beginning are the same."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
