"""The two layers that all others are made of: RMSNorm and Linear.

The letters of the shapes are explained in decoder.py.

The tour explains it: docs/tour/05_model.md.
"""

import torch
from torch import Tensor, nn

from minisft.model.fast_paths import linear, rms_norm


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
