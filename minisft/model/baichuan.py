"""The parts of Baichuan2 that differ from other families (arXiv 2309.10305).

    self_attn    one matrix W_pack for queries, keys and values; in the 13B model, ALiBi
    lm_head      every row is scaled to length 1

families.py chooses these parts. The letters of the shapes are explained in decoder.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.alibi import ALIBI_WIDTH
from minisft.model.attention import Attend, Attention
from minisft.model.basic_layers import Linear
from minisft.model.cache import Cache
from minisft.model.config import ModelConfig
from minisft.model.decoding_layers import linear


class FusedAttention(Attention):
    """Attention whose queries, keys and values come from one matrix (3D, D)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        del self.q_proj, self.k_proj, self.v_proj
        D = config.hidden_size
        self.W_pack = Linear(D, 3 * D, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, d) from x (B, T, D)."""
        B, T, _ = x.shape
        fused = self.W_pack(x).view(B, T, 3, self.num_heads, self.head_dim)
        q, k, v = fused.transpose(1, 3).unbind(2)  # of (B, H, 3, T, d)
        # Autograd keeps v. A view would keep all three.
        return q, k, v.contiguous()


class AlibiAttention(FusedAttention):
    """FusedAttention with ALiBi in place of rotary positions. Heads are wider by ALIBI_WIDTH."""

    def forward(
        self,
        x: Tensor,
        factors: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """As Attention. factors: the numbers to append to queries and keys."""
        of_queries, of_keys = factors
        q, k, v = self.project(x)
        # `attend` divides by the root of the width, which has grown.
        q = q * math.sqrt(1 + ALIBI_WIDTH / self.head_dim)
        q, k, v = append(q, of_queries), append(k, of_keys), F.pad(v, (0, ALIBI_WIDTH))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v)[..., : self.head_dim]
        return self.o_proj(y.transpose(1, 2).flatten(2))


def append(x: Tensor, factors: Tensor) -> Tensor:
    """(B, H, T, d + 8) from x (B, H, T, d) and factors (B or 1, H or 1, T, 8)."""
    return torch.cat((x, factors.to(x.dtype).expand(*x.shape[:3], -1)), dim=-1)


class NormHead(nn.Module):
    """An output matrix whose rows are scaled to length 1: w x / |w| for every row w."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (..., V) in float32 (or float64) from hidden states (..., D)."""
        # Scaling the scores is the same as scaling the rows, and does not copy the matrix.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(self.weight, dim=1, dtype=dtype)
        return linear(x, self.weight) * lengths.clamp(min=1e-12).reciprocal()
