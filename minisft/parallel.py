"""Several processes under torchrun: who am I, sums over all, gradients averaged by DDP.

    torchrun --nproc_per_node 2 train.py ...
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minisft import failure
from minisft.options import UserError


def start(device):
    """Join the processes that torchrun started; returns this process's device.

    From then on all end when one fails. UserError where there is no GPU left for this one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    failure.end_with_others()
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"--nproc_per_node: more processes than the {count} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(text):
    """Print, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launcher():
    """The words before `train.py` that start as many processes again."""
    if world_size() == 1:
        return "python"
    return f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"


def sum_over_processes(values, device):
    """Element-wise sum of a list of numbers over all processes."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def any_process(number, device):
    """The largest of the processes' numbers; None counts as 0, and 0 is returned as None."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number or 0, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest) or None


def gather(value):
    """The picklable values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wrap(model):
    """The model whose backward pass averages gradients over processes; itself if there is one."""
    if world_size() == 1:
        return model
    # What a model has in buffers is a frozen, quantised base: equal everywhere as it is.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gradient_sync(model, wanted):
    """Context of a backward pass: gradients are averaged in it only if `wanted`."""
    if wanted or world_size() == 1:
        return contextlib.nullcontext()
    return model.no_sync()
