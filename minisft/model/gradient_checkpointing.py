"""Gradient checkpointing: recompute activations in the backward pass instead of keeping them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(layer: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
    """layer(x, *arguments), which keeps x only."""
    device_type = x.device.type
    # The same autocast without its cache, which would keep a cast copy of all weights.
    uncached = torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
    with uncached:
        return checkpoint(layer, x, *arguments, use_reentrant=False)
