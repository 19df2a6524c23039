"""The limits of a device, and clocks that wait for it.

    matrix_speed(device, torch.bfloat16)     # operations a second of one large matrix product
    bandwidth(device)                        # bytes a second of a large copy, read and written

Training is limited by matrix products, and writing one token at a time by the memory that the
weights are read from. A share of these limits says how much there is left to gain.
"""

import time
from pathlib import Path

import torch


def wait(device):
    """Return when a GPU has done all work given to it so far; on the CPU at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device):
    """Wall time of one call, including the work that it leaves to the device."""
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


def matrix_speed(device, dtype, size=None):
    """Operations a second of a product of two square matrices: 8192 wide on a GPU, else 2048."""
    size = size or (8192 if device.type == "cuda" else 2048)
    products = 10 if device.type == "cuda" else 1
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply():
        for _ in range(products):
            torch.matmul(left, right)

    multiply()
    return 2 * size**3 * products / min(seconds_of(multiply, device) for _ in range(5))


def bandwidth(device):
    """Bytes a second that a copy reads and writes, of 2 GiB on a GPU, else of 256 MiB."""
    source = torch.ones(2 ** (29 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.nbytes / best


def forget_peak(device):
    """Let `peak_memory` begin anew."""
    if device.type == "cuda":
        torch.cuda.init()  # without it there are no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Most bytes since `forget_peak`: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
