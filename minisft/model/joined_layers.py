"""One product where the decoder has two or three of the same input: q, k, v, and gate, up.

    join_layers(model)      # in place, for use and not for training; before pack_weights

A product of one row takes hardly longer than its call, so three calls take nearly three times as
long as one. The joined matrix has the rows of all, so every number stays the same. Layers stay
apart if their weights have different forms, or if one of them has LoRA.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.attention import Attend, Attention
from minisft.model.cache import Cache
from minisft.model.decoder import MLP
from minisft.model.packed_weights import Int4Linear, Int4PairLinear
from minisft.model.quantized import QuantizedLinear, plain_linear
from minisft.model.rotary import rotate

INT4_ROWS = 64  # the kernel for 4 bits orders so many rows of a matrix at a time


def join_layers(model: nn.Module) -> None:
    """Join the products in every Attention and MLP where that is possible. In place."""
    # Names, because a list of modules would keep the replaced ones in memory until the end.
    kinds = Attention, MLP
    for name in [name for name, module in model.named_modules() if type(module) in kinds]:
        module = model.get_submodule(name)
        if type(module) is Attention and module.q_norm is None:
            if (joined := join((module.q_proj, module.k_proj, module.v_proj))) is not None:
                model.set_submodule(name, JoinedAttention(module, joined))
        elif type(module) is MLP:
            if (joined := join((module.gate_proj, module.up_proj))) is not None:
                model.set_submodule(name, JoinedMLP(module, joined))


def has_joined_layers(model: nn.Module) -> bool:
    """True if join_layers has changed the model; it then takes no adapter."""
    return any(isinstance(module, JoinedAttention | JoinedMLP) for module in model.modules())


class JoinedAttention(nn.Module):
    """Attention without norms of q and k, with one product for q, k and v."""

    def __init__(self, attention: Attention, qkv_proj: nn.Module):
        super().__init__()
        self.num_heads = attention.num_heads
        self.num_key_value_heads = attention.num_key_value_heads
        self.head_dim, self.is_rotary = attention.head_dim, attention.is_rotary
        self.qkv_proj, self.o_proj = qkv_proj, attention.o_proj

    def forward(
        self,
        x: Tensor,
        factors: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """(B, T, D) from x (B, T, D); for the other arguments see Attention."""
        B, T, _ = x.shape
        H, K = self.num_heads, self.num_key_value_heads
        heads = self.qkv_proj(x).view(B, T, H + 2 * K, self.head_dim).transpose(1, 2)
        queries_and_keys, v = heads.split((H + K, K), dim=1)
        if self.is_rotary:
            queries_and_keys = rotate(queries_and_keys, *factors)
        q, k = queries_and_keys.split((H, K), dim=1)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class JoinedMLP(nn.Module):
    """SwiGLU with one product for gate and up."""

    def __init__(self, mlp: MLP, gate_up_proj: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) from x (B, T, D)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> nn.Module | None:
    """A frozen layer whose output is that of `layers`, side by side; None if they do not fit."""
    # Merging leaves an nn.Linear where there was a Linear: all with plain weights are one kind.
    kinds = {nn.Linear if isinstance(layer, nn.Linear) else type(layer) for layer in layers}
    function = JOINING.get(kinds.pop()) if len(kinds) == 1 else None
    return function(layers) if function else None


def join_plain(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Layers with plain weights."""
    return plain_linear(torch.cat([layer.weight for layer in layers]), joined_bias(layers))


def join_quantized(layers: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """Layers of 8 bits. NF4 is dequantised for every product, so there is nothing to gain."""
    if layers[0].bits != 8:
        return None
    joined = QuantizedLinear(layers[0].in_features, 0, 8, joined_bias(layers))
    joined.out_features = sum(layer.out_features for layer in layers)
    joined.steps = torch.cat([layer.steps for layer in layers])
    joined.largest = torch.cat([layer.largest for layer in layers])
    return joined


def join_int4(layers: Sequence[Int4Linear]) -> Int4Linear | None:
    """Layers in blocks of 4 bits."""
    if any(layer.out_features % INT4_ROWS for layer in layers):
        return None
    packed = torch.cat([layer.packed for layer in layers])
    factors = torch.cat([layer.factors for layer in layers], dim=1)
    return Int4Linear(packed, factors, joined_bias(layers))


def join_int4_pairs(layers: Sequence[Int4PairLinear]) -> Int4PairLinear | None:
    """Layers in blocks of 8 bits."""
    high, low = (
        join_int4([layer.high for layer in layers]),
        join_int4([layer.low for layer in layers]),
    )
    if high is None or low is None:
        return None
    return Int4PairLinear(high, low, joined_bias(layers))


JOINING: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
    nn.Linear: join_plain,
    QuantizedLinear: join_quantized,
    Int4Linear: join_int4,
    Int4PairLinear: join_int4_pairs,
}


def joined_bias(layers: Sequence[nn.Linear | QuantizedLinear]) -> nn.Parameter | None:
    """The biases of the layers, one after the other; None if they have none."""
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
