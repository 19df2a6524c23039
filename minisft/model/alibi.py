"""ALiBi (arXiv 2108.12409): a key counts less, the further it is from the query.

    softmax over j of (q_i k_j / sqrt(d) - slope_h (i - j))

Every head h has its own slope: 1/2, 1/4, ..., 1/256 for eight heads. The term slope_h i is the same
for all keys of a query, so leaving it out does not change softmax. The rest, slope_h j, is a
product of a number of the head and a number of the key. We append these numbers to q and k:

    [q_i, slope_h] [k_j, j] = q_i k_j + slope_h j

So every attention kernel computes ALiBi, no mask exists, and keys take their positions with them
into the cache.

Positions and slopes must survive bfloat16, which holds integers up to 256. Therefore a position is
written as a multiple of 256 plus a rest, and a slope as a sum of three numbers: 2 * 3 dimensions.
"""

import math

import torch
from torch import Tensor

from minisft.model.config import ModelConfig

# The dimensions added to a head. Attention kernels on GPUs need a multiple of 8, so two are zero.
ALIBI_WIDTH = 8


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of the heads (H,), in float64.

    A power of two n has the slopes r, r^2, ..., r^n with r = 2^(-8/n). Other numbers of heads take
    those of the next smaller power, then the odd powers of sqrt(r), which lie between them.
    """
    n = 2 ** int(math.log2(num_heads))
    exponents = [8 / n * (h + 1) for h in range(n)]
    exponents += [8 / n * (h + 0.5) for h in range(num_heads - n)]
    return 2.0 ** -torch.tensor(exponents, dtype=torch.float64)


def alibi_factors(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The numbers to append to queries (1, H, T, 8) and to keys (B or 1, 1, T, 8).

    positions: (T,) or (B, T), up to 65,791: the next is 257 * 256, and 257 has nine bits.
    """
    # Attention divides by the root of the width, that of these dimensions included.
    rest = alibi_slopes(config.num_attention_heads) * math.sqrt(config.head_dim + ALIBI_WIDTH)
    terms = []
    for _ in range(3):
        terms.append(rest.bfloat16().double())
        rest = rest - terms[-1]
    zero = torch.zeros_like(rest)
    queries = torch.stack([term for term in terms for _ in range(2)] + [zero, zero], dim=-1)
    low = positions % 256
    keys = torch.stack([positions - low, low] * 3 + [torch.zeros_like(low)] * 2, dim=-1)
    queries = queries[None, :, None].expand(-1, -1, positions.shape[-1], -1)
    return queries.to(positions.device, dtype), keys.view(-1, 1, *keys.shape[-2:]).to(dtype)
