"""Fully sharded data parallelism (FSDP, arXiv 2304.11277): each rank holds a shard of the model.

    torchrun --nproc_per_node 8 train.py --parallel fsdp ...

A rank keeps some rows of every weight, gradient and AdamW moment. To compute a decoder layer,
forward or backward, the ranks gather it in the compute type and free it afterwards; its gradients
are averaged in float32, and each rank keeps those of its rows. The embedding, the last norm and the
output matrix are gathered as one more group.

    model, lora_config = load_trainable(options, model_dir, dtype, torch.device("meta"))
    distribute(model, lora_config, options, model_dir, dtype, device)
    save_moments(model, optimizer, folder)     # every rank writes its rows
    load_moments(model, optimizer, folder)     # on any number of ranks
    with Snapshot(model) as reference:         # the model as it was when the snapshot was made
        hidden = reference(tokens)
"""

import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from minisft.checkpoints.adapter_forms import read_adapter
from minisft.checkpoints.folders import open_checkpoint
from minisft.checkpoints.hub import resolve_adapter
from minisft.checkpoints.tied_weights import EMBEDDING, OUTPUT
from minisft.common import processes
from minisft.common.errors import UserError, first_line
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, LoRALinear
from minisft.model.lora_tools import adapted_modules, plain_name
from minisft.model.reward import Model, RewardModel, new_head
from minisft.model.vocabulary import read_with_new_rows
from minisft.training.low_memory_adamw import LowMemoryAdamW

# Size of a file of moments. A file is gathered in memory before it is written.
MAX_FILE_BYTES = 10**9


def distribute(
    model: Model,
    lora_config: LoraConfig | None,
    options: Namespace,
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    new_rows: range = range(0),
) -> None:
    """Shard a model that is on the meta device, and load this rank's rows on `device`. In place.

    new_rows: ids of new tokens, whose rows start at the mean. UserError if nothing in the decoder
    is trained.
    """
    if not any(parameter.requires_grad for parameter in model.model.parameters()):
        # FSDP averages gradients only if the backward pass enters the decoder.
        raise UserError(
            "--parallel fsdp needs trainable parameters in the decoder: train more than lm_head"
        )
    _shard(model, dtype, device)
    if options.train_from_scratch and isinstance(model, CausalLM):
        generator = torch.Generator().manual_seed(options.seed)
        for parameter, value in model.initial_values(generator):
            processes.copy_shard(parameter, _reader(value))
        return
    loaded = _load_shards(model, model_dir, options.adapter, new_rows)
    if isinstance(model, RewardModel) and "score.weight" not in loaded:
        processes.copy_shard(model.score.weight, _reader(new_head(model.config)))
    if lora_config and not options.adapter:
        _initialize_lora(model, lora_config)


def _shard(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    """Split all parameters by rows and allocate this rank's on `device`. In place.

    dtype: type of the gathered weights and of computations with them.
    """
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The loss uses the output matrix after the forward pass, so it must not be freed.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)


def _load_shards(model: Model, model_dir: Path, adapter: str | None, new_rows: range) -> set[str]:
    """Read this rank's rows of a checkpoint and an adapter; returns the names that were read."""
    config, stored = open_checkpoint(model_dir)
    if config.tie_word_embeddings:  # the adapter may have untied them
        stored[OUTPUT] = stored[EMBEDDING]
    adapted = {}
    if adapter:
        adapted = read_adapter(resolve_adapter(adapter), config.tie_word_embeddings).tensors
    loaded = set()
    for name, parameter in model.named_parameters():
        stored_name = plain_name(name)
        source = adapted.get(stored_name) or stored.get(stored_name)
        if source:
            read = source.read
            if new_rows and stored_name in (EMBEDDING, OUTPUT):
                read = read_with_new_rows(read, source.shape[0], new_rows)
            processes.copy_shard(parameter, read)
            loaded.add(name)
    return loaded


def _initialize_lora(model: Model, lora_config: LoraConfig) -> None:
    """Draw the factors of a new adapter. Every rank draws all of them, as `add_lora` does."""
    for _, module in sorted(adapted_modules(model).items()):
        drawn = LoRALinear(module.base_layer, lora_config, device="cpu")
        processes.copy_shard(module.lora_A.weight, _reader(drawn.lora_A.weight))
        processes.copy_shard(module.lora_B.weight, _reader(drawn.lora_B.weight))


def _reader(tensor: Tensor) -> Callable[[int, int], Tensor]:
    """A function (begin, end) -> rows of the tensor, as `copy_shard` reads them."""
    return lambda begin, end: tensor[begin:end]


def trainable_parameters(model: nn.Module) -> dict[str, Any]:
    """{name: trainable parameter}, all of them sharded."""
    # state_dict, not named_parameters: it reshards groups that are still gathered.
    return {
        name: parameter
        for name, parameter in model.state_dict(keep_vars=True).items()
        if parameter.requires_grad
    }


class Snapshot:
    """`with Snapshot(model) as model:` the model as it was when this was made, in eval mode.

    Holds a copy of this rank's trainable rows and exchanges them with the current ones. Frozen
    parameters are not copied. Inside, no gradient may be computed.
    """

    def __init__(self, model: Any):
        self.model = model
        self.rows = {
            name: parameter.detach().to_local().clone()
            for name, parameter in trainable_parameters(model).items()
        }

    def __enter__(self) -> Any:
        self.was_training = self.model.training
        self._exchange()
        return self.model.eval()

    def __exit__(self, *_: object) -> None:
        self._exchange()
        self.model.train(self.was_training)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in trainable_parameters(self.model).items():
            current = parameter.to_local()
            kept = current.clone()
            current.copy_(self.rows[name])
            self.rows[name].copy_(kept)


# Optimizer state


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{parameter name and kind: tensor} of AdamW's state; zeros before its first step."""
    state = {}
    for name, parameter in trainable_parameters(model).items():
        own = prepared_state(optimizer, parameter)
        for kind, value in own.items():
            state[f"{name}.{kind}"] = value
    return state


def prepared_state(optimizer: torch.optim.Optimizer, parameter: Any) -> dict[str, Any]:
    """The optimizer's state of a parameter; zeros before the first step."""
    if isinstance(optimizer, LowMemoryAdamW):
        return optimizer.prepare(parameter)
    own = optimizer.state[parameter]
    if not own:
        own["step"] = torch.zeros((), device=parameter.device)
        own["exp_avg"] = torch.zeros_like(parameter)
        own["exp_avg_sq"] = torch.zeros_like(parameter)
    return own


def save_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write AdamW's state as safetensors. Every rank calls it and writes its rows."""
    state, files, num_bytes = moments(model, optimizer), {}, 0
    for name, tensor in state.items():
        files[name] = 1 + num_bytes // MAX_FILE_BYTES
        num_bytes += tensor.nbytes // processes.world_size()
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        distributed_checkpoint.save(state, storage_writer=writer)
    except CheckpointException as error:
        raise UserError(_reason(error)) from error


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read AdamW's state that any number of ranks saved.

    This model may be sharded over another number of ranks, or not at all.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():  # torch warns when there is only one process
            warnings.simplefilter("ignore", UserWarning)
            distributed_checkpoint.load(moments(model, optimizer), storage_reader=reader)
    except CheckpointException as error:
        raise UserError(f"{folder}: {_reason(error)}. Resume from another checkpoint.") from error


def shard_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take this rank's rows from the optimizer's state_dict of a run that was not sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        own = prepared_state(optimizer, parameters[index])
        own["step"].copy_(values["step"])
        for kind in own.keys() - {"step"}:
            processes.copy_shard(own[kind], _reader(values[kind]))


def _reason(error: CheckpointException) -> str:
    """The error of the first rank that failed, on one line."""
    fault, _ = next(iter(error.failures.values()))
    return first_line(fault)
