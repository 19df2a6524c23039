"""Frozen linear layers in 4 or 8 bits: the base of QLoRA (arXiv 2305.14314).

    layer = QuantizedLinear.from_weight(linear.weight, bits=4)   # an eighth of the bytes in float32
    y = layer(x)

4 bits (NF4): each block of 64 weights is divided by its largest absolute value, and every weight
becomes the nearest of 16 levels, the quantiles of a normal distribution. The largest values are
quantised as well, to 8 bits ("double quantisation").

8 bits: each row is divided by its largest absolute value and rounded to 255 steps.

Only the quantised weight is kept. Every multiplication, forward and backward, dequantises it again.

The tour explains it: docs/tour/07_lora.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
PIECE = BLOCK_SIZE * 2**16  # weights that are in float32 at a time
# From the paper: 8 quantiles below zero, zero, and 7 above, divided by the largest.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dynamic_levels(signed: bool = True) -> Tensor:
    """(256,) float32, ascending: 8-bit numbers with a moving exponent (arXiv 2110.02861).

    They are 0, 1, and values around every power of ten from 1e-6 to 1, twice as many around each
    power as around the one below. Without a sign there are twice as many positive ones.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent * (1 if signed else 2) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [*middles.tolist(), *((-middles).tolist() if signed else [])]
    return torch.tensor(sorted(levels))


def nf4_pairs() -> Tensor:
    """(256, 2) float32: the two levels that each byte of `packed` stands for."""
    levels = torch.tensor(NF4_LEVELS)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The index (uint8) of the level nearest to each value; the lower level at a tie."""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """(n,) -> (blocks, block_size); the last block is filled up with zeros."""
    missing = -len(values) % block_size
    padded = F.pad(values, (0, missing)) if missing else values  # F.pad would copy them
    return padded.view(-1, block_size)


def scale_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> blocks (blocks, block_size) from -1 to 1, the largest of each (blocks,)."""
    blocks = in_blocks(values, block_size)
    largest = blocks.abs().amax(1)
    return blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None], largest


def quantize_blocks(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> indices of levels (n,) uint8, and the largest of each block (blocks,)."""
    scaled, largest = scale_blocks(values, block_size)
    return nearest(scaled, levels).view(-1)[: len(values)], largest


def dequantize_blocks(indices: Tensor, largest: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """The values (n,) in float32 from the result of quantize_blocks."""
    values = in_blocks(levels.index_select(0, indices.int()), block_size) * largest[:, None]
    return values.view(-1)[: len(indices)]


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight of any shape -> (packed, scales, nested_scales, mean), for dequantize_nf4.

    packed: uint8, two indices of levels in a byte, the first in the high half.
    scales: uint8, the largest value of each block minus the mean, as an index of dynamic_levels.
    nested_scales: float32, the scale of 256 scales. mean: float32, of the blocks' largest values.
    """
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    all_indices, all_largest = [], []
    for piece in weight.detach().flatten().split(PIECE):
        indices, largest = quantize_blocks(piece.float(), levels, BLOCK_SIZE)
        all_indices.append(indices)
        all_largest.append(largest)
    indices, largest = torch.cat(all_indices), torch.cat(all_largest)
    indices = F.pad(indices, (0, len(indices) % 2), value=NF4_LEVELS.index(0.0))
    mean = largest.mean()
    scales, nested_scales = quantize_blocks(
        largest - mean, dynamic_levels().to(weight.device), NESTED_BLOCK_SIZE
    )
    return indices[::2] * 16 + indices[1::2], scales, nested_scales, mean


def dequantize_nf4(
    packed: Tensor,
    scales: Tensor,
    nested_scales: Tensor,
    mean: Tensor,
    pairs: Tensor,
    scale_levels: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, with this shape and type, from the result of quantize_nf4.

    pairs, scale_levels: nf4_pairs() and dynamic_levels(), on the device of the others.
    """
    largest = mean + dequantize_blocks(scales, nested_scales, scale_levels, NESTED_BLOCK_SIZE)
    weight = torch.empty(shape.numel(), dtype=dtype, device=packed.device)
    pieces = zip(
        weight.split(PIECE),
        packed.split(PIECE // 2),
        largest.split(PIECE // BLOCK_SIZE),
        strict=True,
    )
    for piece, piece_bytes, piece_largest in pieces:  # float32 for one piece at a time
        values = in_blocks(pairs[piece_bytes.int()].view(-1)[: len(piece)], BLOCK_SIZE)
        piece.copy_((values * piece_largest[:, None]).view(-1)[: len(piece)])
    return weight.view(shape)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) -> int8 (out, in), and the largest value of each row (out,) float32."""
    weight = weight.detach().float()
    largest = weight.abs().amax(1)
    steps = weight * (127.0 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    return steps.round().to(torch.int8), largest


def dequantize_rows(steps: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) from the result of quantize_rows."""
    return steps.float().mul_((largest / 127.0)[:, None]).to(dtype)


class QuantizedMatmul(torch.autograd.Function):
    """x W^T + b with a quantised W, which is dequantised again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        """(..., out) from x (..., in)."""
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x; W is frozen."""
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen nn.Linear with its weight (out, in) in 4 or 8 bits."""

    steps: Tensor  # 8 bits: the result of quantize_rows
    largest: Tensor
    packed: Tensor  # 4 bits: the result of quantize_nf4
    scales: Tensor
    nested_scales: Tensor
    mean: Tensor
    pairs: Tensor  # the tables of dequantize_nf4, kept because copies to a GPU would make it wait
    scale_levels: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, bias: nn.Parameter | None = None
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.bias = bias
        if bits == 8:
            buffers = {
                "steps": torch.empty(out_features, in_features, dtype=torch.int8),
                "largest": torch.empty(out_features),
            }
        else:
            num_weights = in_features * out_features
            num_blocks = -(-num_weights // BLOCK_SIZE)
            buffers = {
                "packed": torch.empty(-(-num_weights // 2), dtype=torch.uint8),
                "scales": torch.empty(num_blocks, dtype=torch.uint8),
                "nested_scales": torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE)),
                "mean": torch.empty(()),
                "pairs": torch.empty(256, 2),
                "scale_levels": torch.empty(256),
            }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bits: int, bias: nn.Parameter | None = None
    ) -> "QuantizedLinear":
        """Quantise a weight (out, in) of any floating-point type, on its device."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, bits, bias)
        if bits == 8:
            buffers: tuple[Tensor, ...] = quantize_rows(weight)
        else:
            tables = (table.to(weight.device) for table in (nf4_pairs(), dynamic_levels()))
            buffers = (*quantize_nf4(weight), *tables)
        for name, buffer in zip(dict(layer.named_buffers()), buffers, strict=True):
            setattr(layer, name, buffer)
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight in float32, dequantised at every access."""
        return self.dequantized(torch.float32)

    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer with the dequantised weight, in float32 unless `dtype` is given."""
        return plain_linear(self.dequantized(dtype or torch.float32), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as `dtype`."""
        if self.bits == 8:
            return dequantize_rows(self.steps, self.largest, dtype)
        return dequantize_nf4(
            self.packed,
            self.scales,
            self.nested_scales,
            self.mean,
            self.pairs,
            self.scale_levels,
            torch.Size((self.out_features, self.in_features)),
            dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) from x (..., in), multiplied in the type of x, or that of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return QuantizedMatmul.apply(x, self)


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A frozen nn.Linear with this weight (out, in), which is not copied."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear
