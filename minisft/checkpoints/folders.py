"""Safetensors in and out: checkpoints (single file or sharded) and PEFT adapters.

model = load_model(resolve("examples/base"), dtype=torch.float32)
adapter = load_adapter(model, "runs/cherry")
save_model(model, "copy")
"""

from pathlib import Path

import torch
from torch import nn

from minisft.common import processes
from minisft.common.errors import UserError
from minisft.common.json_files import read_json, token_ids, write_json
from minisft.common.outputs import check_free_space
from minisft.common.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    shorten_list,
    tensor_files,
    write_safetensors,
)
from minisft.gguf import unpack
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.quantized import QuantizedLinear

# What these formats call their files; a folder holds one of them, never two.
WEIGHT_FILES = (WEIGHTS, INDEX, "model-*-of-*.safetensors", ADAPTER_WEIGHTS, ADAPTER_CONFIG)
A_REWARD_MODEL = "; it is a reward model, for score.py --mode reward: it writes no text"


def stored_tensors(model_dir):
    """{tensor name: StoredTensor} of a checkpoint folder, whichever kind of file it has."""
    path = Path(model_dir) / unpack.GGUF
    return unpack.stored_tensors(path) if path.is_file() else tensor_files(model_dir)


def stored_dtype(model_dir):
    """The torch.dtype that a checkpoint's embedding has on disk."""
    name = "model.embed_tokens.weight"
    stored = stored_tensors(model_dir).get(name)
    if stored is None:
        raise UserError(f"{model_dir}: there is no tensor {name}")
    return stored.dtype


def load_model(model_dir, dtype=torch.float32, device="cpu", quantization_bit=None, build=CausalLM):
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
        if (
            quantization_bit
            and child == "weight"
            and parent.startswith("model.layers.")
            and isinstance(module, nn.Linear)
        ):
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
    unexpected = [
        name
        for name in files
        if name not in expected and name not in ignored and "rotary_emb" not in name
    ]
    missing = [name for name in expected if name not in files]
    if missing or unexpected:
        raise UserError(
            f"{model_dir}: the weights do not fit config.json;"
            + (f" missing: {shorten_list(missing)}" if missing else "")
            + (f" unexpected: {shorten_list(unexpected)}" if unexpected else "")
            + (A_REWARD_MODEL if "score.weight" in unexpected else "")
        )
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
    count, is_first = len(shards), processes.rank() == 0
    names = (
        [WEIGHTS]
        if count == 1
        else [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
    )
    if is_first:
        check_free_space(output_dir, sum(sizes.values()))
    for file_name, keys in zip(names, shards, strict=True):
        shard = {key: processes.gather_to_rank0(tensors[key], dtype) for key in keys}
        if is_first:
            write_safetensors(shard, output_dir / file_name)
    if not is_first:
        return
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        write_json(
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
            output_dir / INDEX,
        )
    remove_other_weights(output_dir, names if count == 1 else [*names, INDEX])
    config = model.config.to_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype or next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(config, output_dir / "config.json")


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


def remove_other_weights(output_dir, written):
    """Remove weights that an earlier save left: who loads the folder might take those."""
    for pattern in WEIGHT_FILES:
        for path in Path(output_dir).glob(pattern):
            if path.name not in written:
                path.unlink()


def save_generation_config(model_dir, output_dir, config, stop_ids):
    """generation_config.json travels along; where it lacks ids that end an answer, with those."""
    content = read_json(Path(model_dir) / "generation_config.json", missing={})
    shorten_list = generation_eos(model_dir, config)
    if more := sorted(set(stop_ids) - set(shorten_list)):
        content = {
            "bos_token_id": config.bos_token_id,
            **content,
            "eos_token_id": shorten_list + more,
        }
    if content:
        write_json(content, Path(output_dir) / "generation_config.json")


def generation_eos(model_dir, config):
    """The ids of `eos_token_id` in generation_config.json, else in config.json, as a list."""
    path = Path(model_dir) / "generation_config.json"
    stated = read_json(path, missing={}).get("eos_token_id", config.eos_token_id)
    return token_ids(stated, path, "eos_token_id")
