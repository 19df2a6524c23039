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

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 differ by fields of the config only. Modules have the names
of a Hugging Face checkpoint.

Shapes: B batch, T time (tokens of this call), S time of the keys (cache and this call), D model
width, H query heads, K key/value heads, d width of a head, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.attention import Attend, attention_with_mask
from minisft.model.cache import Cache, KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.fast_paths import linear, next_angles, rms_norm
from minisft.model.gradient_checkpointing import recompute_in_backward
from minisft.model.packed_attention import packed_attention, packed_positions
from minisft.model.rotary import rotary_angles, rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension of x (..., width), in the type of x."""
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """x W^T + b."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) from (..., in_features)."""
        return linear(input, self.weight, self.bias)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, where H / K query heads share a key head (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.num_heads, self.num_key_value_heads, self.head_dim = H, K, d
        self.q_proj = Linear(D, H * d, bias=bias or config.qkv_bias)
        self.k_proj = Linear(D, K * d, bias=bias or config.qkv_bias)
        self.v_proj = Linear(D, K * d, bias=bias or config.qkv_bias)
        self.o_proj = Linear(H * d, D, bias=bias)
        self.is_rotary = bool(config.no_rope_layers[layer])
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: Cache | None, layer: int
    ) -> Tensor:
        """(B, T, D) from x (B, T, D).

        cos, sin: the rotary angles of the T positions. attend: computes the attention from q, k
        and v. layer: the number of this layer in the cache.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.is_rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, d), (B, K, T, d)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, d)
        y = attend(q, k, v)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: Cache | None, layer: int
    ) -> Tensor:
        """(B, T, D) from x (B, T, D); for the other arguments see Attention."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm: `model` in a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.layers_are_compiled = False
        # nn.Embedding(V, D) draws normal values. On the meta device that imports torch's compiler,
        # which takes two seconds.
        weight = nn.init.uniform_(torch.empty(config.vocab_size, config.hidden_size), -1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
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
        T = tokens.shape[1]
        S = T if cache is None else T + cache.length
        x = self.embed_tokens(tokens)  # (B, T, D)
        attend: dict[str, Attend] = {}  # for each layer type
        for layer_type in set(self.config.layer_types):
            window = self.config.sliding_window if layer_type == "sliding_attention" else None
            if lengths is None:
                attend[layer_type] = attention_with_mask(T, S, mask, window, x.device)
            else:
                attend[layer_type] = packed_attention(lengths, window, x, self.layers_are_compiled)
        if lengths is not None:
            positions = packed_positions(lengths, x.device)
        if positions is None:
            cos, sin = next_angles(self.angles, self.config, T, x, cache)
        else:
            cos, sin = self.angles(positions, x.dtype)
        for index, layer in enumerate(self.layers):
            arguments = (x, cos, sin, attend[self.config.layer_types[index]], cache, index)
            if self.gradient_checkpointing and self.training:
                x = recompute_in_backward(layer, *arguments)
            else:
                x = layer(*arguments)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin (B or 1, 1, T, d) of positions (T,) or (B, T)."""
        return rotary_angles(self.config, positions, dtype)

    def compile_layers(self, **options: Any) -> None:
        """Compile every layer; options: of torch.compile."""
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
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

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
        lengths: of the rows of a pack, which are concatenated in tokens (1, T). A token sees only
            its own row, and every row begins at position 0. Without mask and cache.
        """
        return self.model(tokens, positions, mask, cache, lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token from hidden states (..., D)."""
        if self.config.tie_word_embeddings:
            return linear(hidden, self.model.embed_tokens.weight)
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
