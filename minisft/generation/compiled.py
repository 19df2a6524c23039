"""Compiled decoding, for chat.py --compile: the same answers to one conversation, faster.

    decoder = CompiledDecoder(model, capacity=2048)     # compiles; a minute for a large model
    for token in stream(decoder, [5, 17, 3], sampling, stop_ids={2}, cache=decoder.new_cache()):
        print(token)

At batch size 1 a token needs at least the time it takes to read the weights. Two other costs can be
avoided: launching a thousand small kernels, which a CUDA graph launches at once, and storing their
intermediate results, which the compiler avoids by fusing kernels. A graph needs fixed shapes and
addresses. So on a GPU the cache has its full capacity S from the start. On a CPU it grows, and the
compiled step is for any S. The position of the new token is a tensor.
"""

from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, first_line
from minisft.model.attention import attend
from minisft.model.cache import KeyValueCache
from minisft.model.decoder import CausalLM
from minisft.model.families import position_factors

Pairs = list[tuple[Tensor, Tensor]]  # keys and values (1, K, S, d) of every layer
# A CUDA graph, the token (1, 1) and position (1,) that it reads, the logits (1, V) that it writes.
Graph = tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]


class CompiledDecoder(nn.Module):
    """A model whose decoding steps are compiled, to be used in its place by `stream`.

    It returns logits instead of hidden states, because one compiled function computes both.
    capacity: the maximum length of a conversation; on a GPU, a step reads a cache of this length.
    UserError if the model cannot be compiled.
    """

    def __init__(self, model: CausalLM, capacity: int):
        super().__init__()
        if model.config.has_dynamic_rope:
            raise UserError(
                "--compile: the rotary angles of this model (rope type dynamic) change with the "
                "length of the conversation. Leave out --compile."
            )
        self.model, self.config, self.capacity = model, model.config, capacity
        norm = model.model.norm.weight  # a GGUF file's embedding has no weight in memory
        self.device = norm.device
        # A table, since a compiler would compute a factor again wherever it is used.
        positions = torch.arange(capacity, device=self.device)
        self.factors = position_factors(model.config, positions, norm.dtype)
        # With this tuning, a matrix product with one row is fused with its neighbours instead of
        # left to cuBLAS. mode="reduce-overhead" would bind its graphs to the compiling thread.
        self.step = torch.compile(
            next_logits, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True}
        )
        self.graphs: WeakKeyDictionary[KeyValueCache, Graph] = WeakKeyDictionary()
        try:
            self._compile_now()
        except RuntimeError as error:
            raise UserError(
                f"--compile failed ({first_line(error)}). Leave out --compile."
            ) from error

    @torch.inference_mode()
    def _compile_now(self) -> None:
        """Take two steps now, so that no answer waits for the compiler."""
        token, cache = torch.zeros(1, 1, dtype=torch.int64, device=self.device), self.new_cache()
        self(token, cache=cache)
        if token.is_cpu:
            for store in (store for pair in cache.pairs if pair for store in pair):
                torch._dynamo.mark_dynamic(store, 2)  # the length S
        self(token, cache=cache)

    def new_cache(self) -> KeyValueCache:
        """An empty cache, on a GPU of the full capacity."""
        if self.device.type == "cpu":
            return KeyValueCache(self.config)
        return KeyValueCache(self.config, self.capacity)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits (1, 1, V) after the last of the tokens (1, T), which are added to the cache.

        cache: from `new_cache`. positions and mask are not supported. On a GPU the logits are valid
        until the next call.
        """
        assert cache is not None and positions is None and mask is None
        if cache.length + tokens.shape[1] > self.capacity:
            raise ValueError(f"the compiled cache has room for {self.capacity} tokens only")
        if cache.length == 0 or tokens.shape[1] > 1:  # the prefill
            return self.model.logits(self.model(tokens, cache=cache)[:, -1:])
        if tokens.is_cuda:
            logits = self._replay(tokens, cache)
        else:
            cache.reserve(cache.length + 1)
            logits = self._run_step(tokens, torch.tensor([cache.length]), cache)
        cache.length += 1
        return logits[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits as they are: `forward` has already computed them."""
        return hidden

    def _run_step(self, token: Tensor, position: Tensor, cache: KeyValueCache) -> Tensor:
        x = self.model.model.embed_tokens(token)
        pairs = [pair for pair in cache.pairs if pair is not None]
        return self.step(self.model, x, position, self.factors, pairs)

    def _replay(self, token: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (1, V) by the CUDA graph of this cache, which is captured at first."""
        if cache not in self.graphs:
            # The current GPU of a thread need not be the GPU of the model.
            with torch.cuda.device(self.device):
                self.graphs[cache] = self._capture(token, cache)
        graph, graph_token, graph_position, logits = self.graphs[cache]
        graph_token.copy_(token)
        graph_position.fill_(cache.length)
        graph.replay()
        return logits

    def _capture(self, token: Tensor, cache: KeyValueCache) -> Graph:
        token, position = token.clone(), torch.tensor([cache.length], device=self.device)
        step = partial(self._run_step, token, position, cache)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # compiles, tunes and loads kernels, which must not happen during a capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may copy caches meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            logits = step()
        return graph, token, position, logits


def next_logits(
    model: CausalLM, x: Tensor, position: Tensor, factors: tuple[Tensor, Tensor], pairs: Pairs
) -> Tensor:
    """Logits (1, V) after a token at `position` (1,): CausalLM's step in fixed shapes.

    x: the token's embedding (1, 1, D). factors: position_factors of all positions. pairs: the keys
    and values of the S positions before; the step adds its own. Later places may hold any finite
    numbers.
    """
    decoder, window = model.model, model.config.sliding_window
    first, second = (table.index_select(2, position) for table in factors)
    distance = position - torch.arange(pairs[0][0].shape[2], device=x.device)  # (S,)
    visible = {"full_attention": distance >= 0}
    if window is not None:
        visible["sliding_attention"] = (distance >= 0) & (distance < window)
    if x.is_cpu:
        attends = {name: partial(attend, mask=keys[None]) for name, keys in visible.items()}
    else:
        attends = {name: partial(attend_to_visible, visible=keys) for name, keys in visible.items()}
    cache = FixedCache(pairs, position)
    for index, layer in enumerate(decoder.layers):
        x = layer(x, (first, second), attends[model.config.layer_types[index]], cache, index)
    return model.logits(decoder.norm(x)[:, -1])


class FixedCache:
    """A Cache of fixed length. The position to write to is a tensor."""

    def __init__(self, pairs: Pairs, position: Tensor):
        self.pairs, self.position = pairs, position

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (1, K, 1, d) of a layer; returns all of that layer (1, K, S, d)."""
        for store, new in zip(self.pairs[layer], (keys, values), strict=True):
            store.index_copy_(2, self.position, new)
        return self.pairs[layer]


def attend_to_visible(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """(1, H, 1, d) from q (1, H, 1, d), k and v (1, K, S, d), over the keys in `visible` (S,).

    Products and sums in float32: the compiler makes kernels of them that use the whole GPU to read
    a long cache, while scaled_dot_product_attention with a mask uses one block per head.
    """
    _, H, _, d = q.shape
    q = q.view(1, k.shape[1], -1, 1, d).float()  # query heads beside the key head they share
    scores = (q * k[:, :, None].float()).sum(-1) * d**-0.5  # (1, K, H/K, S)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    y = (weights[..., None] * v[:, :, None].float()).sum(-2)  # (1, K, H/K, d)
    return y.view(1, H, 1, d).to(v.dtype)
