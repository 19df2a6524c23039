"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

config = load_adapter(model, "runs/cherry")                    # wraps the model in place
save_adapter(model, "copy", config, base_model="examples/base")
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisft.checkpoints.folders import REWARD_MODEL_HINT, gather_tensors, remove_other_weights
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, is_number, read_json, write_json
from minisft.common.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    StoredTensor,
    read_header,
    shorten_list,
    write_safetensors,
)
from minisft.model.lora import LINEAR_TYPES, LoraConfig, LoRALinear, wrap_linear
from minisft.model.modules_to_save import SAVEABLE_MODULES, train_fully
from minisft.model.reward import Model

PEFT_PREFIX = "base_model.model."
# Options of PEFT that change the computation of an adapter, and that we do not support.
UNSUPPORTED = (
    "use_dora alpha_pattern fan_in_fan_out lora_bias use_qalora alora_invocation_tokens use_bdlora "
    "trainable_token_indices layer_replication arrow_config"
).split()
# Initialisations that leave the base model as it is. Others change it, and we do not know how.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: Model,
    output_dir: str | Path,
    config: LoraConfig,
    base_model: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter of a model. All ranks call it, and rank 0 writes."""
    trained = [f"{SAVEABLE_MODULES[name]}.weight" for name in config.modules_to_save]
    tensors = {
        PEFT_PREFIX + name: tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name in trained
    }
    tensors = gather_tensors(tensors, dtype)
    if processes.rank() != 0:
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, output_dir / ADAPTER_WEIGHTS)
    remove_other_weights(output_dir, [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
    ranks = {
        name: module.lora_A.out_features
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base_model),
        "task_type": "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(model, ranks),
        "use_rslora": config.use_rslora,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(content, output_dir / ADAPTER_CONFIG)


def _target_modules(model: nn.Module, adapted: Mapping[str, int]) -> list[str]:
    """The adapted modules for PEFT: `q_proj` if all modules of this name are, else full names."""
    short_names = {name.rpartition(".")[2] for name in adapted}
    not_adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and name.rpartition(".")[2] in short_names
    ]
    return sorted(adapted if not_adapted else short_names)


def load_adapter(model: Model, adapter_dir: str | Path, dropout: float = 0.0) -> LoraConfig:
    """Wrap a model with the adapter in a PEFT folder, in place and frozen.

    The tensors themselves say which modules are adapted, and with what rank. dropout: for training
    the adapter further.
    """
    adapter_dir = Path(adapter_dir)
    config = replace(_read_config(adapter_dir / ADAPTER_CONFIG), dropout=dropout)
    stored = adapter_tensors(adapter_dir)
    model.requires_grad_(False)
    if "score" in config.modules_to_save and not hasattr(model, "score"):
        raise UserError(f"{adapter_dir}: {REWARD_MODEL_HINT}")
    train_fully(model, config.modules_to_save)

    path, modules = adapter_dir / ADAPTER_WEIGHTS, dict(model.named_modules())
    for name, tensor in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module_name = name.removesuffix(".lora_A.weight")
        module = modules.get(module_name)
        if not isinstance(module, LINEAR_TYPES):
            raise UserError(f"{path}: the model has no linear module {module_name}")
        rank = tensor.shape[0] if tensor.shape else 0
        tensor.check((max(rank, 1), module.in_features), "this base model needs")
        wrap_linear(model, module_name, replace(config, rank=rank))

    parameters = dict(model.named_parameters())
    for name, tensor in stored.items():
        if name not in parameters:
            raise UserError(f"{path}: the model has no parameter {name}")
        tensor.check(parameters[name].shape, "this base model needs")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.requires_grad and name not in stored
    ]
    if missing:
        raise UserError(f"{path}: tensors are missing: {shorten_list(missing)}")
    device = model.model.embed_tokens.weight.device
    for name, tensor in stored.items():
        parameters[name].data = tensor.read().float().to(device)
    return config


def adapter_tensors(adapter_dir: str | Path) -> dict[str, StoredTensor]:
    """{name in the model: StoredTensor} of the adapter in a PEFT folder."""
    path = Path(adapter_dir) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{adapter_dir}: there is no {ADAPTER_WEIGHTS}")
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in read_header(path).items():
        name = key.removeprefix(PEFT_PREFIX)
        if name == key:
            raise UserError(f"{path}: tensor {key} does not begin with {PEFT_PREFIX}")
        name = name.replace(".modules_to_save.", ".").replace(".default.", ".")
        if name in tensors:
            raise UserError(f"{path}: {tensors[name].name} and {key} are the same tensor")
        tensors[name] = tensor
    return tensors


def _read_config(path: Path) -> LoraConfig:
    content = read_json(path)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a LoRA adapter (peft_type is not LORA)")
    for name in UNSUPPORTED:
        if content.get(name):
            raise UserError(f"{path}: {name} is not supported")
    initialisation = content.get("init_lora_weights")
    if initialisation not in PLAIN_INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights '{initialisation}' has changed the base model. Save the "
            "adapter as plain LoRA (see PEFT's documentation)."
        )
    if content.get("bias", "none") != "none":
        raise UserError(f"{path}: bias '{content['bias']}' is not supported (only none)")
    # For a classification model, PEFT lists both "classifier" and "score", whichever exists.
    saved = tuple(
        name.removeprefix("model.")
        for name in _names(path, content, "modules_to_save")
        if name != "classifier"
    )
    if not set(saved) <= set(SAVEABLE_MODULES):
        raise UserError(
            f"{path}: modules_to_save {list(saved)}; only {', '.join(SAVEABLE_MODULES)} are "
            "supported"
        )
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not is_integer(rank, 1, 2**20) or not is_number(alpha, above=-1e12):
        raise UserError(f"{path}: needs the numbers r and lora_alpha, not {rank!r} and {alpha!r}")
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        target_modules=_names(path, content, "target_modules"),
        use_rslora=bool(content.get("use_rslora")),
        modules_to_save=saved,
    )


def _names(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    """The names under a key of adapter_config.json: a list, or a single name."""
    value = content.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} must be a list of names, not {value!r}")
    return tuple(value)
