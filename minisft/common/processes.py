"""The processes that torchrun started: ranks, collective operations, DDP.

    torchrun --nproc_per_node 2 train.py ...

Every process is a rank, numbered from 0. All functions also work in a single process without
torchrun: it is rank 0 of 1. All ranks must call a collective operation, in the same order.
training/fsdp.py builds sharded models; the other modules need only the functions here.
"""

import contextlib
import inspect
import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minisft.common import failure
from minisft.common.errors import UserError
from minisft.common.outputs import despite_full_disk
from minisft.common.torchrun import announced_processes

# How long ranks wait for each other: while rank 0 writes a large checkpoint, for instance.
TIMEOUT = timedelta(hours=2)
# Models with a DDP reducer; see stop().
_wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def start(device: torch.device, kind: str = "ddp") -> torch.device:
    """Join the processes that torchrun started; returns this rank's device.

    From here on, all ranks end when one fails. UserError if this rank has no GPU or shares that of
    a Mac, or if there is only one rank and kind is "fsdp".
    """
    if announced_processes() == 1:
        if kind == "fsdp":
            raise UserError(
                "--parallel fsdp shards the model over several processes, but there is only one. "
                "Start more with torchrun, or use --parallel ddp."
            )
        return device
    if device.type == "mps":
        raise UserError("--device mps works in one process only. Use --device cpu with torchrun.")
    failure.exit_when_another_fails()
    if device.type == "cuda":
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(
                f"--nproc_per_node: there are {num_gpus} GPUs. Start at most {num_gpus} processes."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def stop() -> None:
    """Leave the process group. Models that wrap_ddp returned cannot be used afterwards."""
    # A reducer also references the group. If it held the last reference, it would free the group
    # and wait for gloo's threads without releasing the GIL, which these threads may need: a
    # deadlock.
    while _wrapped:
        model = _wrapped.pop()
        del model.reducer, model.logger
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank0(text: str) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        with despite_full_disk():
            print(text, flush=True)


def on_rank0(context: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """The context manager on rank 0; one that does nothing on the other ranks."""
    return context if rank() == 0 else contextlib.nullcontext()


def launch_command() -> str:
    """The start of a command line, up to the script, that launches this many processes again."""
    if world_size() == 1:
        return "python"
    return f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"


def barrier() -> None:
    """Wait until all ranks have called this."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Iterable[float], device: torch.device | str) -> list[float]:
    """The sum over all ranks of each value, in float64 (all-reduce)."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(number: int | None, device: torch.device | str) -> int | None:
    """The largest number of all ranks (all-reduce). None counts as 0, and 0 is returned as None."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number or 0, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest) or None


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in rank order. They must be picklable."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(function: Callable[[], Any]) -> Any:
    """Call function() on rank 0 and broadcast the result, which must be picklable."""
    if world_size() == 1:
        return function()
    values = [function() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which every rank holds some rows (FSDP)."""
    return hasattr(tensor, "to_local")


def local_rows(tensor: Any) -> Tensor:
    """This rank's rows of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_to_rank0(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """The full tensor on the CPU of rank 0, as `dtype` if given; None on the other ranks."""
    tensor = full_tensor(tensor.detach())
    return tensor.to("cpu", dtype or tensor.dtype).contiguous() if rank() == 0 else None


@torch.no_grad()
def copy_shard(parameter: Tensor, read: Callable[[int, int], Tensor]) -> None:
    """Fill a parameter with its values. A sharded parameter gets only this rank's rows.

    read(begin, end): returns the rows from begin to end - 1.
    """
    if not is_sharded(parameter):
        parameter.copy_(read(0, len(parameter)))
        return
    num_rows = len(parameter)
    rows_per_rank = -(-num_rows // world_size())  # the last ranks may have fewer, or none
    begin = min(num_rows, rank() * rows_per_rank)
    end = min(num_rows, begin + rows_per_rank)
    local_rows(parameter).copy_(read(begin, end))


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model in DDP, which averages gradients over ranks; the model itself on a single rank."""
    if world_size() == 1:
        return model
    # The only buffers are the frozen weights of quantised layers, equal on all ranks, so they are
    # not broadcast. torch 2.13 renamed the flag for this.
    parameters = inspect.signature(DistributedDataParallel).parameters
    is_new = "forward_sync_buffers" in parameters
    flags: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **flags)
    _wrapped.add(wrapped)
    return wrapped


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
    """Context manager for a backward pass. DDP averages the gradients in it only if `enabled`.

    A sharded model always averages them: otherwise every rank would hold all gradients.
    """
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
