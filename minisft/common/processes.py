"""Several processes under torchrun: who am I, sums over all, gradients averaged by DDP.

    torchrun --nproc_per_node 2 train.py ...

A model that each process holds only a part of is made in fsdp.py; what others need of it is here.
"""

import contextlib
import inspect
import os
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minisft.common import failure
from minisft.common.errors import UserError

# How long one process may keep the others waiting: large checkpoints are written by the first.
PATIENCE = timedelta(hours=2)
_wrapped = weakref.WeakSet()  # models with a DDP reducer


def start(device, kind="ddp"):
    """Join the processes that torchrun started; returns this process's device.

    From then on all end when one fails. UserError where there is no GPU left for this one, or
    where it is alone and the model is to be sharded (kind "fsdp").
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if kind == "fsdp":
            raise UserError(
                "--parallel fsdp shards the model over processes, and there is only "
                "one: start several with torchrun, or give --parallel ddp"
            )
        return device
    failure.end_with_others()
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"--nproc_per_node: more processes than the {count} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def stop():
    """Leave the process group. Models that `wrap` returned cannot be used any more."""
    # A reducer holds the group too. If it held it last, it would free the group, and so wait for
    # gloo's threads, without releasing the GIL, which these threads may need: a deadlock.
    for model in _wrapped:
        model.reducer = model.logger = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def print_rank0(text):
    """Print, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch_command():
    """The words before `train.py` that start as many processes again."""
    if world_size() == 1:
        return "python"
    return f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"


def sum_over_ranks(values, device):
    """Element-wise sum of a list of numbers over all processes."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(number, device):
    """The largest of the processes' numbers; None counts as 0, and 0 is returned as None."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number or 0, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest) or None


def all_gather(value):
    """The picklable values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(function):
    """What function() returns in the first process, the only one to call it, for all of them."""
    if world_size() == 1:
        return function()
    values = [function() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]


def full_tensor(tensor):
    """The tensor; where it is sharded, all of it, put together by all processes at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_to_rank0(tensor, dtype=None):
    """The whole tensor on the CPU in the first process, None in others. All have to call it."""
    tensor = full_tensor(tensor.detach())
    return tensor.to("cpu", dtype or tensor.dtype).contiguous() if rank() == 0 else None


@torch.no_grad()
def copy_shard(parameter, read):
    """Give a parameter its values; where it is sharded, this process's part of them.

    read(begin, end): the rows from begin to end - 1.
    """
    if not hasattr(parameter, "full_tensor"):
        parameter.copy_(read(0, len(parameter)))
        return
    each = -(-len(parameter) // world_size())  # the last processes may have fewer, or none
    begin, end = (min(len(parameter), number * each) for number in (rank(), rank() + 1))
    parameter.to_local().copy_(read(begin, end))


def wrap_ddp(model):
    """The model whose backward pass averages gradients over processes; itself if there is one."""
    if world_size() == 1:
        return model
    # What a model has in buffers is a frozen, quantised base: it stays equal everywhere. The flag
    # has another name before torch 2.13, and the old one is warned of from then on.
    known = inspect.signature(DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    model = DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})
    _wrapped.add(model)
    return model


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gradient_sync(model, wanted):
    """Context of a backward pass: gradients are averaged in it only if `wanted`.

    Those of a sharded model always are, lest every process holds them all.
    """
    if wanted or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
