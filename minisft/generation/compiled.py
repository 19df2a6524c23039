"""One token after another by a compiled model, on a GPU as one CUDA graph: chat.py --compile.

    decoder = CompiledDecoder(model, capacity=2048)          # compiles: a minute for a large model
    for token in stream(model, [1, 403, 407], sampling, stop_ids={2}, cache=decoder.new_cache(),
                        decoder=decoder):
        print(token)

At batch size 1 a token takes as long as it takes to read the weights, if nothing else holds the
GPU up: neither the launching of a thousand small kernels (a graph launches them at once) nor the
writing and reading of what lies between them (the compiler fuses them). Both want shapes and
addresses that stay, so the cache has its full length from the start, and the place of the new
token in it is a tensor. Shapes are named as in model.py; here S is the capacity of the cache.
"""

from functools import partial
from weakref import WeakKeyDictionary

import torch

from minisft.common.errors import UserError
from minisft.model.cache import KeyValueCache


class CompiledDecoder:
    """Scores of the next token for a model in evaluation mode, compiled once for all conversations.

    capacity: how many tokens a conversation may have; every token reads a cache of this length.
    Raises UserError for what cannot be compiled.
    """

    def __init__(self, model, capacity):
        scaling = model.config.rope_scaling
        if scaling and scaling["rope_type"] == "dynamic":
            raise UserError(
                "--compile: this model's rotary positions (rope type dynamic) change "
                "with the length of the conversation; leave it out"
            )
        self.model, self.capacity = model, capacity
        self.device = next(model.parameters()).device
        # Of all positions, since a compiler would compute an angle again wherever one is used.
        positions = torch.arange(capacity, device=self.device)
        self.angles = model.model.angles(positions, model.model.embed_tokens.weight.dtype)
        # With this tuning a product with one row is not left to cuBLAS, but fused with what is
        # around it. Not mode="reduce-overhead": its graphs belong to the thread that made them.
        self.step = torch.compile(
            next_logits, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True}
        )
        self.graphs = WeakKeyDictionary()  # cache: (graph, its token, its position, its logits)
        try:
            self._warm_up()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: did not succeed ({reason}); leave it out") from error

    @torch.inference_mode()
    def _warm_up(self):
        """Compile now, and not while someone waits for an answer."""
        token, cache = torch.zeros(1, 1, dtype=torch.int64, device=self.device), self.new_cache()
        self.model(token, cache=cache)
        self(token, cache)

    def new_cache(self):
        """A KeyValueCache of the full capacity, as the decoder needs it."""
        return KeyValueCache(self.model.config, self.capacity)

    def __call__(self, token, cache):
        """Logits (1, V) after `token` (1, 1), which the cache holds from then on.

        cache: of `new_cache`, with room for one token and at least one before it. On a GPU the
        logits hold until the next call.
        """
        if cache.length >= self.capacity:
            raise ValueError(f"there is no room for more than {self.capacity} tokens")
        if token.is_cuda:
            logits = self._replay(token, cache)
        else:
            logits = self._step_of(token, torch.tensor([cache.length]), cache)()
        cache.length += 1
        return logits

    def _step_of(self, token, position, cache):
        return partial(self.step, self.model, token, position, self.angles, cache.pairs)

    def _replay(self, token, cache):
        if cache not in self.graphs:
            # Streams are those of the current GPU, which need not be the model's.
            with torch.cuda.device(self.device):
                self.graphs[cache] = self._captured(token, cache)
        graph, its_token, its_position, logits = self.graphs[cache]
        its_token.copy_(token)
        its_position.fill_(cache.length)
        graph.replay()
        return logits

    def _captured(self, token, cache):
        """A CUDA graph of the step on this cache, with the tensors that it reads and writes."""
        token, position = token.clone(), torch.tensor([cache.length], device=self.device)
        run = self._step_of(token, position, cache)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles, tunes, loads kernels: nothing of it may happen during a capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy caches meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            logits = run()
        return graph, token, position, logits


def next_logits(model, token, position, angles, pairs):
    """Logits (1, V) after `token` (1, 1) at `position` (1,), whose keys and values it writes.

    angles: the rotary cos and sin (1, 1, S, d) of all positions. pairs: of each layer the keys and
    values (1, K, S, d) of the positions before, and of later ones any finite numbers. What model.py
    does, without anything that depends on a length.
    """
    decoder, window = model.model, model.config.sliding_window
    x = decoder.embed_tokens(token)
    cos, sin = (part.index_select(2, position) for part in angles)
    distance = position - torch.arange(pairs[0][0].shape[2], device=token.device)
    visible = {"full_attention": distance >= 0}
    if window is not None:
        visible["sliding_attention"] = (distance >= 0) & (distance < window)
    attend = {name: partial(attend_to_visible, visible=one) for name, one in visible.items()}
    cache = Places(pairs, position)
    for index, layer in enumerate(decoder.layers):
        x = layer(x, cos, sin, attend[model.config.layer_types[index]], cache, index)
    return model.logits(decoder.norm(x)[:, -1])


class Places:
    """A cache of fixed length, as a layer sees it: written at a position that is a tensor."""

    def __init__(self, pairs, position):
        self.pairs, self.position = pairs, position

    def append(self, layer, keys, values):
        """Put (1, K, 1, d) of one layer in their place; returns all keys and values."""
        for store, new in zip(self.pairs[layer], (keys, values), strict=True):
            store.index_copy_(2, self.position, new)
        return self.pairs[layer]


def attend_to_visible(q, k, v, visible):
    """(1, H, 1, d) of q (1, H, 1, d) and k, v (1, K, S, d), where `visible` (S,).

    Written out as products and sums in float32, of which a compiler makes kernels that read a long
    cache with the whole GPU; those of scaled_dot_product_attention with a mask take a block a head.
    """
    _, H, _, d = q.shape
    q = q.view(1, k.shape[1], -1, 1, d).float()  # the heads that share keys side by side
    scores = (q * k[:, :, None].float()).sum(-1) * d**-0.5  # (1, K, H/K, S)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    y = (weights[..., None] * v[:, :, None].float()).sum(-2)
    return y.view(1, H, 1, d).to(v.dtype)
