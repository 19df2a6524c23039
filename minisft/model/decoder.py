"""The Llama decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

    model = CausalLM(ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=172,
                                 num_hidden_layers=2, num_attention_heads=8))
    hidden = model(torch.tensor([[1, 5, 7]]))          # (B, T, D)
    logits = model.logits(hidden[:, -1])               # (B, V), only where they are wanted

One class serves Llama, Mistral, Qwen2 and Qwen3, which differ by fields of their config. Modules
are called what they are called in a Hugging Face checkpoint.

Shapes: B batch, T time (tokens of this call), S time of all keys (cache and this call), D model
width, H query heads, K key/value heads, d width of a head, V vocabulary.
"""

from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minisft.model.attention import (
    attend_causally,
    attend_in_rows,
    attend_in_rows_at_once,
    has_kernel_for_rows,
    kernel_for_rows,
)
from minisft.model.rotary import rotary_frequencies, rotate

HAS_ONEDNN = torch.backends.mkldnn.is_available()


def are_few_on_cpu(x, weight):
    """Whether x (..., width) are the few rows of a step of generation, in float32 on a CPU.

    There calls cost more than computing, and other ones are faster than those for many rows.
    """
    return (
        x.numel() <= 64 * x.shape[-1]
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        )
    )  # the compiler chooses by itself


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.eps_on_cpu = eps, torch.tensor(eps, device="cpu")

    def forward(self, x):
        """The same shape and type as x (..., width)."""
        weight = self.weight
        if x.dim() == 3 and x.shape[1] == 1 and are_few_on_cpu(x, weight):
            # The mean square as one product: four operations, where torch makes eleven of rms_norm.
            scale = torch.baddbmm(self.eps_on_cpu, x, x.mT, alpha=1 / x.shape[-1]).rsqrt_()
            return (x * scale).mul_(weight)
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def linear(x, weight, bias=None):
    """x W^T + b (..., out) of x (..., in), W (out, in) and b (out,).

    On a CPU oneDNN multiplies a few rows, for it reads W faster than MKL does: up to twice as fast
    for one, by a half for eight. With more than 64 MKL is faster, or both are; with small matrices
    the call is what takes the time.
    """
    if weight.numel() >= 2**18 and HAS_ONEDNN and are_few_on_cpu(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's, multiplied by `linear`."""

    def forward(self, x):
        """(..., out_features) of x (..., in_features)."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        bias = config.attention_bias
        query_width = self.num_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_width, bias=bias or config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_width, bias=bias or config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_width, bias=bias or config.qkv_bias)
        self.o_proj = Linear(query_width, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x, cos, sin, attend, cache, layer):
        """(B, T, D) of x (B, T, D); cos, sin: of the positions; attend: (q, k, v) -> (B, H, T, d).

        layer: the number of this layer, under which `cache` holds its keys.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.num_key_value_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x):
        """(B, T, D) of x (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each behind a norm and added to its input."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, cache, layer):
        """(B, T, D) of x (B, T, D); the other arguments are handed to the attention."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: what a checkpoint calls `model`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        # Uniform, as nn.Linear starts: nn.Embedding's normal draw, on the meta device, imports
        # torch's compiler, for which every command would wait.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1), freeze=False
        )
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, positions, mask, cache, lengths):
        """Hidden states (B, T, D) of tokens (B, T), as `CausalLM.forward` describes."""
        T, past = tokens.shape[1], cache.length if cache is not None else 0
        x = self.embed_tokens(tokens)
        if lengths is not None:
            rows = [torch.arange(length, device=tokens.device) for length in lengths]
            positions = torch.cat(rows)
        if positions is None:
            cos, sin = self._next_angles(past, past + T, x, cache)
        else:
            cos, sin = self.angles(positions, x.dtype)
        if lengths is None:
            masks = self._masks(T, past + T, mask, tokens.device)
            attend = {name: partial(attend_causally, mask=one) for name, one in masks.items()}
        else:
            attend = self._attend_in_rows(lengths, x)
        for index, layer in enumerate(self.layers):
            arguments = (x, cos, sin, attend[self.config.layer_types[index]], cache, index)
            if self.gradient_checkpointing and self.training:
                with uncached_casts(x.device.type):
                    x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def _attend_in_rows(self, lengths, x):
        """What the attention of each layer type is in a pack of rows."""
        if has_kernel_for_rows(x):
            bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=x.device)
            every = partial(
                attend_in_rows_at_once,
                kernel=kernel_for_rows(),
                bounds=bounds,
                longest=max(lengths),
            )
            window = self.config.sliding_window
            return {
                "full_attention": partial(every, window=-1),
                "sliding_attention": partial(every, window=(window or 0) - 1),
            }
        if self.layers[0]._compiled_call_impl:  # for which a list would be part of the code
            T = sum(lengths)
            row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(x.device)
            mask = _causal(T, T, x.device) & (row == row[:, None])
            return {
                name: partial(attend_causally, mask=torch.where(one, 0.0, -torch.inf))
                for name, one in self._masks(T, T, mask, x.device).items()
            }
        masks = [self._masks(length, length, None, x.device) for length in lengths]
        return {
            name: partial(attend_in_rows, lengths=lengths, masks=[row[name] for row in masks])
            for name in masks[0]
        }

    def _next_angles(self, start, end, x, cache):
        """Angles of positions start..end - 1; a cache keeps a table of them, grown by doubling."""
        scaling = self.config.rope_scaling
        if cache is None or scaling and scaling["rope_type"] == "dynamic":
            return self.angles(torch.arange(start, end, device=x.device), x.dtype)
        if cache.angles is None or cache.angles[0].shape[2] < end:
            table = torch.arange(max(2 * end, 64), device=x.device)
            cache.angles = self.angles(table, x.dtype)
        return tuple(part[:, :, start:end] for part in cache.angles)

    def angles(self, positions, dtype):
        """cos and signed sin (B or 1, 1, T, d) of every position, computed in float32."""
        scaling, length = self.config.rope_scaling, 0
        if scaling and scaling["rope_type"] == "dynamic":
            length = int(positions.max()) + 1
        frequencies, factor = rotary_frequencies(self.config, length, positions.device)
        angles = positions[..., None].float() * frequencies
        angles = angles.view(-1, 1, *angles.shape[-2:])
        cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _masks(self, T, S, mask, device):
        """The mask of each layer type: None (causal), or True where a query may see a key."""
        window = self.config.sliding_window
        if mask is None and 1 < T < S:
            mask = _causal(T, S, device)
        masks = {"full_attention": mask, "sliding_attention": mask}
        if window is not None and S > window:
            near = _causal(T, S, device).triu(S - T - window + 1)
            masks["sliding_attention"] = near if mask is None else mask & near
        return masks


def uncached_casts(device_type):
    """Autocast as it is, but copies of weights go with their layer; to go back they are new."""
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def _causal(T, S, device):
    """(T, S), True where key j is not after query i; the queries are the last T of S."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class CausalLM(nn.Module):
    """The decoder and its output matrix. `forward` gives hidden states, `logits` the rest."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, positions=None, mask=None, cache=None, lengths=None):
        """Hidden states (B, T, D) of tokens (B, T).

        positions: (T,) or (B, T), for the rotary embedding; by default they go on from the cache.
        mask: True where a query may see a key, broadcastable to (B, 1, T, S); by default causal.
            With rows padded on the right no mask is needed: a real token never sees what follows.
        cache: a KeyValueCache, read and extended.
        lengths: of rows that stand one after another in the single row of a packed batch; they
            do not see each other, and positions start anew in each. Without mask and cache.
        """
        return self.model(tokens, positions, mask, cache, lengths)

    def logits(self, hidden):
        """Scores of the vocabulary (..., V) at hidden states (..., D)."""
        if self.config.tie_word_embeddings:
            return linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)

    def initial_values(self, generator=None):
        """Yield (parameter, fresh value): normal(0, initializer_range), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape)
            if name.endswith("norm.weight"):
                value.fill_(1.0)
            elif not name.endswith("bias"):
                value.normal_(0.0, self.config.initializer_range, generator=generator)
            yield parameter, value

    @torch.no_grad()
    def initialize(self, generator=None):
        """Set every parameter to its fresh value, drawn on the CPU."""
        for parameter, value in self.initial_values(generator):
            parameter.copy_(value)
