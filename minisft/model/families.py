"""Choose the parts of a model in which families differ by more than numbers.

The fields of the config that decide follow from the family, see config_values.py.
"""

import torch
from torch import Tensor

from minisft.model.alibi import alibi_factors
from minisft.model.attention import Attention
from minisft.model.baichuan import AlibiAttention, FusedAttention, NormHead
from minisft.model.basic_layers import Linear
from minisft.model.config import ModelConfig
from minisft.model.rotary import rotary_angles


def build_attention(config: ModelConfig, layer: int) -> Attention:
    """The attention of a decoder layer; layer: its number."""
    if config.alibi:
        return AlibiAttention(config, layer)
    return (FusedAttention if config.fused_qkv else Attention)(config, layer)


def build_head(config: ModelConfig) -> Linear | NormHead:
    """The output matrix."""
    if config.norm_head:
        return NormHead(config.hidden_size, config.vocab_size)
    return Linear(config.hidden_size, config.vocab_size, bias=False)


def position_factors(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the attention of every layer needs of positions (T,) or (B, T).

    Rotary cos and sin; with ALiBi, the numbers to append to queries and to keys. Dimension 2 is
    that of the positions.
    """
    compute = alibi_factors if config.alibi else rotary_angles
    return compute(config, positions, dtype)
