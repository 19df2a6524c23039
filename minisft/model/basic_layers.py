"""The layers that all others are made of: Embedding, RMSNorm and Linear.

The letters of the shapes are explained in decoder.py. decoding_layers.py has the same layers for
decoding on a CPU.

The tour explains it: docs/tour/05_model.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """A row of W (V, D) for each token. W can be the output matrix, too."""

    def logits(self, x: Tensor) -> Tensor:
        """x W^T: scores (..., V) from hidden states x (..., D)."""
        return F.linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Draw uniform values."""
        # Normal ones import torch's compiler on the meta device, which takes two seconds.
        nn.init.uniform_(self.weight, -1, 1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension of x (..., width), in the type of x."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """x W^T + b."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) from (..., in_features)."""
        return F.linear(input, self.weight, self.bias)
