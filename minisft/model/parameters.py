"""Operations on all parameters of a model, with quantised layers or without."""

import torch
from torch import nn

from minisft.model.quantized import QuantizedLinear


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of a model, quantised ones included."""
    quantized = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    return quantized + sum(parameter.numel() for parameter in model.parameters())


def convert_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all parameters to `dtype`, but not the buffers of quantised layers. In place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
