"""Low-rank adaptation (arXiv 2106.09685): train B A beside a frozen weight W.

add_lora(model, LoraConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj")))
train(model)
merge_lora(model)                      # W <- W + scaling * B A, plain Linear layers again
"""

import copy
import math
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from minisft.common.errors import UserError
from minisft.model.quantized import QuantizedLinear, plain_linear

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEAR_TYPES = (nn.Linear, QuantizedLinear)
SAVEABLE_MODULES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "score": "score"}


@dataclass
class LoraConfig:
    """How an adapter is built. `alpha` over `rank` (its root for rsLoRA) scales the update."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple = LINEAR_NAMES
    use_rslora: bool = False
    modules_to_save: tuple = ()

    @classmethod
    def from_options(cls, options):
        """The adapter that the flags of train.py describe."""
        targets = listed(options.lora_target)
        return cls(
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            target_modules=LINEAR_NAMES if targets == ("all",) else targets,
            use_rslora=options.use_rslora,
            modules_to_save=listed(options.modules_to_save),
        )

    @property
    def scaling(self):
        """The factor on B A (rsLoRA: arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def listed(text):
    """Names separated by commas, as a tuple."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


class LoRALinear(nn.Module):
    """y = base_layer(x) + scaling * B A dropout(x); B starts at zero, so y starts at the base's."""

    def __init__(self, base_layer, config, device=None):
        super().__init__()
        device = device or next(chain(base_layer.parameters(), base_layer.buffers())).device
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, base_layer.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling = config.scaling
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        """y (..., out_features) of x (..., in_features)."""
        # The factors are kept in float32; multiply in the type of the activations.
        low = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))
        return self.base_layer(x) + self.scaling * F.linear(low, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merged(self, dtype=None):
        """The base layer with the update added to its weight, in float32, cast once.

        A quantised base becomes a plain Linear: the sum is no longer on the quantised levels.
        """
        update = self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        weight = self.base_layer.weight
        merged = (weight.float() + update).to(dtype or weight.dtype)
        return plain_linear(merged, self.base_layer.bias)


def freeze(model):
    """No parameter is trained."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def convert_parameters(model, dtype):
    """Hold every parameter as `dtype`, but not the scales of quantised layers. In place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def trainable_in_float32(model):
    """Hold every trainable parameter in float32: small updates vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_lora(model, config):
    """Freeze the model, wrap its target modules, make `modules_to_save` trainable. In place.

    Raises UserError for module names that the model does not have.
    """
    freeze(model)
    targets = {
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and name.split(".")[-1] in config.target_modules
    }
    missing = set(config.target_modules) - {name.split(".")[-1] for name in targets}
    if missing:
        raise UserError(
            f"--lora_target: no linear module is called {', '.join(sorted(missing))}; "
            f"choose from all, {', '.join(LINEAR_NAMES)}"
        )
    for name in targets & set(config.modules_to_save):
        raise UserError(f"{name} is in --lora_target and in --modules_to_save: give one of the two")
    for name in sorted(targets):
        wrap_linear(model, name, config)
    train_fully(model, config.modules_to_save)
    trainable_in_float32(model)


def resume_lora(model, config):
    """Make a loaded adapter trainable again, with its own dropout. In place."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    train_fully(model, config.modules_to_save)
    trainable_in_float32(model)


def wrap_linear(model, name, config):
    """Replace the linear module called `name` by a LoRALinear around it."""
    parent, _, child = name.rpartition(".")
    base_layer = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, LoRALinear(base_layer, config))


def train_fully(model, names):
    """Make whole modules trainable: embed_tokens, lm_head. Tied ones part: each gets its own.

    A reward model has `score` instead of lm_head.
    """
    there = [
        name
        for name, place in SAVEABLE_MODULES.items()
        if name == "lm_head"
        and model.config.tie_word_embeddings
        or hasattr(model, place.split(".")[0])
    ]
    for name in names:
        if name not in there:
            raise UserError(f"--modules_to_save {name}: choose from {', '.join(there)}")
    if names and model.config.tie_word_embeddings:
        untie(model)
    for name in names:
        model.get_submodule(SAVEABLE_MODULES[name]).weight.requires_grad_(True)


def untie(model):
    """Give the model an output matrix of its own, a copy of the embedding."""
    embedding = model.model.embed_tokens.weight
    model.lm_head = nn.Linear(*reversed(embedding.shape), bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def frozen_copy(model):
    """The model as it is now, to stay so. What is not trained is shared with it, not copied.

    An adapter that changes nothing yet is left away.
    """
    shared = {
        id(tensor): tensor
        for tensor in chain(model.parameters(), model.buffers())
        if not tensor.requires_grad
    }
    copied = copy.deepcopy(model, shared).requires_grad_(False).eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, LoRALinear) and not module.lora_B.weight.any():
            copied.set_submodule(name, module.base_layer)
    return copied


def merge_lora(model, dtype=None):
    """Fold every LoRALinear into its base layer, of type `dtype` if given. In place.

    Quantised layers become plain ones, also those without an adapter.
    """
    for kind in (LoRALinear, QuantizedLinear):  # of the second those that are not in the first
        for name, module in list(model.named_modules()):
            if isinstance(module, kind):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.merged(dtype))
