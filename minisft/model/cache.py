"""The KV cache: keys and values of the tokens that a model has seen."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from minisft.model.config import ModelConfig


class Cache(Protocol):
    """The interface that a layer uses to store keys and values."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, K, T, d) of a layer; returns all of that layer."""
        ...


class KeyValueCache:
    """Keys and values of the tokens so far: for each layer a pair of tensors (B, K, capacity, d).

    It is an argument of `forward`. `length` is the number of tokens it holds. The tensors grow by
    doubling, so adding a token does not copy the others; places without a token hold zeros.
    capacity: the number of tokens before the tensors have to grow. `factors` is the table of
    layer_arguments.next_factors.
    """

    def __init__(self, config: ModelConfig, capacity: int = 64):
        self.length, self.capacity = 0, capacity
        self.pairs: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers
        self.factors: tuple[Tensor, Tensor] | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, d) of a layer; returns views of all (B, K, S, d)."""
        end = self.length + keys.shape[2]
        pair = self.pairs[layer]
        if pair is None or pair[0].shape[2] < end:
            old_keys, old_values = pair or (None, None)
            pair = self._grown(old_keys, keys, end), self._grown(old_values, values, end)
            self.pairs[layer] = pair
        for store, new in zip(pair, (keys, values), strict=True):
            store.narrow(2, self.length, new.shape[2]).copy_(new)
        return pair[0].narrow(2, 0, end), pair[1].narrow(2, 0, end)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in the layers that have any."""
        for layer, pair in enumerate(self.pairs):
            if pair is not None and pair[0].shape[2] < length:
                keys, values = (self._grown(store, store, length) for store in pair)
                self.pairs[layer] = keys, values

    def _grown(self, old: Tensor | None, new: Tensor, end: int) -> Tensor:
        """A larger tensor with the content of the old one, and room for `end` tokens."""
        B, K, _, d = new.shape
        store = new.new_zeros(B, K, max(end, 2 * self.length, self.capacity), d)
        if old is not None and self.length:
            store[:, :, : self.length] = old[:, :, : self.length]
        return store

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.length = min(self.length, length)

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keep only these rows of the batch."""
        self.pairs = [pair and (pair[0][rows], pair[1][rows]) for pair in self.pairs]
