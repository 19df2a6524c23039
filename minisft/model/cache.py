"""Keys and values of the tokens a model has seen."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, one pair of (B, K, capacity, d) per layer.

    Handed to `forward`, never kept in modules. Grows by doubling, so that a new token costs a
    write, not a copy of the past. `length` counts the tokens held; `angles` are the rotary cos and
    sin of the first positions, computed once. capacity: how many tokens there is room for before
    it has to grow; where none is yet there are zeros.
    """

    def __init__(self, config, capacity=64):
        self.length, self.capacity = 0, capacity
        self.pairs = [None] * config.num_hidden_layers
        self.angles = None

    def append(self, layer, keys, values):
        """Add (B, K, T, d) of one layer; returns views of all keys and values (B, K, S, d)."""
        end = self.length + keys.shape[2]
        if self.pairs[layer] is None or self.pairs[layer][0].shape[2] < end:
            self.pairs[layer] = tuple(
                self._grown(layer, index, new, end) for index, new in enumerate((keys, values))
            )
        held = self.pairs[layer]
        for store, new in zip(held, (keys, values), strict=True):
            store.narrow(2, self.length, new.shape[2]).copy_(new)
        return tuple(store.narrow(2, 0, end) for store in held)

    def _grown(self, layer, index, new, end):
        batch, heads, _, width = new.shape
        capacity = max(end, 2 * self.length, self.capacity)
        store = new.new_zeros(batch, heads, capacity, width)
        if self.length:
            store[:, :, : self.length] = self.pairs[layer][index][:, :, : self.length]
        return store

    def truncate(self, length):
        """Forget everything after the first `length` tokens."""
        self.length = min(self.length, length)

    def select(self, rows):
        """Keep only the given batch rows (a list or tensor of indices)."""
        self.pairs = [pair and tuple(store[rows] for store in pair) for pair in self.pairs]
