"""Load a model to use it, not to train it: with its adapter, in the fastest form for a CPU.

model = load_for_inference("examples/base", "runs/demo", torch.bfloat16, device)
"""

from pathlib import Path

import torch

from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.folders import load_model
from minisft.model.decoder import CausalLM
from minisft.model.decoding_layers import use_decoding_layers
from minisft.model.joined_layers import join_layers
from minisft.model.lora import merge_lora
from minisft.model.packed_weights import can_pack_weights, pack_weights
from minisft.model.parameters import convert_parameters
from minisft.model.quantized import QuantizedLinear
from minisft.model.reward import Model


def load_for_inference(
    path: str | Path,
    adapter_dir: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization_bit: int | None = None,
    pack: bool = True,
    merge: bool = False,
    compiles: bool = False,
) -> CausalLM:
    """The model in a checkpoint folder with its adapter, in evaluation mode. See the steps below.

    pack: where there are kernels for it; without an adapter, the blocks of a GGUF file stay.
    compiles: torch.compile will compile the model.
    """
    keep_blocks = pack and adapter_dir is None and quantization_bit is None
    keep_blocks = keep_blocks and can_pack_weights(dtype, device)
    model = load_model(path, dtype, device, quantization_bit, keep_blocks)
    add_frozen_adapter(model, adapter_dir, dtype, merge)
    if pack:
        join_and_pack(model, dtype, device, compiles)
    return model


def add_frozen_adapter(
    model: Model, adapter_dir: Path | None, dtype: torch.dtype, merge: bool = False
) -> None:
    """Add an adapter, if there is one, for use and not for training. In place.

    merge: add it to the weights. That saves multiplications, and rounds the sum to a smaller type.
    """
    if adapter_dir is None:
        return
    load_adapter(model, adapter_dir)
    if merge:
        merge_lora(model)
        if next(model.parameters()).is_cpu:
            use_decoding_layers(model)
    # Adapters are stored in float32. Convert once, not for every token.
    convert_parameters(model.eval().requires_grad_(False), dtype)


def join_and_pack(
    model: Model, dtype: torch.dtype, device: torch.device, compiles: bool = False
) -> None:
    """Join the layers and pack the weights, where there are kernels for it. In place.

    Plain weights in float32 stay as they are, mapped from their file: a product of one row takes
    much longer than its call.
    """
    has_few_bits = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if can_pack_weights(dtype, device) and (dtype == torch.bfloat16 or has_few_bits):
        join_layers(model)
        pack_weights(model, few_bits_only=compiles)
