"""Shard a model over processes (FSDP, arXiv 2304.11277): each holds a part of all that is large.

    torchrun --nproc_per_node 8 train.py --parallel fsdp ...

Of every weight, gradient and moment of AdamW a process keeps some rows. A decoder layer is put
together, in the type to compute in, when it is about to compute, and given up right after, on the
way forward and on the way back; then its gradients are averaged in float32, and each process keeps
those of its rows. Embedding, last norm and output matrix are one more such group.

    model, lora_config = load_trainable(options, model_dir, dtype, torch.device("meta"))
    distribute(model, lora_config, options, model_dir, dtype, device)
    save_moments(model, optimizer, "checkpoint-40/optimizer")    # every process its rows
    load_moments(model, optimizer, "checkpoint-40/optimizer")    # any number of processes
    with Before(model) as reference:                             # as it was when this was made
        hidden = reference(tokens)
"""

import warnings

import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from minisft.checkpoints.adapters import adapter_tensors
from minisft.checkpoints.folders import stored_tensors
from minisft.checkpoints.hub import resolve
from minisft.common import processes
from minisft.common.errors import UserError
from minisft.model.config import ModelConfig
from minisft.model.lora import LoRALinear
from minisft.model.reward import new_head

FILE_BYTES = 10**9  # of moments in a file, all of which is put together before it is written


def distribute(model, lora_config, options, model_dir, dtype, device):
    """Give every process its rows, on `device`, of what `load_trainable` would have loaded.

    model: what it has made on the meta device, with shapes and types alone. UserError where
    nothing in the decoder is trained.
    """
    if not any(parameter.requires_grad for parameter in model.model.parameters()):
        # The averaging of gradients begins where the backward pass enters the decoder.
        raise UserError("--parallel fsdp: train something below the output matrix as well")
    shard(model, dtype, device)
    if options.train_from_scratch:
        generator = torch.Generator().manual_seed(options.seed)
        for parameter, value in model.initial_values(generator):
            processes.copy_shard(parameter, rows_of(value))
        return
    found = load_rows(model, model_dir, options.adapter)
    if options.stage == "rm" and "score.weight" not in found:
        processes.copy_shard(model.score.weight, rows_of(new_head(model.config)))
    if lora_config and not options.adapter:
        start_factors(model, lora_config)


def shard(model, dtype, device):
    """Cut all parameters by rows, and hold this process's on `device`, not yet filled. In place.

    dtype: of the weights while they are whole, and of what is computed with them.
    """
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The loss multiplies by the output matrix after the forward pass: it has to be whole still.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)


def load_rows(model, model_dir, adapter=None):
    """Read this process's rows of a checkpoint, and of an adapter, from the mapped files.

    Returns the names of what there is.
    """
    stored = stored_tensors(model_dir)
    if ModelConfig.load(model_dir).tie_word_embeddings:  # if an adapter has parted them since
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    sources = {
        name: stored[plain]
        for name in dict(model.named_parameters())
        if (plain := name.replace(".base_layer.", ".")) in stored
    }
    if adapter:
        sources |= adapter_tensors(resolve(adapter, "adapter_config.json"))
    for name, parameter in model.named_parameters():
        if name in sources:
            processes.copy_shard(parameter, sources[name].read)
    return sources.keys()


def start_factors(model, lora_config):
    """Draw the factors of a new adapter as `add_lora` does: all numbers alike, kept by rows."""
    adapted = {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    for name in sorted(adapted):
        drawn = LoRALinear(adapted[name].base_layer, lora_config, device="cpu")
        processes.copy_shard(adapted[name].lora_A.weight, rows_of(drawn.lora_A.weight))
        processes.copy_shard(adapted[name].lora_B.weight, rows_of(drawn.lora_B.weight))


def rows_of(tensor):
    """A function: begin, end -> these rows of the tensor."""
    return lambda begin, end: tensor[begin:end]


def trained(model):
    """{name: parameter} of what is trained, all of it cut."""
    # Unlike named_parameters, state_dict has a group that is still together cut again first.
    return {
        name: parameter
        for name, parameter in model.state_dict(keep_vars=True).items()
        if parameter.requires_grad
    }


class Before:
    """`with Before(model) as model:` the model as it was when this was made, and in eval mode.

    Of what is trained a copy of this process's rows is kept; inside of `with` it has their place,
    and they have its. What is frozen is there only once. No gradient can be taken.
    """

    def __init__(self, model):
        self.model = model
        self.rows = {
            name: parameter.detach().to_local().clone()
            for name, parameter in trained(model).items()
        }

    def __enter__(self):
        self.was_training = self.model.training
        self._exchange()
        return self.model.eval()

    def __exit__(self, *_):
        self._exchange()
        self.model.train(self.was_training)

    @torch.no_grad()
    def _exchange(self):
        for name, parameter in trained(self.model).items():
            present = parameter.to_local()
            kept = present.clone()
            present.copy_(self.rows[name])
            self.rows[name].copy_(kept)


def moments(model, optimizer):
    """{name in the model and kind: tensor} of all that AdamW keeps; zeros before its first step."""
    state = {}
    for name, parameter in trained(model).items():
        own = optimizer.state[parameter]
        if not own:
            own["step"] = torch.zeros((), device=parameter.device)
            own["exp_avg"], own["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        state |= {f"{name}.{kind}": value for kind, value in own.items()}
    return state


def save_moments(model, optimizer, folder):
    """Write what AdamW keeps as safetensors, each process its rows. Every process calls it."""
    state, files, size = moments(model, optimizer), {}, 0
    for name, tensor in state.items():
        files[name] = 1 + size // FILE_BYTES
        size += tensor.nbytes // processes.world_size()
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        distributed_checkpoint.save(state, storage_writer=writer)
    except CheckpointException as error:
        raise UserError(reason(error)) from error


def load_moments(model, optimizer, folder):
    """Read what AdamW keeps, as any number of processes has saved it, into a model as it is now.

    It may be sharded over another number of processes, or not at all.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():  # that there is only one process
            warnings.simplefilter("ignore", UserWarning)
            distributed_checkpoint.load(moments(model, optimizer), storage_reader=reader)
    except CheckpointException as error:
        raise UserError(f"{folder}: {reason(error)}; go on from another checkpoint") from error


def cut_moments(optimizer, saved):
    """Take over this process's rows of the `state_dict` of a run that was not sharded."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for number, values in saved["state"].items():
        parameter, own = parameters[number], optimizer.state[parameters[number]]
        own["step"] = values["step"].to(parameter.device)
        for kind in ("exp_avg", "exp_avg_sq"):
            own[kind] = torch.zeros_like(parameter)
            processes.copy_shard(own[kind], rows_of(values[kind]))


def reason(error):
    """The first of the processes' reasons in a CheckpointException, in one line."""
    fault, _ = next(iter(error.failures.values()))
    return str(fault).partition("\n")[0]
