"""Rotary position embedding (arXiv 2104.09864): rotate queries and keys by their positions.

Dimensions i and i + d/2 of a head of width d form a pair. At position p the pair turns by the
angle p * frequency_i, where frequency_i = theta^(-2i/d):

    (left, right) -> (left cos - right sin, right cos + left sin)

The product of a query and a key then depends only on the distance of their positions.

The tour explains it: docs/tour/05_model.md.
"""

import torch
from torch import Tensor

from minisft.model.config import ModelConfig
from minisft.model.rotary_scaling import scale_frequencies, theta_for_length


def rotary_frequencies(
    config: ModelConfig, length: int, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """The frequencies (d/2,) in float32, and a factor for cos and sin.

    length: the number of positions in use. Only dynamic scaling depends on it.
    """
    d, theta = config.head_dim, theta_for_length(config, length)
    exponents = torch.arange(0, d, 2, dtype=torch.int64, device=device).float() / d
    return scale_frequencies(1.0 / theta**exponents, config)


def rotary_angles(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, 1, T, d) of positions (T,) or (B, T), computed in float32.

    The first half of sin has its sign changed, as `rotate` needs it.
    """
    length = int(positions.max()) + 1 if config.has_dynamic_rope else 0
    frequencies, factor = rotary_frequencies(config, length, positions.device)
    angles = positions[..., None].float() * frequencies  # (..., T, d/2)
    angles = angles.view(-1, 1, *angles.shape[-2:])
    cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x (B, heads, T, d); cos and sin come from rotary_angles."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
