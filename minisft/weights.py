"""Safetensors in and out: checkpoints (single file or sharded) and PEFT adapters.

    model = load_model(resolve("examples/base"), dtype=torch.float32)
    adapter = load_adapter(model, "runs/cherry")
    save_model(model, "copy")
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minisft import gguf_import, parallel
from minisft.config import ModelConfig
from minisft.gguf_file import is_gguf
from minisft.json_files import is_number, is_whole, read_json, token_ids, write_json
from minisft.lora import LINEAR, SAVEABLE, LoraConfig, LoRALinear, freeze, train_fully, wrap
from minisft.model import CausalLM
from minisft.options import UserError
from minisft.quantize import QuantizedLinear
from minisft.tensor_files import (
    INDEX,
    WEIGHTS,
    listed,
    read_header,
    tensor_files,
    write_safetensors,
)

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
HUB_PATTERNS = ["*.json", "*.txt", "*.jinja", "tokenizer.model", "model*.safetensors",
                ADAPTER_WEIGHTS]
# What these formats call their files; a folder holds one of them, never two.
WEIGHT_FILES = (WEIGHTS, INDEX, "model-*-of-*.safetensors", ADAPTER_WEIGHTS, ADAPTER_CONFIG)
A_REWARD_MODEL = "; it is a reward model, for score.py --mode reward: it writes no text"
# How adapters start without changing the base they are added to.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def resolve(name_or_path, needed="config.json"):
    """The local folder of a checkpoint or adapter; a hub id is downloaded or found in the cache.

    A GGUF file is unpacked into one.
    Raises UserError where there is neither such a folder nor a way to the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            files = sorted(path.glob("*.gguf")) if needed == "config.json" else []
            hint = f"; to read a GGUF file, give the file: {files[0]}" if files else ""
            inner = sorted(path.glob(f"snapshots/*/{needed}"))  # in the cache of the hub
            hint = f"; did you mean {inner[-1].parent}?" if inner else hint
            raise UserError(f"{path}: there is no {needed} in this folder{hint}")
        return path
    if needed == "config.json" and path.is_file() and (
            path.suffix.lower() == ".gguf" or is_gguf(path)):
        return gguf_import.unpack(path)
    if path.exists():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        hint = "" if "/" in name_or_path else ", and models on the hub are called OWNER/NAME"
        raise UserError(f"{name_or_path}: no such folder{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name_or_path}: no such folder here, and not to be had from the hub ({reason}); "
            "download it first and give its folder"
        ) from error


def stored_tensors(model_dir):
    """{tensor name: StoredTensor} of a checkpoint folder, whichever kind of file it has."""
    path = Path(model_dir) / gguf_import.GGUF
    return gguf_import.stored_tensors(path) if path.is_file() else tensor_files(model_dir)


def stored_dtype(model_dir):
    """The torch.dtype that a checkpoint's embedding has on disk."""
    name = "model.embed_tokens.weight"
    stored = stored_tensors(model_dir).get(name)
    if stored is None:
        raise UserError(f"{model_dir}: there is no tensor {name}")
    return stored.dtype


def load_model(model_dir, dtype=torch.float32, device="cpu", quantization_bit=None,
               build=CausalLM):
    """The CausalLM of a checkpoint folder, frozen, its weights as `dtype` on `device`.

    Tensors are read and converted one by one, so that memory holds the weights once. Missing,
    unexpected or misshapen tensors raise UserError with their names. quantization_bit: 4 or 8, to
    hold the linear layers of the decoder so; the embedding and the output matrix stay `dtype`.
    build: CausalLM, or RewardModel, whose `score` is left on the meta device if there is none.
    """
    model, stored = open_model(model_dir, build)
    for name in [name for name in dict(model.named_parameters()) if name in stored]:
        tensor = stored[name].read().to(device)
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        if (quantization_bit and child == "weight" and parent.startswith("model.layers.")
                and isinstance(module, nn.Linear)):
            owner, _, attribute = parent.rpartition(".")
            layer = QuantizedLinear.from_weight(tensor, quantization_bit)
            setattr(model.get_submodule(owner), attribute, layer)
        else:
            setattr(module, child, nn.Parameter(tensor.to(dtype), requires_grad=False))
    return model.eval()


def open_model(model_dir, build=CausalLM):
    """(the CausalLM of a checkpoint folder on the meta device, {name: StoredTensor}).

    All that load_model checks is checked, and nothing large is read.
    """
    config = ModelConfig.load(model_dir)
    files = stored_tensors(model_dir)
    last = f"model.layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last) for name in files):
        # Found here, lest a wrong number of layers is built, a million perhaps.
        raise UserError(f"{model_dir}: the weights do not fit config.json; missing: {last}*")
    with torch.device("meta"):
        model = build(config)
    _check_fit(model_dir, files, model)
    return model, files


def _check_fit(model_dir, files, model):
    expected = dict(model.named_parameters())
    if "score.weight" not in files:  # a reward model may get a new one
        expected.pop("score.weight", None)
    ignored = set() if hasattr(model, "lm_head") else {"lm_head.weight"}
    unexpected = [name for name in files
                  if name not in expected and name not in ignored and "rotary_emb" not in name]
    missing = [name for name in expected if name not in files]
    if missing or unexpected:
        raise UserError(f"{model_dir}: the weights do not fit config.json;"
                        + (f" missing: {listed(missing)}" if missing else "")
                        + (f" unexpected: {listed(unexpected)}" if unexpected else "")
                        + (A_REWARD_MODEL if "score.weight" in unexpected else ""))
    for name, parameter in expected.items():
        files[name].check(parameter.shape, "config.json says")


def save_model(model, output_dir, dtype=None, max_shard_size=5 * 10**9):
    """Write config.json and safetensors, in shards of at most `max_shard_size` bytes.

    `dtype` converts on the way out; a shard is put together only when it is written. UserError
    where there is no room for them all. Of several processes all call it, and the first writes.
    """
    output_dir, tensors = Path(output_dir), model.state_dict()
    sizes = {name: one.numel() * (dtype or one.dtype).itemsize for name, one in tensors.items()}
    shards = _shards(sizes, max_shard_size)
    count, is_first = len(shards), parallel.rank() == 0
    names = [WEIGHTS] if count == 1 else [
        f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
    if is_first:
        _make_room(output_dir, sum(sizes.values()))
    for file_name, keys in zip(names, shards, strict=True):
        shard = {key: parallel.to_first(tensors[key], dtype) for key in keys}
        if is_first:
            write_safetensors(shard, output_dir / file_name)
    if not is_first:
        return
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        write_json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
                   output_dir / INDEX)
    _remove_others(output_dir, names if count == 1 else [*names, INDEX])
    config = model.config.to_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(config, output_dir / "config.json")


def _make_room(output_dir, needed):
    output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise UserError(f"{output_dir}: the weights take {needed / 1e9:,.1f} GB, and the disk has "
                        f"{free / 1e9:,.1f} GB free")


def _shards(sizes, max_shard_size):
    """The names in order, in lists whose sizes add up to at most that, if no single one is more."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _remove_others(output_dir, written):
    """Remove weights that an earlier save left: who loads the folder might take those."""
    for pattern in WEIGHT_FILES:
        for path in Path(output_dir).glob(pattern):
            if path.name not in written:
                path.unlink()


def save_generation_config(model_dir, output_dir, config, stop_ids):
    """generation_config.json travels along; where it lacks ids that end an answer, with those."""
    content = read_json(Path(model_dir) / "generation_config.json", missing={})
    listed = generation_eos(model_dir, config)
    if more := sorted(set(stop_ids) - set(listed)):
        content = {"bos_token_id": config.bos_token_id, **content, "eos_token_id": listed + more}
    if content:
        write_json(content, Path(output_dir) / "generation_config.json")


def generation_eos(model_dir, config):
    """The ids of `eos_token_id` in generation_config.json, else in config.json, as a list."""
    path = Path(model_dir) / "generation_config.json"
    stated = read_json(path, missing={}).get("eos_token_id", config.eos_token_id)
    return token_ids(stated, path, "eos_token_id")


def save_adapter(model, output_dir, config, base_model, dtype=None):
    """Write the adapter of `model` as PEFT does; of several processes all call it, one writes."""
    saved = [SAVEABLE[name] for name in config.modules_to_save]
    tensors = {PEFT_PREFIX + name: parallel.to_first(tensor, dtype)
               for name, tensor in model.state_dict().items()
               if ".lora_" in name or name.removesuffix(".weight") in saved}
    if parallel.rank() != 0:
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, output_dir / ADAPTER_WEIGHTS)
    _remove_others(output_dir, [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
    ranks = {name: module.lora_A.out_features for name, module in model.named_modules()
             if isinstance(module, LoRALinear)}
    write_json({
        "peft_type": "LORA", "base_model_name_or_path": str(base_model),
        "task_type": "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": _target_modules(model, ranks), "use_rslora": config.use_rslora,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }, output_dir / ADAPTER_CONFIG)


def _target_modules(model, adapted):
    """The last parts of the adapted modules' names, or their whole names where those say more."""
    short = {name.rpartition(".")[2] for name in adapted}
    plain = [name for name, module in model.named_modules()
             if isinstance(module, LINEAR) and name.rpartition(".")[2] in short]
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
    freeze(model)
    if "score" in config.modules_to_save and not hasattr(model, "score"):
        raise UserError(f"{adapter_dir}:{A_REWARD_MODEL[1:]}")
    train_fully(model, config.modules_to_save)
    modules = dict(model.named_modules())
    for name, tensor in stored.items():
        module = name.removesuffix(".lora_A.weight")
        if module == name:
            continue
        if not isinstance(modules.get(module), LINEAR):
            raise UserError(f"{path}: the model has no linear module {module}")
        rank = tensor.shape[0] if tensor.shape else 0
        tensor.check((max(rank, 1), modules[module].in_features), "this base model needs")
        wrap(model, module, replace(config, rank=rank))
    parameters = dict(model.named_parameters())
    for name, tensor in stored.items():
        if name not in parameters:
            raise UserError(f"{path}: the model has no place for {name}")
        tensor.check(parameters[name].shape, "this base model needs")
    lost = [name for name, one in parameters.items() if one.requires_grad and name not in stored]
    if lost:
        raise UserError(f"{path}: tensors are missing: {listed(lost)}")
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
    for name in ("use_dora", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora",
                 "alora_invocation_tokens", "use_bdlora", "trainable_token_indices",
                 "layer_replication", "arrow_config"):
        if content.get(name):
            raise UserError(f"{path}: {name} is not supported")
    if content.get("init_lora_weights") not in PLAIN_STARTS:
        raise UserError(f"{path}: init_lora_weights '{content['init_lora_weights']}' has changed "
                        "the base; save the adapter as plain LoRA (see PEFT's documentation)")
    if content.get("bias", "none") != "none":
        raise UserError(f"{path}: bias '{content['bias']}' is not supported (only none)")
    targets, saved = (_names(path, content, key) for key in ("target_modules", "modules_to_save"))
    # PEFT lists "classifier" beside "score" for every model that classifies, whichever it has.
    saved = tuple(name.removeprefix("model.") for name in saved if name != "classifier")
    if not set(saved) <= set(SAVEABLE):
        raise UserError(f"{path}: modules_to_save {list(saved)}; only {', '.join(SAVEABLE)} are "
                        "supported")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not is_whole(rank, 1, 2**20) or not is_number(alpha, above=-1e12):
        raise UserError(f"{path}: needs the numbers r and lora_alpha, not {rank!r} and {alpha!r}")
    return LoraConfig(rank=rank, alpha=float(alpha), target_modules=targets,
                      use_rslora=bool(content.get("use_rslora")), modules_to_save=saved)


def _names(path, content, key):
    """The names in a list, or the one name, that adapter_config.json has under a key."""
    value = content.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} must be a list of names, not {value!r}")
    return tuple(value)
