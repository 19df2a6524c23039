"""Safetensors in and out: checkpoints (single file or sharded) and PEFT adapters.

    model = load_model(resolve("examples/base"), dtype=torch.float32)
    adapter = load_adapter(model, "runs/cherry")
    save_model(model, "copy")
"""

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minisft.config import ModelConfig
from minisft.lora import SAVEABLE, LoraConfig, LoRALinear, freeze, train_fully, wrap
from minisft.model import CausalLM
from minisft.options import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
HUB_PATTERNS = ["*.json", "*.txt", "*.jinja", "tokenizer.model", "model*.safetensors",
                ADAPTER_WEIGHTS]
# What these formats call their files; a folder holds one of them, never two.
WEIGHT_FILES = (WEIGHTS, INDEX, "model-*-of-*.safetensors", ADAPTER_WEIGHTS, ADAPTER_CONFIG)
# How adapters start without changing the base they are added to.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def resolve(name_or_path, needed="config.json"):
    """The local folder of a checkpoint or adapter; a hub id is downloaded or found in the cache.

    Raises UserError where there is neither such a folder nor a way to the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            raise UserError(f"{path}: there is no {needed} in this folder")
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(f"{name_or_path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name_or_path}: no such folder here, and not to be had from the hub ({reason}); "
            "download it first and give its folder"
        ) from error


def tensor_files(model_dir):
    """{tensor name: file} of a checkpoint, from its index or its single file."""
    model_dir = Path(model_dir)
    index_path, path = model_dir / INDEX, model_dir / WEIGHTS
    if path.is_file() or not index_path.is_file():
        if not path.is_file():
            found = [one.name for one in model_dir.glob("*.bin")]
            hint = ("; pickled .bin files are never opened: convert them to safetensors"
                    if found else "")
            raise UserError(f"{model_dir}: neither {WEIGHTS} nor {INDEX} is there{hint}")
        return dict.fromkeys(_names(path), path)
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_path}: has no weight_map")
    files = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        # The index is untrusted: a shard is a plain file name beside it.
        if Path(shard).name != shard or not (model_dir / shard).is_file():
            raise UserError(f"{index_path}: '{shard}' is not a file in {model_dir}")
        for name in _names(model_dir / shard):
            if name in files:
                raise UserError(f"{model_dir}: tensor {name} is in {files[name].name} and {shard}")
            files[name] = model_dir / shard
    lost = sorted(set(weight_map) - set(files))
    if lost:
        raise UserError(f"{index_path}: tensors not in any shard: {_listed(lost)}")
    return files


def read_json(path):
    """The parsed file, or a UserError with its name and the place of the fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


@contextlib.contextmanager
def _opened(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error}") from error


def _names(path):
    with _opened(path) as file:
        return list(file.keys())


def read_tensor(path, name):
    """One tensor in memory of its own (the file is mapped only while it is read)."""
    with _opened(path) as file:
        return file.get_tensor(name).clone()


def stored_dtype(model_dir):
    """The torch.dtype that a checkpoint's embedding has on disk."""
    name = "model.embed_tokens.weight"
    path = tensor_files(model_dir).get(name)
    if path is None:
        raise UserError(f"{model_dir}: there is no tensor {name}")
    with _opened(path) as file:
        return file.get_slice(name)[:0].dtype


def load_model(model_dir, dtype=torch.float32, device="cpu"):
    """The CausalLM of a checkpoint folder, frozen, its weights as `dtype` on `device`.

    Tensors are read and converted one by one, so that memory holds the weights once. Missing,
    unexpected or misshapen tensors raise UserError with their names.
    """
    config = ModelConfig.load(model_dir)
    files = tensor_files(model_dir)
    with torch.device("meta"):
        model = CausalLM(config)
    expected = dict(model.named_parameters())
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unexpected = [name for name in files
                  if name not in expected and name not in ignored and "rotary_emb" not in name]
    missing = [name for name in expected if name not in files]
    if missing or unexpected:
        raise UserError(f"{model_dir}: the weights do not fit config.json;"
                        + (f" missing: {_listed(missing)}" if missing else "")
                        + (f" unexpected: {_listed(unexpected)}" if unexpected else ""))
    for name, parameter in expected.items():
        with _opened(files[name]) as file:
            tensor = file.get_tensor(name)
            _check_tensor(files[name], name, tensor, parameter.shape)
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def _check_tensor(path, name, tensor, shape):
    if tensor.shape != shape:
        raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, config.json says "
                        f"{list(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, "
                        "not a floating-point type")


def _listed(names, limit=5):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def parse_size(text):
    """`5GB`, `500MB`, `100KB` (powers of ten) or a number of bytes -> bytes."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    try:
        if text[-2:].upper() in units:
            size = int(float(text[:-2]) * units[text[-2:].upper()])
        else:
            size = int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"'{text}' is not a size; write 5GB, 500MB or a number of bytes")
    return size


def save_model(model, output_dir, dtype=None, max_shard_size=5 * 10**9):
    """Write config.json and safetensors, in shards of at most `max_shard_size` bytes.

    `dtype` converts on the way out; a shard is converted only when it is written.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    shards = _shards(tensors, dtype, max_shard_size)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [
        f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
    weight_map, total = {}, 0
    for file_name, keys in zip(names, shards, strict=True):
        shard = {key: tensors[key].to("cpu", dtype or tensors[key].dtype).contiguous()
                 for key in keys}
        write_safetensors(shard, output_dir / file_name)
        weight_map.update(dict.fromkeys(keys, file_name))
        total += sum(tensor.nbytes for tensor in shard.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(index, output_dir / INDEX)
    _remove_others(output_dir, names if count == 1 else [*names, INDEX])
    config = model.config.to_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(config, output_dir / "config.json")


def _shards(tensors, dtype, max_shard_size):
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _remove_others(output_dir, written):
    """Remove weights that an earlier save left: who loads the folder might take those."""
    for pattern in WEIGHT_FILES:
        for path in Path(output_dir).glob(pattern):
            if path.name not in written:
                path.unlink()


def write_safetensors(tensors, path):
    """Write beside the place, then rename: a file under its name is always whole."""
    partial = Path(f"{path}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(mode)  # save_file makes it private to its owner
    os.replace(partial, path)


def write_json(content, path):
    """Write JSON beside the place, then rename."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def copy_generation_config(model_dir, output_dir):
    """generation_config.json travels along, where there is one."""
    path = Path(model_dir) / "generation_config.json"
    if path.is_file():
        shutil.copyfile(path, Path(output_dir) / path.name)


def generation_eos(model_dir, config):
    """`eos_token_id` (int, list or None) of generation_config.json, else of config.json."""
    path = Path(model_dir) / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content.get("eos_token_id", config.eos_token_id)


def save_adapter(model, output_dir, config, base_model, dtype=None):
    """Write the adapter of `model` as PEFT does: LoRA factors and `modules_to_save`."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    trained = {name: parameter for name, parameter in model.named_parameters()
               if ".lora_" in name or name.removesuffix(".weight") in
               [SAVEABLE[saved] for saved in config.modules_to_save]}
    tensors = {PEFT_PREFIX + name: parameter.detach().to("cpu", dtype).contiguous()
               for name, parameter in trained.items()}
    write_safetensors(tensors, output_dir / ADAPTER_WEIGHTS)
    _remove_others(output_dir, [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
    ranks = {name: module.lora_A.out_features for name, module in model.named_modules()
             if isinstance(module, LoRALinear)}
    write_json({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
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
             if isinstance(module, nn.Linear) and name.rpartition(".")[2] in short]
    return sorted(short if not plain else adapted)


def load_adapter(model, adapter_dir, dropout=0.0):
    """Wrap `model` with the adapter in a PEFT folder, in place; returns its LoraConfig.

    Which modules are adapted, and with what rank, is read from the tensors themselves. `dropout`
    is for training it further.
    """
    adapter_dir = Path(adapter_dir)
    config = replace(_adapter_config(adapter_dir / ADAPTER_CONFIG), dropout=dropout)
    path = adapter_dir / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{adapter_dir}: there is no {ADAPTER_WEIGHTS}")
    with _opened(path) as file:
        tensors = {_module_name(path, key): file.get_tensor(key).float() for key in file.keys()}
    device = model.model.embed_tokens.weight.device
    freeze(model)
    train_fully(model, config.modules_to_save)
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        module, found, _ = name.partition(".lora_A.")
        if found:
            if not isinstance(modules.get(module), nn.Linear):
                raise UserError(f"{path}: the model has no linear module {module}")
            wrap(model, module, replace(config, rank=tensor.shape[0]))
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters:
            raise UserError(f"{path}: the model has no place for {name}")
        if tensor.shape != parameters[name].shape:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, the model needs "
                            f"{list(parameters[name].shape)}; is this the adapter's base model?")
        parameters[name].data = tensor.to(device)
    lost = [name for name in parameters if ".lora_" in name and name not in tensors]
    if lost:
        raise UserError(f"{path}: tensors are missing: {_listed(lost)}")
    return config


def _adapter_config(path):
    content = read_json(path)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
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
    targets = content.get("target_modules") or ()
    saved = tuple(name.removeprefix("model.") for name in content.get("modules_to_save") or ())
    if not set(saved) <= set(SAVEABLE):
        raise UserError(f"{path}: modules_to_save {list(saved)}; only {', '.join(SAVEABLE)} are "
                        "supported")
    try:
        return LoraConfig(
            rank=int(content["r"]), alpha=float(content["lora_alpha"]),
            target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
            use_rslora=bool(content.get("use_rslora")),
            modules_to_save=saved,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: needs the numbers r and lora_alpha: {error}") from error


def _module_name(path, key):
    if not key.startswith(PEFT_PREFIX):
        raise UserError(f"{path}: tensor {key} does not begin with {PEFT_PREFIX}")
    return key.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".").replace(".default.", ".")
