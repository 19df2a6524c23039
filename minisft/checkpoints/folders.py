"""Checkpoint folders in Hugging Face's format: config.json and safetensors, single or in shards.

    model = load_model("examples/base")
    save_model(model, "copy")

Modules and parameters are named as in a checkpoint, so there is no table of names.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from minisft.checkpoints.gguf_blocks import place_blocks
from minisft.checkpoints.tied_weights import EMBEDDING, OUTPUT, settle_tie
from minisft.common import processes
from minisft.common.devices import dtype_name, move
from minisft.common.errors import UserError
from minisft.common.json_files import read_json, token_ids, write_json
from minisft.common.outputs import check_free_space
from minisft.common.tensor_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    USE_ORIGINAL,
    WEIGHTS,
    StoredTensor,
    tensor_files,
    write_safetensors,
)
from minisft.common.words import list_names
from minisft.gguf import unpack
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.decoding_layers import use_decoding_layers
from minisft.model.quantized import QuantizedLinear
from minisft.model.reward import Model, RewardModel

# Endings of tensor names that no model has a parameter for -> why nothing is lost without them.
# All other tensors without a parameter are refused.
REDUNDANT = dict.fromkeys(
    ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    "old checkpoints store the rotary angles, which follow from config.json",
)
# Weight files of all formats. A folder holds one format.
WEIGHT_FILES = (WEIGHTS, INDEX, "model-*-of-*.safetensors", ADAPTER_WEIGHTS, ADAPTER_CONFIG)
REWARD_MODEL_HINT = "it is a reward model, for score.py --mode reward, and cannot write text"

M = TypeVar("M", CausalLM, RewardModel)


# Loading


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization_bit: int | None = None,
    keep_blocks: bool = False,
) -> CausalLM:
    """The model in a checkpoint folder, frozen, on a device.

    dtype: by default the type of the stored embedding. quantization_bit: 4 or 8, to hold the linear
    layers of the decoder in that many bits; the embedding and the output matrix keep `dtype`.
    keep_blocks: keep those of a GGUF file, see gguf_blocks.py; where can_pack_weights is true.
    UserError names tensors that are missing, unexpected or of the wrong shape.
    """
    model, stored = open_model(path, CausalLM)
    if keep_blocks:
        place_blocks(model, stored, dtype or stored[EMBEDDING].dtype)
    load_weights(model, stored, dtype, device, quantization_bit)
    return model.eval()


def open_model(
    path: str | Path, build: Callable[[ModelConfig], M]
) -> tuple[M, dict[str, StoredTensor]]:
    """(a model on the meta device, {name: StoredTensor}), after all checks and before any reading.

    build: CausalLM or RewardModel.
    """
    config, stored = open_checkpoint(path)
    # A wrong number of layers, perhaps a million, must fail before they are built.
    last_layer = f"model.layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last_layer) for name in stored):
        raise UserError(
            f"{path}: the weights do not fit config.json; missing: {last_layer}*, among names such "
            f"as {next(iter(stored), 'none')}"
        )
    with torch.device("meta"):
        model = build(config)
    _check_fit(path, model, stored)
    return model, stored


def open_checkpoint(path: str | Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """(config, {name: StoredTensor}) of a folder. Both agree whether the output matrix is tied."""
    config, stored = ModelConfig.load(path), stored_tensors(path)
    settle_tie(config, stored)
    return config, stored


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """{name: StoredTensor} of a checkpoint folder, from safetensors or a GGUF file."""
    gguf_path = Path(path) / unpack.GGUF
    return unpack.stored_tensors(gguf_path) if gguf_path.is_file() else tensor_files(path)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The type of a checkpoint's embedding in its file."""
    stored = open_checkpoint(path)[1].get(EMBEDDING)
    if stored is None:
        raise UserError(f"{path}: there is no tensor {EMBEDDING}. Download the checkpoint again.")
    return stored.dtype


def _check_fit(path: str | Path, model: Model, stored: Mapping[str, StoredTensor]) -> None:
    """UserError unless the tensors are the model's parameters, each with its shape."""
    parameters = dict(model.named_parameters())
    if "score.weight" not in stored:  # a reward model without it gets a new head
        parameters.pop("score.weight", None)
    missing = [name for name in parameters if name not in stored]
    unexpected = [
        name for name in stored if name not in parameters and not name.endswith(tuple(REDUNDANT))
    ]
    if isinstance(model, RewardModel):  # its head takes the place of the output matrix
        unexpected = [name for name in unexpected if name != OUTPUT]
    if missing or unexpected:
        if quantization := _quantization(model.config.original):
            raise UserError(
                f"{path}: the weights are quantised ({quantization} in config.json; tensors such "
                f"as {(unexpected or missing)[0]}). {USE_ORIGINAL}"
            )
        problems = [f"{path}: the weights do not fit config.json"]
        if missing:
            problems.append(f"missing: {list_names(missing)}")
        if unexpected:
            problems.append(f"unexpected: {list_names(unexpected)}")
        if "score.weight" in unexpected:
            problems.append(REWARD_MODEL_HINT)
        raise UserError("; ".join(problems))
    for name, parameter in parameters.items():
        stored[name].check(parameter.shape, "config.json says")


def _quantization(content: Mapping[str, Any]) -> str | None:
    """How config.json describes quantised weights; None if it has no such entry."""
    config = content.get("quantization_config")
    if isinstance(config, dict) and config.get("quant_method"):
        return f"quantization_config with quant_method {config['quant_method']}"
    return (
        "quantization_config" if config else "quantization" if content.get("quantization") else None
    )


def load_weights(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    device: str | torch.device,
    quantization_bit: int | None = None,
) -> None:
    """Load the weights of a model that is on the meta device. Arguments as in load_model.

    Tensors are read and converted one after the other, so memory holds the weights once. On a CPU
    the model gets the layers that decode faster, see decoding_layers.py.
    """
    dtype = dtype or stored[EMBEDDING].dtype
    for name in [name for name, _ in model.named_parameters() if name in stored]:
        weight = move(stored[name].read(), device)
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        in_decoder_layer = module_name.startswith("model.layers.")
        is_matrix = isinstance(module, nn.Linear) and kind == "weight"
        if quantization_bit and in_decoder_layer and is_matrix:
            quantized = QuantizedLinear.from_weight(weight, quantization_bit)
            model.set_submodule(module_name, quantized)
        else:
            setattr(module, kind, nn.Parameter(weight.to(dtype), requires_grad=False))
    if torch.device(device).type == "cpu":
        use_decoding_layers(model)


# Saving


def save_model(
    model: Model,
    output_dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write config.json and safetensors, in shards of at most `max_shard_size` bytes.

    dtype: converts the weights; by default they keep their types. All ranks call it, also for a
    model that is sharded over ranks, and rank 0 writes. A shard is in memory only while it is
    written. UserError if the disk has too little room.
    """
    output_dir, tensors = Path(output_dir), model.state_dict()
    sizes = {
        name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()
    }
    shards = _split_into_shards(sizes, max_shard_size)
    file_names = [WEIGHTS]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        file_names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in numbers]
    is_rank0 = processes.rank() == 0
    if is_rank0:
        check_free_space(output_dir, sum(sizes.values()))
    weight_map = {}
    for file_name, names in zip(file_names, shards, strict=True):
        shard = gather_tensors({name: tensors[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(names, file_name)
        if is_rank0:
            write_safetensors(shard, output_dir / file_name)
    if not is_rank0:
        return
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json({"metadata": metadata, "weight_map": weight_map}, output_dir / INDEX)
        file_names.append(INDEX)
    remove_other_weights(output_dir, file_names)
    config = model.config.to_dict()
    config.pop("torch_dtype", None)  # the old name of dtype
    for name in ("quantization_config", "quantization"):  # left over: these weights are plain
        config.pop(name, None)
    config["dtype"] = dtype_name(dtype or next(iter(tensors.values())).dtype)
    write_json(config, output_dir / "config.json")


def gather_tensors(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The full tensors on rank 0, nothing on other ranks. All ranks call it.

    UserError if a number does not fit `dtype`.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = processes.gather_to_rank0(tensor, dtype)
        if full is not None:
            if dtype == torch.float16 and full.isinf().any():
                raise UserError(
                    f"{name} holds numbers above 65,504, the largest float16. Use --dtype bfloat16 "
                    "or float32"
                )
            gathered[name] = full
    return gathered


def _split_into_shards(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Names in order, in lists of at most `max_shard_size` bytes. A larger tensor gets its own."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def remove_other_weights(output_dir: str | Path, written: Collection[str]) -> None:
    """Remove weights from an earlier save, which a program could load instead of the new ones."""
    for pattern in WEIGHT_FILES:
        for path in Path(output_dir).glob(pattern):
            if path.name not in written:
                path.unlink()


# Generation config


def generation_eos(path: str | Path, config: ModelConfig) -> list[int]:
    """The ids of `eos_token_id` in generation_config.json, else in config.json."""
    path = Path(path) / "generation_config.json"
    eos = read_json(path, missing={}).get("eos_token_id", config.eos_token_id)
    return token_ids(eos, path, "eos_token_id")


def save_generation_config(
    path: str | Path, output_dir: str | Path, config: ModelConfig, stop_ids: Collection[int]
) -> None:
    """Copy generation_config.json to `output_dir`, and add stop tokens that it lacks."""
    content = read_json(Path(path) / "generation_config.json", missing={})
    eos = generation_eos(path, config)
    if more := sorted(set(stop_ids) - set(eos)):
        content = {"bos_token_id": config.bos_token_id, **content, "eos_token_id": eos + more}
    if content:
        write_json(content, Path(output_dir) / "generation_config.json")
