"""Operations on models that have an adapter: find its modules, train it further, copy it frozen."""

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

from minisft.model.lora import LoraConfig, LoRALinear, trainable_in_float32
from minisft.model.modules_to_save import train_fully
from minisft.model.reward import Model

M = TypeVar("M", bound=nn.Module)


def adapted_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """{name: module} of the linear modules that have an adapter."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def plain_name(parameter_name: str) -> str:
    """The name that a parameter has without the LoRALinear around its module."""
    return parameter_name.replace(".base_layer.", ".")


def resume_lora(model: Model, config: LoraConfig) -> None:
    """Make a loaded adapter trainable. In place."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    train_fully(model, config.modules_to_save)
    trainable_in_float32(model)


def frozen_copy(model: M) -> M:
    """A copy that keeps the current weights while the model is trained, in evaluation mode.

    The copy shares the frozen tensors of the model. Adapters that change nothing yet are left out.
    """
    frozen = [
        tensor for tensor in chain(model.parameters(), model.buffers()) if not tensor.requires_grad
    ]
    # deepcopy takes an object from this table instead of copying it.
    shared = {id(tensor): tensor for tensor in frozen}
    copied = copy.deepcopy(model, shared).requires_grad_(False).eval()
    for name, module in adapted_modules(copied).items():
        if not module.lora_B.weight.any():
            copied.set_submodule(name, module.base_layer)
    return copied
