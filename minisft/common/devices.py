"""Where models compute and in which number type: --device, --dtype, --quantization_bit."""

import re

from minisft.common.errors import UserError

DTYPES = ["auto", "float32", "bfloat16", "float16"]


AUTO_DTYPE = "bfloat16 where the processor multiplies it, else float32"


def add_model_flags(parser, auto_dtype=AUTO_DTYPE):
    """The flags of every script that loads a model; returns the section for more of them."""
    add, switch = parser.section("model")
    add("--model_name_or_path", required=True, help="folder of a checkpoint, or hub id")
    add_device_flags(add, switch, auto_dtype)
    return add, switch


def add_device_flags(add, switch, auto_dtype=AUTO_DTYPE):
    """Where models compute and in which type of numbers, for resolve_device and resolve_dtype."""
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: a GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto",
        help=f"type of the numbers (auto: {auto_dtype})")
    switch("--bf16", "short for --dtype bfloat16")
    switch("--fp16", "short for --dtype float16")
    add("--quantization_bit", type=int, choices=[4, 8],
        help="hold the frozen linear layers in so many bits (4: NF4, 8: rows of int8)")


def resolve_device(options, must_exist=True):
    """The torch.device of `--device`: the CPU or a GPU; UserError where there is none such.

    must_exist: False to plan for a GPU that is not here.
    """
    import torch

    name = str(options.device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu(:0)?|cuda(:(0|[1-9][0-9]?))?", name):  # cuda:200 is -56 to torch
        raise UserError(f"--device {name}: not a device to use; give cpu, cuda or cuda:N")
    device = torch.device(name)
    if must_exist and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs here; "
                        "use --device cpu")
    return device


def resolve_dtype(options, device, auto=None):
    """The torch.dtype of `--dtype`, `--bf16`, `--fp16`; `auto` is what auto means, if not usual."""
    import torch

    name = options.dtype
    for flag, chosen in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(options, flag):
            if name not in ("auto", chosen):
                raise UserError(f"--{flag} contradicts --dtype {name}: give one of the two")
            name = chosen
    if name == "auto":
        return auto or (torch.bfloat16 if has_fast_bfloat16(device) else torch.float32)
    return getattr(torch, name)


def has_fast_bfloat16(device):
    """Whether the processor has bfloat16 matrix instructions of its own."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
