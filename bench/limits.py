"""The limits of a device, and timers that wait until it has finished.

    matrix_speed(device, torch.bfloat16)     # operations per second of a large matrix product
    bandwidth(device)                        # bytes per second that a large copy reads and writes

Matrix products limit training. Memory bandwidth limits generation, which reads all weights for
every token. A share of these limits says how much faster the code could be.
"""

import time
from collections.abc import Callable

import torch

from bench import measure


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished all its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, including the work that it queues on the device."""
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


def matrix_speed(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations per second of a product of square matrices: 8192 wide on a GPU, 2048 on a CPU."""
    size = size or (8192 if device.type == "cuda" else 2048)
    num_products = 10 if device.type == "cuda" else 1
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        """Multiply the matrices a few times."""
        for _ in range(num_products):
            torch.matmul(left, right)

    multiply()
    return 2 * size**3 * num_products / min(seconds_of(multiply, device) for _ in range(5))


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes: 2 GiB on a GPU, 256 MiB on a CPU."""
    source = torch.ones(2 ** (29 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / seconds


def forget_peak(device: torch.device) -> None:
    """Reset the peak that `peak_memory` returns."""
    if device.type == "cuda":
        torch.cuda.init()  # without it there are no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        measure.forget_peak_memory()


def peak_memory(device: torch.device) -> int:
    """The most bytes since `forget_peak`: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return measure.peak_memory()
