"""Frozen 4-bit and 8-bit linear layers: the base of QLoRA (arXiv 2305.14314).

    layer = QuantizedLinear.from_weight(linear.weight, bits=4)   # an eighth of float32's bytes
    y = layer(x)                                                 # as the dequantised weight gives

4 bits: NF4. Blocks of 64 weights are divided by their largest, and each becomes the nearest of 16
levels, the quantiles of a normal distribution. The blocks' largest are themselves held in 8 bits
("double quantisation"). 8 bits: every row is divided by its largest and rounded to one of 255
steps. The weight is dequantised for every multiplication, forward and backward, and thrown away:
what is kept is the packed one.
"""

import torch
import torch.nn.functional as F
from torch import nn

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
PIECE = BLOCK_SIZE * 2**16  # weights that are worked on at a time, in float32
# As published with the paper: 8 quantiles below zero, zero, 7 above, divided by the largest.
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


def dynamic_levels():
    """(256,) float32 in rising order: 8-bit numbers with a moving exponent (arXiv 2110.02861).

    Zero, one, and for each power of ten from 1e-6 to 1 twice as many steps as for the one below.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        steps = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [*steps.tolist(), *(-steps).tolist()]
    return torch.tensor(sorted(levels))


def nearest(values, levels):
    """Index (uint8) of the level next to each value; in the middle the lower one."""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


def in_blocks(values, block_size):
    """(n,) -> (blocks, block_size), the last block filled up with zeros."""
    return F.pad(values, (0, -len(values) % block_size)).view(-1, block_size)


def quantize_blocks(values, levels, block_size):
    """(n,) float32 -> indices (n,) uint8 of the levels, and each block's largest (blocks,)."""
    blocks = in_blocks(values, block_size)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return nearest(scaled, levels).view(-1)[: len(values)], largest


def dequantize_blocks(indices, largest, levels, block_size):
    """What quantize_blocks has kept of the values: (n,) float32."""
    values = in_blocks(levels[indices.int()], block_size) * largest[:, None]
    return values.view(-1)[: len(indices)]


def quantize_nf4(weight):
    """Weight of any shape -> the four tensors that dequantize_nf4 takes.

    packed: uint8, two indices a byte, the first in the high half. scales: uint8, one a block, in
    dynamic levels. nested_scales: float32, one for 256 of those. mean: float32, of the blocks'
    largest, which is taken off before they are quantised.
    """
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    pieces = weight.detach().flatten().split(PIECE)
    indices, largest = map(
        torch.cat,
        zip(*(quantize_blocks(piece.float(), levels, BLOCK_SIZE) for piece in pieces), strict=True),
    )
    indices = F.pad(indices, (0, len(indices) % 2), value=NF4_LEVELS.index(0.0))
    mean = largest.mean()
    scales, nested_scales = quantize_blocks(
        largest - mean, dynamic_levels().to(weight.device), NESTED_BLOCK_SIZE
    )
    return indices[::2] * 16 + indices[1::2], scales, nested_scales, mean


def dequantize_nf4(packed, scales, nested_scales, mean, shape, dtype):
    """The weight (`shape`, `dtype`) that quantize_nf4 has packed."""
    levels = torch.tensor(NF4_LEVELS, device=packed.device)
    # Both halves of a byte in one look-up: 256 pairs of levels.
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
    largest = mean + dequantize_blocks(
        scales, nested_scales, dynamic_levels().to(packed.device), NESTED_BLOCK_SIZE
    )
    weight = torch.empty(shape.numel(), dtype=dtype, device=packed.device)
    pieces = zip(
        weight.split(PIECE),
        packed.split(PIECE // 2),
        largest.split(PIECE // BLOCK_SIZE),
        strict=True,
    )
    for piece, codes, most in pieces:  # float32 is there for a piece only
        values = in_blocks(pairs[codes.int()].view(-1)[: len(piece)], BLOCK_SIZE)
        piece.copy_((values * most[:, None]).view(-1)[: len(piece)])
    return weight.view(shape)


def quantize_rows(weight):
    """Weight (out, in) -> int8 (out, in) and each row's largest (out,) float32."""
    wide = weight.detach().float()
    largest = wide.abs().amax(1)
    steps = wide * (127.0 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    return steps.round().to(torch.int8), largest


def dequantize_rows(steps, largest, dtype):
    """The weight (out, in) that quantize_rows has kept."""
    return steps.float().mul_((largest / 127.0)[:, None]).to(dtype)


def count_parameters(model):
    """How many numbers a model consists of, those that are held in 4 or 8 bits included."""
    quantized = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    return quantized + sum(parameter.numel() for parameter in model.parameters())


def plain_linear(weight, bias):
    """A frozen nn.Linear that holds this weight (out, in), not a copy of it."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


class Multiply(torch.autograd.Function):
    """x @ weight.T with a weight that is made for the moment and made again to go backward."""

    @staticmethod
    def forward(context, x, layer):
        """(..., out) of x (..., in)."""
        context.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    def backward(context, gradient):
        """The gradient of x; the weight is frozen."""
        return gradient @ context.layer.dequantized(gradient.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen nn.Linear whose weight (out, in) is held in 4 or 8 bits."""

    def __init__(self, in_features, out_features, bits, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.bias = bias
        count = in_features * out_features
        if bits == 8:
            shapes = {
                "steps": (torch.int8, out_features, in_features),
                "largest": (torch.float32, out_features),
            }
        else:
            blocks = -(-count // BLOCK_SIZE)
            shapes = {
                "packed": (torch.uint8, -(-count // 2)),
                "scales": (torch.uint8, blocks),
                "nested_scales": (torch.float32, -(-blocks // NESTED_BLOCK_SIZE)),
                "mean": (torch.float32,),
            }
        for name, (dtype, *shape) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @classmethod
    def from_weight(cls, weight, bits, bias=None):
        """Quantise a weight (out, in) of any floating-point type, on its device."""
        layer = cls(*reversed(weight.shape), bits, bias)
        parts = quantize_rows(weight) if bits == 8 else quantize_nf4(weight)
        for name, part in zip([name for name, _ in layer.named_buffers()], parts, strict=True):
            setattr(layer, name, part)
        return layer

    @property
    def weight(self):
        """The weight in float32, made anew: what merging adds to, and what says the device."""
        return self.dequantized(torch.float32)

    def merged(self, dtype=None):
        """A plain nn.Linear with the dequantised weight, in float32 unless `dtype` is given."""
        return plain_linear(self.dequantized(dtype or torch.float32), self.bias)

    def dequantized(self, dtype):
        """The weight (out, in) in `dtype`, made anew."""
        if self.bits == 8:
            return dequantize_rows(self.steps, self.largest, dtype)
        shape = torch.Size((self.out_features, self.in_features))
        return dequantize_nf4(self.packed, self.scales, self.nested_scales, self.mean, shape, dtype)

    def forward(self, x):
        """(..., out) of x (..., in), multiplied in the type of x (under autocast, in its type)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return Multiply.apply(x, self)
