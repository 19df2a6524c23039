"""The device of a model, its number type, and what the device cannot do.

device = resolve_device("auto")                     # cuda or mps if there is a GPU, else cpu
dtype = resolve_dtype("auto", device)

mps is the GPU of a Mac. It has no float64, and bfloat16 only since macOS 14.
"""

import re

import torch
from torch import Tensor

from minisft.common.errors import UserError
from minisft.common.torchrun import announced_processes


def resolve_device(name: str | torch.device = "auto", must_exist: bool = True) -> torch.device:
    """The torch.device that `--device` names: the CPU, a GPU, or the GPU of a Mac.

    must_exist: False to plan for a GPU that this machine does not have.
    """
    name = str(name)
    if name == "auto":
        # Several processes cannot share the GPU of a Mac.
        has_mps = torch.backends.mps.is_available() and announced_processes() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    # torch would read cuda:200 as device -56.
    if not re.fullmatch(r"(cpu|mps)(:0)?|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {name}: no such device. Use cpu, mps, cuda or cuda:N.")
    device = torch.device(name)
    if must_exist and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    if must_exist and device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch sees no GPU of a Mac. Use --device cpu.")
    return device


def resolve_dtype(
    name: str | torch.dtype, device: torch.device, auto: torch.dtype | None = None
) -> torch.dtype:
    """The torch.dtype of that name.

    auto: the type that "auto" means; by default bfloat16 where its products are faster, else
    float32.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return auto or (torch.bfloat16 if has_fast_bfloat16(device) else torch.float32)
    dtype = getattr(torch, name)
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        raise UserError("--dtype bfloat16: mps has it since macOS 14. Use --dtype float32.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if the processor multiplies matrices faster in bfloat16 than in float32."""
    if device.type == "mps":  # not measured yet
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    # Without AMX, Intel multiplies bfloat16 at half the speed of float32.
    fast = ("amx_bf16", "bf16") if is_intel() else ("avx512_bf16", "amx_bf16", "bf16")
    return any(capabilities.get(name, False) for name in fast)


def is_intel() -> bool:
    """True if the CPU is one of Intel, for which MKL is made."""
    return str(torch.cpu.get_capabilities().get("cpu_name")).startswith("Intel")


def type_for_answers(device: torch.device) -> torch.dtype:
    """The type that "auto" means where a model writes answers.

    A token reads every weight for a few multiplications, and bfloat16 halves what it reads. So it
    is usually faster on a processor that does not emulate it.
    """
    is_native = device.type == "cpu" and has_native_bfloat16()
    return torch.bfloat16 if is_native or has_fast_bfloat16(device) else torch.float32


def has_native_bfloat16() -> bool:
    """True if the CPU has instructions that multiply bfloat16; other processors emulate it."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_bfloat16(device: torch.device) -> bool:
    """True if the device supports bfloat16."""
    is_mac = device.type == "mps" and torch.backends.mps.is_available()
    return not is_mac or torch.backends.mps.is_macos_or_newer(14, 0)


def has_fused_adamw(device: torch.device) -> bool:
    """True if AdamW may use its fused kernel, which is untested on mps."""
    return device.type != "mps"


def check_compile(device: torch.device) -> None:
    """UserError if --compile does not work on the device."""
    if device.type == "mps":
        raise UserError("--compile does not work on mps. Leave it out, or use --device cpu.")


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the CPU to the device. The CPU does not wait for a GPU.

    A GPU reads pinned memory by itself; from other memory the CPU would have to copy.
    """
    if torch.device(device).type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; float64 becomes float32 where there is none."""
    is_mac = torch.device(device).type == "mps"
    return (tensor.float() if is_mac and tensor.dtype == torch.float64 else tensor).to(device)
