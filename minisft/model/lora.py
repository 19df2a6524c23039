"""Low-rank adaptation (arXiv 2106.09685): train a low-rank update B A next to a frozen weight W.

y = W x + scaling * B A x               A (rank, in), B (out, rank)

add_lora(model, LoraConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj")))
...                                     # train: only A and B have gradients
merge_lora(model)                       # W <- W + scaling * B A

The tour explains it: docs/tour/07_lora.md.
"""

import math
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.modules_to_save import train_fully
from minisft.model.quantized import QuantizedLinear, plain_linear
from minisft.model.reward import Model

ALL = ("all",)  # every linear layer of the decoder
LINEAR_TYPES = (nn.Linear, QuantizedLinear)


@dataclass
class LoraConfig:
    """The settings of an adapter.

    target_modules: names of the linear layers to adapt, or ALL. modules_to_save: modules that are
    trained in full, next to the adapter. stored_modules: frozen modules that the adapter's file
    holds.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    stored_modules: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """y = base_layer(x) + scaling * B A dropout(x). B starts at zero, so y starts unchanged."""

    def __init__(
        self,
        base_layer: nn.Linear | QuantizedLinear,
        config: LoraConfig,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if device is None:
            device = next(chain(base_layer.parameters(), base_layer.buffers())).device
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, base_layer.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling = config.scaling
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) from x (..., in_features)."""
        # A and B are kept in float32, and multiplied in the type of x.
        low_rank = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))  # (..., rank)
        y = self.base_layer(x)
        return y + self.scaling * F.linear(low_rank, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer with the weight W + scaling * B A, summed in float32 and cast once.

        dtype: the type of the new weight, by default that of W.
        """
        weight = self.base_layer.weight
        update = self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        total = (weight.float() + update).to(dtype or weight.dtype)
        return plain_linear(total, self.base_layer.bias)


def add_lora(model: Model, config: LoraConfig) -> None:
    """Freeze the model, adapt its target modules, and train `modules_to_save`. In place."""
    model.requires_grad_(False)
    for name in target_names(model, config):
        wrap_linear(model, name, config)
    train_fully(model, config.modules_to_save)
    trainable_in_float32(model)


def target_names(model: Model, config: LoraConfig) -> list[str]:
    """The full names of the linear layers to adapt, sorted."""
    wanted = linear_names(model) if config.target_modules == ALL else config.target_modules
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and name.split(".")[-1] in wanted
    )


def linear_names(model: Model) -> tuple[str, ...]:
    """The names of the linear layers in a decoder layer: q_proj, k_proj, ..., or W_pack."""
    return tuple(
        name.split(".")[-1]
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, LINEAR_TYPES)
    )


def wrap_linear(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Replace the linear layer with this name by a LoRALinear around it."""
    base_layer = model.get_submodule(name)
    assert isinstance(base_layer, LINEAR_TYPES)
    model.set_submodule(name, LoRALinear(base_layer, config))


def trainable_in_float32(model: nn.Module) -> None:
    """Convert all trainable parameters to float32, in which small updates do not vanish."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every LoRALinear and every QuantizedLinear by a plain layer. In place.

    dtype: the type of the new weights, by default that of the base, or float32 if the base is
    quantised.
    """
    for kind in (LoRALinear, QuantizedLinear):  # the first pass removes adapted quantised layers
        # Names, because a list of modules would keep the replaced ones in memory until the end.
        for name in [name for name, module in model.named_modules() if isinstance(module, kind)]:
            module = model.get_submodule(name)
            assert isinstance(module, kind)
            model.set_submodule(name, module.merged(dtype))
