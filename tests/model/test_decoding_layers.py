"""decoding_layers.py and layer_arguments.py: each fast way gives the numbers of the plain one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG

from minisft.checkpoints.folders import load_model
from minisft.model import decoding_layers
from minisft.model import packed_attention as packs
from minisft.model.attention import attend, causal_mask
from minisft.model.basic_layers import Embedding, Linear, RMSNorm
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.decoding_layers import (
    DecodingEmbedding,
    DecodingLinear,
    DecodingRMSNorm,
    linear,
    linear_by_onednn,
    rms_norm_by_product,
    use_decoding_layers,
)
from minisft.model.families import position_factors
from minisft.model.layer_arguments import attend_with_one_query, next_factors
from minisft.model.packed_attention import (
    attend_by_kernel,
    attend_by_row,
    packed_mask,
    varlen_kernel,
)

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    """The smallest that take the fast path have 2^18 weights, whatever this CPU is."""
    monkeypatch.setattr(decoding_layers, "MIN_WEIGHTS", 2**18)


def operations(function):
    """The names of the torch operations that function() calls."""
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}


@needs_onednn
@pytest.mark.parametrize("has_avx2_only", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (8, 1), (2, 40), (5, 40)])
def test_linear(rows, bias, has_avx2_only, monkeypatch):
    """Equal in value and layout; without gradients a few rows are fast, with AVX2 any number."""
    monkeypatch.setattr(decoding_layers, "HAS_AVX2_ONLY", has_avx2_only)
    torch.manual_seed(0)
    layer, x = DecodingLinear(Linear(512, 768, bias=bias)), torch.randn(*rows, 512)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        actual = linear_by_onednn(x, layer.weight, layer.bias)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.is_contiguous()
        is_fast = "mkldnn::_linear_pointwise" in operations(lambda: layer(x))
    assert is_fast == (has_avx2_only or rows[0] * rows[1] <= 64)
    assert "mkldnn::_linear_pointwise" not in operations(lambda: layer(x))  # with gradients
    monkeypatch.setattr(decoding_layers, "MIN_WEIGHTS", 512 * 768 + 1)
    with torch.no_grad():
        assert "mkldnn::_linear_pointwise" not in operations(lambda: layer(x))


@needs_onednn
@torch.inference_mode()
def test_onednn_takes_states_with_gaps():
    """As if only some positions of a batch were chosen, by a slice or transposed."""
    weight, x = torch.randn(768, 512), torch.randn(6, 40, 512)
    for states in (x[:, 3::2], x.transpose(0, 1), x[..., ::2].repeat(1, 1, 2)[:, -1]):
        actual = linear_by_onednn(states, weight, None)
        torch.testing.assert_close(actual, F.linear(states, weight), rtol=1e-5, atol=1e-4)


def test_linear_in_half_precision_and_autocast():
    layer, x = DecodingLinear(Linear(512, 768)), torch.randn(1, 512)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.float()(x.requires_grad_()).requires_grad


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 48)])
def test_rms_norm(shape, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    plain = RMSNorm(shape[-1], 1e-5)
    plain.weight = torch.nn.Parameter(weight)
    layer = DecodingRMSNorm(plain)
    expected = F.rms_norm(x, weight.shape, weight, 1e-5)
    torch.testing.assert_close(rms_norm_by_product(x, weight, 1e-5), expected)
    assert "aten::baddbmm" in operations(lambda: layer(x))
    for other in (x.expand(-1, 3, -1), x.half()):  # several positions, another type
        assert "aten::baddbmm" not in operations(lambda other=other: layer(other))
        assert layer(other).dtype == other.dtype


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_one_query(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.rand(2, 1, 1, 9) < 0.7 if masked else torch.ones(1, 9, dtype=torch.bool)
    expected = attend(q, k, v, mask)
    actual = attend_with_one_query(q, k, v, mask if masked else None)
    torch.testing.assert_close(actual, expected)


def test_factors_from_the_table_of_a_cache():
    """Rotary factors for any number of steps: the table grows, and earlier ones stay."""
    config = ModelConfig.from_dict(CONFIG)
    cache = KeyValueCache(config)
    for T in (5, 1, 1, 100, 1):
        positions = torch.arange(cache.length, cache.length + T)
        expected = position_factors(config, positions, torch.float32)
        torch.testing.assert_close(next_factors(config, torch.zeros(1, T, 32), cache), expected)
        cache.length += T
    torch.testing.assert_close(
        next_factors(config, torch.zeros(1, 3, 32), None),
        position_factors(config, torch.arange(3), torch.float32),
    )


def varlen_by_rows(q, k, v, bounds, bounds_k, longest, longest_k, window_size, enable_gqa):
    """varlen_attn as torch documents it: rows (T, heads, d) one after another, a left window."""
    assert enable_gqa and bounds.dtype == torch.int32 and longest == bounds.diff().max()
    rows = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        near = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            near = near.triu(-window_size[0])
        parts = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        rows.append(
            F.scaled_dot_product_attention(*parts, attn_mask=near, enable_gqa=True).transpose(0, 1)
        )
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 4])
def test_three_ways_through_a_pack(window, monkeypatch):
    """One mask over all rows, row by row, and by the kernel."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_rows)
    torch.manual_seed(0)
    lengths, device = [3, 9, 1, 5], torch.device("cpu")
    q, k, v = (torch.randn(1, heads, sum(lengths), 16) for heads in (4, 2, 2))
    expected = attend(q, k, v, packed_mask(lengths, window, device))
    masks = [causal_mask(length, length, device, window) for length in lengths]
    torch.testing.assert_close(attend_by_row(q, k, v, lengths, masks), expected)
    bounds = torch.tensor([0, 3, 12, 13, 18], dtype=torch.int32)
    actual = attend_by_kernel(q, k, v, varlen_kernel(), bounds, max(lengths), window)
    torch.testing.assert_close(actual, expected)

    for layers_are_compiled, has_kernel in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(packs, "has_kernel", lambda *_, there=has_kernel: there)
        chosen = packs.packed_attention(lengths, window, q, 16, layers_are_compiled)
        torch.testing.assert_close(chosen(q, k, v), expected)


@pytest.mark.parametrize(
    "head_dim, capability, there",
    [(128, (8, 0), True), (128, (9, 0), True), (128, (7, 5), False), (100, (9, 0), False)],
)
def test_what_the_kernel_for_packs_needs(head_dim, capability, there, monkeypatch):
    """FlashAttention: an Ampere GPU or newer, and heads whose width is a multiple of 8."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, dtype=torch.float16, device="cuda")
    assert packs.has_kernel(x, head_dim) == there


@torch.inference_mode()
def test_a_compiler_gets_the_plain_way():
    """Under a compiler, the plain path multiplies a weight that oneDNN would otherwise take."""
    x, weight = torch.randn(1, 256), torch.randn(1024, 256)
    compiled = torch.compile(linear, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, None), linear(x, weight, None))


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
def test_exchanged_layers(tied):
    """Every basic layer is exchanged, with its weights, and the model computes what it did."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8}
    config = CONFIG | sizes | {"vocab_size": 600, "tie_word_embeddings": tied, "head_dim": 64}
    model = CausalLM(ModelConfig.from_dict(config | {"attention_bias": True})).eval()
    model.initialize()
    model.model.norm.weight.normal_()
    tokens, names = torch.tensor([[5, 6, 7, 8]]), dict(model.named_parameters())
    expected = model.logits(model(tokens))
    use_decoding_layers(model)
    assert all(names[name] is value for name, value in model.named_parameters())
    assert not {Embedding, Linear, RMSNorm} & {type(module) for module in model.modules()}
    cache = KeyValueCache(model.config)
    found = [model.logits(model(token, cache=cache)) for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
    states = torch.randn(1, 512)
    assert "mkldnn::_linear_pointwise" in operations(lambda: model.logits(states))  # tied or not


def test_models_are_loaded_with_decoding_layers(checkpoint):
    kinds = {type(module) for module in load_model(checkpoint).modules()}
    assert {DecodingEmbedding, DecodingLinear, DecodingRMSNorm} <= kinds
    assert not {Embedding, Linear, RMSNorm} & kinds
