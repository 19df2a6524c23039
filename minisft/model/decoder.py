"""The Llama decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    model = CausalLM(ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=172,
                                 num_hidden_layers=2, num_attention_heads=8))
    hidden = model(torch.tensor([[1, 5, 7]]))          # (B, T, D)
    logits = model.logits(hidden[:, -1])               # (B, V), where they are needed

    x = embed(tokens)
    for each layer:
        x = x + attention(norm(x))
        x = x + mlp(norm(x))
    hidden = norm(x)

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 differ by fields of the config only; Baichuan2 has three
modules of its own, see baichuan.py. Modules have the names of a Hugging Face checkpoint.

Shapes: B batch, T time (tokens of this call), S time of the keys (cache and this call), D model
width, H query heads, K key/value heads, d width of a head, V vocabulary.

The tour explains it: docs/tour/05_model.md.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.attention import Attend
from minisft.model.basic_layers import Embedding, Linear, RMSNorm
from minisft.model.cache import Cache, KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.families import build_attention, build_head
from minisft.model.gradient_checkpointing import recompute_in_backward
from minisft.model.layer_arguments import choose_attention, choose_factors


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) from x (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and its input added to its output."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = build_attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        factors: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """(B, T, D) from x (B, T, D); for the other arguments see Attention."""
        x = x + self.self_attn(self.input_layernorm(x), factors, attend, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm: `model` in a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.layers_are_compiled = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) from tokens (B, T). For the arguments see CausalLM.forward."""
        x = self.embed_tokens(tokens)  # (B, T, D)
        attend = choose_attention(self.config, x, mask, cache, lengths, self.layers_are_compiled)
        factors = choose_factors(self.config, x, positions, cache, lengths)
        for index, layer in enumerate(self.layers):
            arguments = (x, factors, attend[self.config.layer_types[index]], cache, index)
            if self.gradient_checkpointing and self.training:
                x = recompute_in_backward(layer, *arguments)
            else:
                x = layer(*arguments)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def compile_layers(self, **options: Any) -> None:
        """Compile every layer. options: the arguments of torch.compile."""
        self.layers_are_compiled = True
        for layer in self.layers:
            layer.compile(**options)


class CausalLM(nn.Module):
    """A language model. `forward` returns hidden states, and `logits` the scores of next tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = build_head(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) from tokens (B, T).

        positions: (T,) or (B, T); by default they continue after the cache.
        mask: True where a query may see a key, broadcastable to (B, 1, T, S); by default causal.
            Rows padded on the right need no mask: a token does not see what comes after it.
        cache: read and extended.
        lengths: the lengths of the rows of a pack, which tokens (1, T) concatenates. A token sees
            only its own row, and every row begins at position 0. Without mask and cache.
        """
        return self.model(tokens, positions, mask, cache, lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token from hidden states (..., D)."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.logits(hidden)
        return self.lm_head(hidden)

    def initial_values(
        self, generator: torch.Generator | None = None
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield (parameter, initial value): norms 1, biases 0, others normally distributed."""
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape)
            if name.endswith("norm.weight"):
                value.fill_(1.0)
            elif not name.endswith("bias"):
                value.normal_(0.0, self.config.initializer_range, generator=generator)
            yield parameter, value

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its initial value, drawn on the CPU."""
        for parameter, value in self.initial_values(generator):
            parameter.copy_(value)
