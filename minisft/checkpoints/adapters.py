"""PEFT adapters in and out."""

from dataclasses import replace
from pathlib import Path

from minisft.checkpoints.folders import A_REWARD_MODEL, remove_other_weights
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, is_number, read_json, write_json
from minisft.common.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_header,
    shorten_list,
    write_safetensors,
)
from minisft.model.lora import LINEAR_TYPES, LoraConfig, LoRALinear, wrap_linear
from minisft.model.modules_to_save import SAVEABLE_MODULES, train_fully

PEFT_PREFIX = "base_model.model."


# How adapters start without changing the base they are added to.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(model, output_dir, config, base_model, dtype=None):
    """Write the adapter of `model` as PEFT does; of several processes all call it, one writes."""
    saved = [SAVEABLE_MODULES[name] for name in config.modules_to_save]
    tensors = {
        PEFT_PREFIX + name: processes.gather_to_rank0(tensor, dtype)
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name.removesuffix(".weight") in saved
    }
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
    write_json(
        {
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
        },
        output_dir / ADAPTER_CONFIG,
    )


def _target_modules(model, adapted):
    """The last parts of the adapted modules' names, or their whole names where those say more."""
    short = {name.rpartition(".")[2] for name in adapted}
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and name.rpartition(".")[2] in short
    ]
    return sorted(short if not plain else adapted)


def load_adapter(model, adapter_dir, dropout=0.0):
    """Wrap `model` with the adapter in a PEFT folder, in place; returns its LoraConfig.

    Which modules are adapted, and with what rank, is read from the tensors themselves. `dropout`
    is for training it further.
    """
    adapter_dir = Path(adapter_dir)
    config = replace(_adapter_config(adapter_dir / ADAPTER_CONFIG), dropout=dropout)
    path, stored = adapter_dir / ADAPTER_WEIGHTS, adapter_tensors(adapter_dir)
    device = model.model.embed_tokens.weight.device
    model.requires_grad_(False)
    if "score" in config.modules_to_save and not hasattr(model, "score"):
        raise UserError(f"{adapter_dir}:{A_REWARD_MODEL[1:]}")
    train_fully(model, config.modules_to_save)
    modules = dict(model.named_modules())
    for name, tensor in stored.items():
        module = name.removesuffix(".lora_A.weight")
        if module == name:
            continue
        if not isinstance(modules.get(module), LINEAR_TYPES):
            raise UserError(f"{path}: the model has no linear module {module}")
        rank = tensor.shape[0] if tensor.shape else 0
        tensor.check((max(rank, 1), modules[module].in_features), "this base model needs")
        wrap_linear(model, module, replace(config, rank=rank))
    parameters = dict(model.named_parameters())
    for name, tensor in stored.items():
        if name not in parameters:
            raise UserError(f"{path}: the model has no place for {name}")
        tensor.check(parameters[name].shape, "this base model needs")
    lost = [name for name, one in parameters.items() if one.requires_grad and name not in stored]
    if lost:
        raise UserError(f"{path}: tensors are missing: {shorten_list(lost)}")
    for name, tensor in stored.items():
        parameters[name].data = tensor.read().float().to(device)
    return config


def adapter_tensors(adapter_dir):
    """{name in the model: StoredTensor} of the adapter in a PEFT folder."""
    path, places = Path(adapter_dir) / ADAPTER_WEIGHTS, {}
    if not path.is_file():
        raise UserError(f"{adapter_dir}: there is no {ADAPTER_WEIGHTS}")
    for key, tensor in read_header(path).items():
        name = key.removeprefix(PEFT_PREFIX)
        if name == key:
            raise UserError(f"{path}: tensor {key} does not begin with {PEFT_PREFIX}")
        name = name.replace(".modules_to_save.", ".").replace(".default.", ".")
        if name in places:
            raise UserError(f"{path}: {places[name].name} and {key} are the same")
        places[name] = tensor
    return places


def _adapter_config(path):
    content = read_json(path)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a LoRA adapter (peft_type is not LORA)")
    for name in (
        "use_dora",
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_bias",
        "use_qalora",
        "alora_invocation_tokens",
        "use_bdlora",
        "trainable_token_indices",
        "layer_replication",
        "arrow_config",
    ):
        if content.get(name):
            raise UserError(f"{path}: {name} is not supported")
    if content.get("init_lora_weights") not in PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights '{content['init_lora_weights']}' has changed "
            "the base; save the adapter as plain LoRA (see PEFT's documentation)"
        )
    if content.get("bias", "none") != "none":
        raise UserError(f"{path}: bias '{content['bias']}' is not supported (only none)")
    targets, saved = (_names(path, content, key) for key in ("target_modules", "modules_to_save"))
    # PEFT lists "classifier" beside "score" for every model that classifies, whichever it has.
    saved = tuple(name.removeprefix("model.") for name in saved if name != "classifier")
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
        target_modules=targets,
        use_rslora=bool(content.get("use_rslora")),
        modules_to_save=saved,
    )


def _names(path, content, key):
    """The names in a list, or the one name, that adapter_config.json has under a key."""
    value = content.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} must be a list of names, not {value!r}")
    return tuple(value)
