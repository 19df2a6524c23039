"""The device of a model, and its number type.

device = resolve_device("auto")                     # cuda if there is a GPU, else cpu
dtype = resolve_dtype("auto", device)
"""

import re

import torch

from minisft.common.errors import UserError


def resolve_device(name: str | torch.device = "auto", must_exist: bool = True) -> torch.device:
    """The torch.device that `--device` names: the CPU or a GPU.

    must_exist: False to plan for a GPU that this machine does not have.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # torch would read cuda:200 as device -56.
    if not re.fullmatch(r"cpu(:0)?|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {name}: no such device. Use cpu, cuda or cuda:N.")
    device = torch.device(name)
    if must_exist and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    return device


def resolve_dtype(
    name: str | torch.dtype, device: torch.device, auto: torch.dtype | None = None
) -> torch.dtype:
    """The torch.dtype of that name.

    auto: the type that "auto" means; by default bfloat16 where the processor is fast at it, else
    float32.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return auto or (torch.bfloat16 if has_fast_bfloat16(device) else torch.float32)
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if the processor has bfloat16 matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
