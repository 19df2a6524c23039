"""packed_weights.py and gguf_blocks.py: packed products equal those of the weights behind them."""

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG
from gguf import GGMLQuantizationType as Type
from gguf_models import FAMILIES, save
from torch import nn

from minisft.checkpoints import hub
from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.gguf_export import export_model
from minisft.common.devices import dtype_name
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.generation.sharing import share_weights
from minisft.gguf.unpack import BlockRows
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.decoding_layers import DecodingEmbedding, DecodingLinear
from minisft.model.lora import LoraConfig, LoRALinear, add_lora
from minisft.model.packed_weights import (
    Int4Linear,
    Int4PairLinear,
    Int8Linear,
    PackedLinear,
    StoredEmbedding,
    can_pack_weights,
    pack_weights,
)
from minisft.model.quantized import QuantizedLinear

TYPES = [dtype for dtype in (torch.bfloat16, torch.float32) if can_pack_weights(dtype, "cpu")]
needs_kernels = pytest.mark.skipif(not TYPES, reason="this processor has no kernels")
needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in TYPES, reason="this processor does not multiply bfloat16"
)
BOTH = torch.bfloat16, torch.float32  # the kernels for 8 and 4 bits take both everywhere
ROUNDING = 2**-8  # of bfloat16


def random_blocks(type, out_features, in_features):
    """(the layer of blocks, the weight that the gguf package reads from them)."""
    weight = np.random.default_rng(0).normal(0, 0.1, (out_features, in_features))
    data = gguf.quants.quantize(weight.astype(np.float32), type)
    blocks = BlockRows(type, (in_features,), None).blocks(torch.from_numpy(data.reshape(-1)))
    parts = [Int4Linear.from_blocks(part) for part in blocks]
    layer = parts[0] if len(parts) == 1 else Int4PairLinear(*parts)
    return layer, torch.from_numpy(gguf.quants.dequantize(data, type))


def check_product(layer, weight, bias, num_rows, dtype=torch.bfloat16):
    """The layer's product, for x of one and more dimensions, equals that of the weight."""
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, weight.shape[1]).to(dtype)
    with torch.inference_mode():
        found = layer(x)
        together = layer(x[None])
        wide = torch.randn(num_rows, 3, weight.shape[1]).to(dtype)
        wide[:, -1] = x
        last = layer(wide[:, -1])  # as the states of a batch's last tokens: not contiguous
    assert found.dtype == dtype and found.shape == (num_rows, len(weight))
    assert torch.equal(together[0], found) and torch.equal(last, found)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    largest = (x.float().abs() @ weight.float().abs().T).amax() if num_rows else 0
    assert ((found.float() - expected).abs() <= ROUNDING * largest).all()
    # A sum of 96 products is known to a few roundings of itself.
    if num_rows:
        assert (found.float() - expected).norm() <= 2 * ROUNDING * expected.norm()


@needs_kernels
@pytest.mark.parametrize("num_rows", [0, 1, 8, 200])
@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda type: type.name)
@pytest.mark.parametrize("dtype", BOTH)
def test_blocks_are_multiplied_as_the_gguf_package_reads_them(dtype, type, num_rows):
    layer, weight = random_blocks(type, 48, 96)
    check_product(layer, weight, None, num_rows, dtype)
    layer.bias = nn.Parameter(torch.randn(48).to(dtype))
    check_product(layer, weight, layer.bias, num_rows, dtype)
    torch.testing.assert_close(layer.weight, weight, rtol=ROUNDING, atol=2 * ROUNDING * 0.1)


@needs_kernels
@pytest.mark.parametrize("num_rows", [0, 1, 8, 200])
@pytest.mark.parametrize("dtype", BOTH)
def test_rows_of_8_bits_are_multiplied(dtype, num_rows):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).to(dtype)
    layer = Int8Linear(QuantizedLinear.from_weight(linear.weight, 8, linear.bias))
    check_product(layer, layer.weight, linear.bias, num_rows, dtype)


@needs_kernels
def test_rows_that_the_kernel_would_leave_are_not_packed():
    """Of 172 numbers, as in stories260K, it reads 176: the result is random, or a crash."""
    model = nn.Sequential()
    for in_features in (172, 192):
        linear = nn.Linear(in_features, 40)
        model.append(QuantizedLinear.from_weight(linear.weight, 8, linear.bias))
    pack_weights(model)
    assert [type(module) for module in model] == [QuantizedLinear, Int8Linear]
    check_product(model[0], model[0].weight, model[0].bias, num_rows=3, dtype=torch.float32)


@needs_bfloat16
@pytest.mark.parametrize("num_rows", [0, 1, 8, 200])
def test_bfloat16_is_multiplied(num_rows):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).bfloat16()
    layer = PackedLinear(linear)
    assert torch.equal(layer.weight, linear.weight.float())
    check_product(layer, layer.weight, linear.bias, num_rows)


@needs_kernels
def test_gradients_flow_through_packed_layers():
    layer, weight = random_blocks(Type.Q4_0, 48, 96)
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=0.02, atol=0.02)


@needs_kernels
@pytest.mark.parametrize("quantization", ["q4_0", "q4_1", "q8_0", "q4_k_m"])
@pytest.mark.parametrize(
    "family", ["llama", "llama, tied, llama3 rotation", "qwen2", "baichuan2, 7B"]
)
def test_a_gguf_file_is_used_in_its_blocks(
    family, quantization, tiny_chat_model_dir, tmp_path, monkeypatch
):
    """In blocks and dequantised, a model has the same logits within the rounding of bfloat16."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 128}
    content = FAMILIES[family] | sizes
    save(folder, hub.resolve(str(tiny_chat_model_dir)), content)
    export_model(folder, tmp_path / "model.gguf", quantization)
    unpacked_folder = hub.resolve(str(tmp_path / "model.gguf"))
    plain, dtype = load_model(unpacked_folder, torch.float32), TYPES[0]
    blocks = load_model(unpacked_folder, dtype, keep_blocks=True)
    pack_weights(blocks)
    kinds = {type(module) for module in blocks.modules()}
    expected = {"q4_0": Int4Linear, "q4_1": Int4Linear, "q8_0": Int4PairLinear}
    other = PackedLinear if dtype == torch.bfloat16 else DecodingLinear
    assert {StoredEmbedding, expected.get(quantization, other)} <= kinds
    unpacked = {nn.Embedding, DecodingEmbedding, nn.Linear, DecodingLinear}
    assert not kinds & (unpacked - {other})
    tokens = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (
            torch.log_softmax(model.logits(model(tokens)).float(), -1) for model in (plain, blocks)
        )
    assert (found - expected).abs().mean() < 0.05 * expected.std()


@needs_bfloat16
def test_models_that_share_weights_share_the_packed_ones():
    torch.manual_seed(0)
    base = CausalLM(ModelConfig.from_dict(CONFIG)).bfloat16().eval()
    base.requires_grad_(False)
    adapted = share_weights(base)
    add_lora(adapted, LoraConfig(rank=2, alpha=4))
    tokens = torch.randint(3, 128, (1, 9))
    with torch.inference_mode():
        before = [model.logits(model(tokens)) for model in (base, adapted)]
        pack_weights(base, adapted)
        after = [model.logits(model(tokens)) for model in (base, adapted)]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
    layer = adapted.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoRALinear) and type(layer.lora_A) is nn.Linear
    assert layer.base_layer is base.model.layers[0].self_attn.q_proj
    assert not any(isinstance(module, nn.Linear) for module in base.modules())


@needs_bfloat16
def test_an_adapter_fits_a_packed_base(tmp_path):
    torch.manual_seed(0)
    base = CausalLM(ModelConfig.from_dict(CONFIG)).eval()
    trained = share_weights(base)
    config = LoraConfig(rank=2, alpha=4)
    add_lora(trained, config)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    save_adapter(trained, tmp_path / "adapter", config, "base")
    packed = share_weights(base).bfloat16()
    pack_weights(packed)
    load_adapter(packed, tmp_path / "adapter")
    tokens = torch.randint(3, 128, (1, 9))
    with torch.inference_mode():
        expected = trained.eval().logits(trained(tokens))
        found = packed.eval().logits(packed(tokens)).float()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@needs_bfloat16
def test_an_assistant_packs_unless_it_compiles(tiny_chat_model_dir):
    question = [{"role": "user", "content": "Hello there!"}]
    answers = []
    for pack in (True, False):
        assistant = Assistant(tiny_chat_model_dir, dtype="bfloat16", pack=pack)
        is_packed = any(type(module) is PackedLinear for module in assistant.model.modules())
        assert is_packed == pack
        answers.append(list(assistant.stream(question, Sampling(greedy=True, max_new_tokens=4))))
        if pack:
            with pytest.raises(UserError, match="compiles=True"):
                assistant.compile()
    assert len(answers[0]) == len(answers[1])
    in_float32 = Assistant(tiny_chat_model_dir, dtype="float32")
    assert not any(type(module) is PackedLinear for module in in_float32.model.modules())


@needs_kernels
@pytest.mark.parametrize("num_bits", [8, "q4_0"])
def test_an_assistant_multiplies_few_bits_as_they_are(num_bits, tiny_chat_model_dir, tmp_path):
    """In 8 bits and in the blocks of a file, with the CPU's own type, on every CPU with kernels."""
    path, bits = str(tiny_chat_model_dir), None
    if num_bits == 8:
        bits = 8
    else:
        path = str(tmp_path / "model.gguf")
        export_model(hub.resolve(str(tiny_chat_model_dir)), tmp_path / "model.gguf", num_bits)
    dtype = dtype_name(TYPES[0])
    assistants = [
        Assistant(path, dtype=dtype, quantization_bit=bits, pack=pack) for pack in (True, False)
    ]
    packed, plain = (assistant.model for assistant in assistants)
    kinds = [{type(module) for module in model.modules()} for model in (packed, plain)]
    assert (Int8Linear if bits else Int4Linear) in kinds[0]
    assert not kinds[1] & {PackedLinear, Int8Linear, Int4Linear}
    tokens = torch.randint(3, 100, (1, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = (
            torch.log_softmax(model.logits(model(tokens)).float(), -1) for model in (packed, plain)
        )
    assert not torch.equal(found, expected)  # by another kernel
    assert (found - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_float32_stays_exact_where_bfloat16_is_multiplied(has_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
    assert can_pack_weights(torch.bfloat16, "cpu") == has_bfloat16
    assert can_pack_weights(torch.float32, "cpu") != has_bfloat16
    assert not can_pack_weights(torch.float16, "cpu")
    assert not can_pack_weights(torch.float32, "cuda")


@pytest.mark.parametrize("instructions", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_avx512_without_bfloat16_packs_few_bits_in_float32(instructions, monkeypatch):
    """Skylake to Ice Lake: oneDNN emulates bfloat16 there, so --dtype auto is float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert can_pack_weights(torch.bfloat16, "cpu")
    assert can_pack_weights(torch.float32, "cpu") == (not instructions)
