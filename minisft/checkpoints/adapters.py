"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

config = load_adapter(model, "runs/cherry")                    # wraps the model in place
save_adapter(model, "copy", config, base_model="examples/base")
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minisft.checkpoints.adapter_forms import LORA_HEAD, PEFT_PREFIX, Adapter, read_adapter
from minisft.checkpoints.folders import REWARD_MODEL_HINT, gather_tensors, remove_other_weights
from minisft.checkpoints.hub import base_in_any_folder
from minisft.checkpoints.tied_weights import EMBEDDING, OUTPUT
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.json_files import write_json
from minisft.common.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    write_safetensors,
)
from minisft.common.words import list_names
from minisft.model.decoder import CausalLM
from minisft.model.lora import LINEAR_TYPES, LoraConfig, wrap_linear
from minisft.model.lora_tools import adapted_modules, plain_name
from minisft.model.modules_to_save import saved_modules, train_fully, untie
from minisft.model.quantized import QuantizedLinear
from minisft.model.reward import Model
from minisft.model.vocabulary import resize_vocabulary

OTHER_BASE = "Was the adapter trained on another base model?"


def save_adapter(
    model: Model,
    output_dir: str | Path,
    config: LoraConfig,
    base_model: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter of a model. All ranks call it, and rank 0 writes."""
    complete = {*saved_modules(model, config.modules_to_save), *config.stored_modules}
    tensors = {
        PEFT_PREFIX + name: tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or plain_name(name).removesuffix(".weight") in complete
    }
    tensors = gather_tensors(tensors, dtype)
    if processes.rank() != 0:
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, output_dir / ADAPTER_WEIGHTS)
    remove_other_weights(output_dir, [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
    adapted = adapted_modules(model)
    ranks = {name: module.lora_A.out_features for name, module in adapted.items()}
    alphas = {
        name: module.scaling * (math.sqrt(ranks[name]) if config.use_rslora else ranks[name])
        for name, module in adapted.items()
    }
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_in_any_folder(base_model),
        "task_type": "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(model, ranks),
        "use_rslora": config.use_rslora,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {
            name: alpha
            for name, alpha in alphas.items()
            if not math.isclose(alpha, config.alpha, rel_tol=1e-9)
        },
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


def load_adapter(
    model: Model,
    adapter_dir: str | Path,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> LoraConfig:
    """Wrap a model with the adapter in a PEFT folder, in place and frozen.

    The tensors themselves say which modules are adapted, and with what rank. An adapter that has
    resized the vocabulary resizes the model's. dropout: for training the adapter further. dtype:
    of frozen weights that the adapter replaces or changes; by default that of the base's.
    """
    adapter = read_adapter(adapter_dir, model.config.tie_word_embeddings)
    config = replace(adapter.config, dropout=dropout)
    model.requires_grad_(False)
    if "score" in config.modules_to_save and not hasattr(model, "score"):
        raise UserError(f"{adapter_dir}: {REWARD_MODEL_HINT}")
    needs_head = {OUTPUT, LORA_HEAD} & adapter.tensors.keys() or OUTPUT in adapter.changes
    if needs_head and isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        untie(model)
    train_fully(model, config.modules_to_save)
    trained = set(saved_modules(model, config.modules_to_save))
    config.stored_modules = tuple(
        name for name in adapter.replaced_modules() if name not in trained
    )
    _fit_vocabulary(model, adapter)
    _wrap_modules(model, adapter, dropout)

    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    _check_parameters(parameters, adapter)
    device = model.model.embed_tokens.weight.device
    for name, tensor in adapter.tensors.items():
        parameter = parameters[name]
        is_trained = parameter.requires_grad or ".lora_" in name
        new_dtype = torch.float32 if is_trained else dtype or parameter.dtype
        parameter.data = tensor.read().to(new_dtype).to(device)
    _apply_changes(model, adapter, dtype)
    return config


def _wrap_modules(model: Model, adapter: Adapter, dropout: float) -> None:
    """Wrap the linear modules for which the adapter holds factors. In place."""
    path, modules = adapter.path, dict(model.named_modules())
    for name, tensor in adapter.tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module_name = name.removesuffix(".lora_A.weight")
        module = modules.get(module_name)
        if not isinstance(module, LINEAR_TYPES):
            raise UserError(f"{path}: the model has no linear module {module_name}. {OTHER_BASE}")
        rank = tensor.shape[0] if tensor.shape else 0
        tensor.check((max(rank, 1), module.in_features), "this base model needs")
        module_config = replace(adapter.module_config(module_name, rank), dropout=dropout)
        wrap_linear(model, module_name, module_config)


def _check_parameters(parameters: Mapping[str, nn.Parameter], adapter: Adapter) -> None:
    """UserError if the adapter's tensors are not the trained parameters of the wrapped model."""
    path, stored = adapter.path, adapter.tensors
    for name, tensor in stored.items():
        if name not in parameters:
            raise UserError(f"{path}: the model has no parameter {name}. {OTHER_BASE}")
        tensor.check(parameters[name].shape, "this base model needs")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.requires_grad and name not in stored
    ]
    if missing:
        raise UserError(
            f"{path}: tensors are missing: {list_names(missing)}. Copy the adapter again."
        )


def _fit_vocabulary(model: Model, adapter: Adapter) -> None:
    """Give the model the vocabulary of an adapter that holds the embedding. In place.

    UserError if the adapter has only one of the two, or rows of tokens that the model lacks.
    """
    embedding = adapter.tensors.get(EMBEDDING)
    head = adapter.tensors.get(OUTPUT) or adapter.tensors.get("lm_head.lora_B.weight")
    sizes = {tensor.shape[0] for tensor in (embedding, head) if tensor and tensor.shape}
    if not sizes <= {model.config.vocab_size}:
        is_tied = model.config.tie_word_embeddings or not isinstance(model, CausalLM)
        if len(sizes) > 1 or embedding is None or not (is_tied or OUTPUT in adapter.tensors):
            (num_tokens, *_) = sizes - {model.config.vocab_size}
            raise other_vocabulary(adapter, num_tokens, model)
        resize_vocabulary(model, *sizes)
    if adapter.last_token >= model.config.vocab_size:
        raise other_vocabulary(adapter, adapter.last_token + 1, model)


def other_vocabulary(adapter: Adapter, num_tokens: int, model: Model) -> UserError:
    """The error for an adapter that was trained with another vocabulary than the base has."""
    return UserError(
        f"{adapter.path}: the adapter has {num_tokens} tokens, the base model "
        f"{model.config.vocab_size}, and the adapter does not hold the embedding and the output "
        "matrix. Resize the base as for the training of the adapter (transformers: "
        f"model.resize_token_embeddings({num_tokens}), save_pretrained), and give the resized "
        "folder."
    )


@torch.no_grad()
def _apply_changes(model: Model, adapter: Adapter, dtype: torch.dtype | None) -> None:
    """Replace the weights that an adapter changes. In place; the old tensors stay as they are."""
    # named_modules lists a LoRALinear before its base_layer, so the base_layer keeps the name.
    modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
    for name, change in adapter.changes.items():
        module_name, _, kind = name.rpartition(".")
        module = modules.get(module_name)
        if module is None:
            raise UserError(f"{adapter.path}: the model has no module {module_name}. {OTHER_BASE}")
        if isinstance(module, QuantizedLinear) and kind == "weight":
            raise UserError(
                f"{adapter.path}: use_dora changes {module_name} itself, which is quantised here. "
                "Leave out --quantization_bit."
            )
        old = getattr(module, kind, None)
        if old is None:
            raise UserError(
                f"{adapter.path}: lora_bias on {module_name}, which has no bias in this model. "
                "Neither PEFT nor config.json has a place for the merged bias: train without "
                "lora_bias."
            )
        if not old.is_meta:
            new = change(old.float(), 0).to(dtype or old.dtype)
            setattr(module, kind, nn.Parameter(new, requires_grad=False))
