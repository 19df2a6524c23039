"""Weights in the order in which the fastest kernel of a CPU reads them.

    model = load_model(folder, torch.bfloat16)
    if can_pack_weights(torch.bfloat16, "cpu"):
        pack_weights(model)     # in place, for use and not for training

A decoding step multiplies every matrix with one row, so its time is that of reading the weights.
F.linear in bfloat16 brings a matrix into oneDNN's order at every call, and that takes as long as
the multiplication. For 8 and 4 bits torch has products that read the packed numbers. They take and
give bfloat16:

    layer              product                                              bytes a weight
    PackedLinear       oneDNN, with the weight in oneDNN's order            2
    Int8Linear         _weight_int8pack_mm, for rows with a scale           1
    Int4Linear         _weight_int4pack_mm_for_cpu, for Blocks              0.63
    Int4PairLinear     the same twice: 8 bits in blocks                     1.25

On a processor that multiplies bfloat16, a model in that type has all of them. On one with AVX2 or
AVX-512 that does not, a model in float32 has those of 8 and 4 bits: they round their input to
bfloat16, and read a quarter and less of the bytes. Everything else keeps the layers that it has.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minisft.common.devices import has_native_bfloat16
from minisft.model.decoder import CausalLM
from minisft.model.quantized import QuantizedLinear, plain_linear

BLOCK = 32  # weights of a row that share a scale in GGUF's Q4_0 and Q4_1
ROWS_TOGETHER = 16  # the kernel for 4 bits needs a multiple of it
# The kernel for 8 bits reads so many numbers of a row at a time (AVX2: 8), also beyond its end.
COLUMNS_TOGETHER = 32
# Above so many rows, multiplying with the dequantised weight is faster. Dequantising 4 bits is
# itself a product, with as many rows as the weight has columns; IDENTITY_ROWS at a time bound its
# memory.
INT8_ROWS, INT4_ROWS_PER_COLUMN = 32, 2
IDENTITY_ROWS = 256


def can_pack_weights(dtype: torch.dtype, device: torch.device | str) -> bool:
    """True if a model in this type can have packed weights: in the type that suits the CPU.

    Where the CPU multiplies bfloat16, float32 is chosen for its accuracy, and stays exact.
    """
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # oneDNN supports bfloat16 with any AVX-512, and emulates it before AVX512-BF16.
    is_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.bfloat16:
        return is_supported
    is_native = is_supported and has_native_bfloat16()
    has_kernels = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return dtype == torch.float32 and has_kernels and not is_native


@torch.no_grad()
def pack_weights(*models: nn.Module, few_bits_only: bool = False) -> None:
    """Pack the linear layers of models where can_pack_weights is true. In place.

    few_bits_only: leave weights in bfloat16 as they are; torch.compile cannot read oneDNN's order.
    Models that share weights share them afterwards, too. One layer after the other is packed, so
    memory holds the weights once; a tied output matrix twice, because the embedding needs its rows
    as they are.
    """
    for model in () if few_bits_only else models:
        separate_head(model)
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # by the address of the weight
    for model in models:
        for name, module in model.named_modules():
            weight = packable_weight(name, module)
            if weight is not None and not (few_bits_only and weight.dtype == torch.bfloat16):
                places.setdefault(weight.data_ptr(), []).append((model, name))
    for same in places.values():
        model, name = same[0]
        module = model.get_submodule(name)
        assert isinstance(module, (nn.Linear, QuantizedLinear))
        is_quantized = isinstance(module, QuantizedLinear)
        packed = Int8Linear(module) if is_quantized else PackedLinear(module)
        for model, name in same:
            model.set_submodule(name, packed)


def separate_head(model: nn.Module) -> None:
    """Make a layer of a tied output matrix in bfloat16, on the same weight. In place."""
    if isinstance(model, CausalLM) and model.config.tie_word_embeddings:
        weight = model.model.embed_tokens.weight
        if weight.dtype == torch.bfloat16:
            model.add_module("lm_head", plain_linear(weight, None))
            model.config.tie_word_embeddings = False


def packable_weight(name: str, module: nn.Module) -> Tensor | None:
    """The weight of a layer that can be packed: 8 bits or bfloat16, and not a small one of LoRA."""
    if type(module) is QuantizedLinear and module.bits == 8:
        return module.steps if module.in_features % COLUMNS_TOGETHER == 0 else None
    is_plain = isinstance(module, nn.Linear) and ".lora_" not in name
    return module.weight if is_plain and module.weight.dtype == torch.bfloat16 else None


class PackedLinear(QuantizedLinear):
    """A frozen linear layer in bfloat16 with its weight in oneDNN's order."""

    packed: Tensor

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = 16
        self.register_parameter("bias", linear.bias)
        # oneDNN chooses the order for a number of rows; that for one row suits others, too.
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) from x (..., in_features)."""
        if not x.numel() or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as `dtype`."""
        return self.packed.to_dense().to(dtype)


class Int8Linear(QuantizedLinear):
    """A QuantizedLinear of 8 bits that multiplies a few rows without dequantising."""

    row_scales: Tensor

    def __init__(self, layer: QuantizedLinear):
        super().__init__(layer.in_features, layer.out_features, 8, layer.bias)
        self.steps, self.largest = layer.steps, layer.largest
        self.register_buffer("row_scales", (layer.largest / 127).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) from x (..., in_features)."""
        if not suits_kernel(x, INT8_ROWS):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.steps, self.row_scales).to(x.dtype)
        return with_bias(y.view(*x.shape[:-1], self.out_features), self.bias)


class Blocks(NamedTuple):
    """A matrix (out, in) in blocks of 32 numbers of a row: scale * step + minimum."""

    steps: Tensor  # (out, in) int32 from 0 to 15
    scales: Tensor  # (out, in / 32) float32
    minimums: Tensor  # (out, in / 32) float32


class Int4Linear(QuantizedLinear):
    """A frozen linear layer with its weight in Blocks."""

    factors: Tensor
    packed: Tensor

    def __init__(self, packed: Tensor, factors: Tensor, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        num_blocks, self.out_features, _ = factors.shape
        self.in_features = num_blocks * BLOCK
        self.bits, self.bias = 4, bias
        self.register_buffer("packed", packed)  # the steps, in the kernel's order
        self.register_buffer("factors", factors)  # (in / 32, out, 2): scale and middle of a block

    @classmethod
    def from_blocks(cls, blocks: Blocks, bias: nn.Parameter | None = None) -> "Int4Linear":
        """The layer with these blocks."""
        steps, scales, minimums = blocks
        # The kernel's steps are from -8 to 7.
        factors = torch.stack((scales, minimums + 8 * scales), dim=-1).transpose(0, 1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)
        return cls(packed, factors.bfloat16().contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) from x (..., in_features)."""
        if not suits_kernel(x, INT4_ROWS_PER_COLUMN * self.in_features):
            return super().forward(x)
        y = self._multiply(x.reshape(-1, self.in_features)).to(x.dtype)
        return with_bias(y.view(*x.shape[:-1], self.out_features), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as `dtype`: the product with the identity, some rows at a time."""
        weight = torch.empty(self.in_features, self.out_features, dtype=dtype)
        for start in range(0, self.in_features, IDENTITY_ROWS):
            num_rows = min(IDENTITY_ROWS, self.in_features - start)
            identity = torch.zeros(num_rows, self.in_features, dtype=torch.bfloat16)
            identity[:, start : start + num_rows].fill_diagonal_(1)
            weight[start : start + num_rows] = self._multiply(identity)
        return weight.T

    def _multiply(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.bfloat16().contiguous(), self.packed, BLOCK, self.factors
        )


class Int4PairLinear(QuantizedLinear):
    """A frozen linear layer with 8 bits a weight in blocks: the sum of two Int4Linear.

    torch's product for 8 bits has a scale for a row, not for a block.
    """

    def __init__(self, high: Int4Linear, low: Int4Linear, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = high.out_features, high.in_features
        self.bits, self.bias = 8, bias
        self.high, self.low = high, low

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) from x (..., in_features)."""
        if not suits_kernel(x, INT4_ROWS_PER_COLUMN * self.in_features):
            return super().forward(x)
        return with_bias(self.high(x) + self.low(x), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as `dtype`."""
        return self.high.dequantized(dtype) + self.low.dequantized(dtype)


class StoredEmbedding(nn.Module):
    """An embedding whose rows stay in their file until they are needed.

    read_rows: the rows (T, D) of ids (T,).
    """

    def __init__(self, read_rows: Callable[[Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.read_rows, self.dtype = read_rows, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) from tokens (B, T)."""
        return self.read_rows(tokens.flatten()).to(self.dtype).view(*tokens.shape, -1)


def suits_kernel(x: Tensor, max_rows: int) -> bool:
    """True for x (..., in) of at most `max_rows` rows, without a gradient."""
    return 0 < x.numel() <= max_rows * x.shape[-1] and not torch.is_grad_enabled()


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., out) + bias (out,), if there is one."""
    return y if bias is None else y + bias
