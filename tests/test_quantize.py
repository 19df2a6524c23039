"""quantize.py against bitsandbytes: the same bytes, the same numbers, the same gradients."""

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional

from minisft.quantize import (
    NF4_LEVELS,
    QuantizedLinear,
    dequantize_nf4,
    dequantize_rows,
    dynamic_levels,
    in_blocks,
    quantize_nf4,
    quantize_rows,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 128), (256, 2048), (7, 96), (100, 64), (9, 15)]


def weight_of(shape, dtype):
    torch.manual_seed(shape[0])
    return (torch.randn(shape) * 0.02).to(dtype)


def test_levels_are_the_published_ones():
    assert torch.equal(torch.tensor(NF4_LEVELS), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_and_values_equal_bitsandbytes(shape, dtype):
    weight = weight_of(shape, dtype)
    packed, scales, nested_scales, mean = quantize_nf4(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4",
                                             compress_statistics=True)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(nested_scales, state.state2.absmax) and mean == state.offset
    their_scales = state.absmax.flatten()
    # With their scales the values are theirs bit for bit.
    values = dequantize_nf4(packed, their_scales, nested_scales, mean, weight.shape, dtype)
    assert torch.equal(values, functional.dequantize_4bit(theirs, state))
    # A scale differs only where two levels are as near to the step of their look-up table, which
    # has 2**16 entries between -1 and 1.
    largest = in_blocks(weight.float().flatten(), 64).abs().amax(1) - mean
    scaled = largest / nested_scales.repeat_interleave(256)[: len(largest)]
    levels = dynamic_levels()
    ours, others = ((levels[one.int()] - scaled).abs() for one in (scales, their_scales))
    assert (ours <= others).all() and (others - ours).max() < 2**-15
    assert (scales != their_scales).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_bitsandbytes(dtype):
    weight = weight_of((64, 128), dtype)
    steps, largest = quantize_rows(weight)
    their_steps, their_largest, _ = functional.int8_vectorwise_quant(weight.half())
    if dtype == torch.float16:  # the type that theirs is made for
        assert torch.equal(steps, their_steps)
        torch.testing.assert_close(largest, their_largest.float())
    error = (dequantize_rows(steps, largest, torch.float32) - weight.float()).abs()
    assert (error <= largest[:, None] / 127 * 0.501).all()


def test_layer_equals_linear4bit():
    weight, bias = weight_of((48, 128), torch.float32), torch.randn(48)
    theirs = bitsandbytes.nn.Linear4bit(128, 48, compute_dtype=torch.float32, quant_type="nf4",
                                        compress_statistics=True)
    theirs.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False,
                                               quant_type="nf4", compress_statistics=True)
    theirs.bias.data = bias.clone()
    theirs = theirs.to("cpu")
    ours = QuantizedLinear.from_weight(weight, 4, bias)
    results = []
    for layer in (ours, theirs):
        x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        (y * torch.arange(48)).sum().backward()
        results.append((y, x.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_packed_weight_is_kept_for_the_way_back(bits):
    layer = QuantizedLinear.from_weight(weight_of((64, 128), torch.float32), bits)
    x = torch.randn(3, 128, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert not kept
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 128))


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_a_state_dict(bits):
    layer = QuantizedLinear.from_weight(torch.zeros(4, 70), bits)
    assert torch.equal(layer.weight, torch.zeros(4, 70))
    other = QuantizedLinear(70, 4, bits)
    filled = QuantizedLinear.from_weight(weight_of((4, 70), torch.float32), bits)
    other.load_state_dict(filled.state_dict())
    assert torch.equal(other.weight, filled.weight)
