"""joined_layers.py: one product for q, k and v, and one for gate and up, change no number."""

from weakref import ref

import pytest
import torch
from conftest import CONFIG
from gguf_models import FAMILIES, save

from minisft.checkpoints import hub
from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.generation.assistant import Assistant
from minisft.generation.sharing import share_weights
from minisft.model import joined_layers
from minisft.model.attention import Attention
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import MLP, CausalLM
from minisft.model.joined_layers import (
    JoinedAttention,
    JoinedMLP,
    has_joined_layers,
    join,
    join_layers,
)
from minisft.model.lora import LoraConfig, add_lora, merge_lora
from minisft.model.packed_weights import can_pack_weights, pack_weights

needs_kernels = pytest.mark.skipif(
    not can_pack_weights(torch.bfloat16, "cpu"), reason="this processor does not multiply bfloat16"
)


def kinds_of(model):
    """The types of a model's modules."""
    return {type(module) for module in model.modules()}


def all_logits(model):
    """Logits of two rows: of a prompt, of a few tokens behind it, and of single tokens."""
    tokens = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(0))
    cache, found = KeyValueCache(model.config), []
    with torch.inference_mode():
        for piece in tokens.split([9, 4, 1, 1, 1], dim=1):
            found.append(model.logits(model(piece, cache=cache)).float())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "qwen2"},  # biases of q, k and v
        {"attention_bias": True, "mlp_bias": True},
        {"no_rope_layers": [1, 0], "num_hidden_layers": 2, "model_type": "smollm3"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_logits_stay(changes):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    before = all_logits(model)
    join_layers(model)
    assert {JoinedAttention, JoinedMLP} <= kinds_of(model) and has_joined_layers(model)
    torch.testing.assert_close(all_logits(model), before, rtol=1e-5, atol=1e-6)


def test_norms_of_queries_and_keys_and_lora_keep_layers_apart():
    torch.manual_seed(0)
    config = ModelConfig.from_dict(CONFIG | {"model_type": "qwen3"})
    model = CausalLM(config).eval().requires_grad_(False)
    before = all_logits(model)
    join_layers(model)
    assert JoinedMLP in kinds_of(model) and JoinedAttention not in kinds_of(model)
    torch.testing.assert_close(all_logits(model), before, rtol=1e-5, atol=1e-6)
    model = CausalLM(ModelConfig.from_dict(CONFIG)).eval().requires_grad_(False)
    add_lora(model, LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "v_proj")))
    join_layers(model)
    assert JoinedMLP in kinds_of(model) and JoinedAttention not in kinds_of(model)


@needs_kernels
@pytest.mark.parametrize("form", ["bfloat16", "8 bits", "q4_0", "q4_1", "q8_0"])
def test_packed_forms(form, tiny_chat_model_dir, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"vocab_size": 304, "hidden_size": 256, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    save(folder, hub.resolve(str(tiny_chat_model_dir)), FAMILIES["qwen2"] | sizes)
    source, settings = folder, {"quantization_bit": 8 if form == "8 bits" else None}
    if form.startswith("q"):
        export_model(folder, tmp_path / "model.gguf", form)
        source, settings = hub.resolve(str(tmp_path / "model.gguf")), {"keep_blocks": True}
    apart, joined = (load_model(source, torch.bfloat16, **settings) for _ in range(2))
    join_layers(joined)
    assert {JoinedAttention, JoinedMLP} <= kinds_of(joined)
    for model in (apart, joined):
        pack_weights(model)
    expected = all_logits(apart)
    # Kernels may choose other pieces of a larger matrix, and so round in another order.
    torch.testing.assert_close(all_logits(joined), expected, rtol=0.02, atol=0.02 * expected.std())


@needs_kernels
def test_blocks_that_do_not_fill_the_kernels_pieces_stay_apart(tiny_chat_model_dir, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"vocab_size": 304, "intermediate_size": 96}
    save(folder, hub.resolve(str(tiny_chat_model_dir)), FAMILIES["llama"] | sizes)
    export_model(folder, tmp_path / "model.gguf", "q4_0")
    source = hub.resolve(str(tmp_path / "model.gguf"))
    model = load_model(source, torch.bfloat16, keep_blocks=True)
    expected = all_logits(model)
    join_layers(model)
    assert JoinedMLP not in kinds_of(model)
    assert torch.equal(all_logits(model), expected)


@needs_kernels
def test_a_joined_model_takes_no_adapter(tiny_chat_model_dir, tmp_path):
    base = load_model(hub.resolve(str(tiny_chat_model_dir)), torch.float32)
    config = LoraConfig(rank=2, alpha=4)
    trained = share_weights(base)
    add_lora(trained, config)
    save_adapter(trained, tmp_path / "adapter", config, str(tiny_chat_model_dir))
    packed = Assistant(tiny_chat_model_dir, dtype="bfloat16")
    assert has_joined_layers(packed.model)
    arguments = {"adapter": tmp_path / "adapter", "dtype": "bfloat16"}
    with pytest.raises(UserError, match="pack=False"):
        Assistant(tiny_chat_model_dir, base_model=packed.model, **arguments)
    plain = Assistant(tiny_chat_model_dir, dtype="bfloat16", pack=False)
    shared = Assistant(tiny_chat_model_dir, base_model=plain.model, **arguments)
    load_adapter(share_weights(plain.model), tmp_path / "adapter")
    assert not has_joined_layers(shared.model)


def test_a_merged_model_is_joined():
    """merge_lora leaves nn.Linear beside Linear, and both have plain weights."""
    model = CausalLM(ModelConfig.from_dict(CONFIG)).eval().requires_grad_(False)
    add_lora(model, LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "v_proj", "up_proj")))
    merge_lora(model)
    before = all_logits(model)
    join_layers(model)
    assert not {Attention, MLP} & kinds_of(model)
    torch.testing.assert_close(all_logits(model), before, rtol=1e-5, atol=1e-6)


def test_joining_frees_layer_after_layer(monkeypatch):
    """While two are joined, all that came before have left the memory."""
    model, num_alive = CausalLM(ModelConfig.from_dict(CONFIG)).requires_grad_(False), []
    old = [ref(module) for module in model.modules() if type(module) in (Attention, MLP)]

    def counting_join(layers):
        num_alive.append(sum(module() is not None for module in old))
        return join(layers)

    monkeypatch.setattr(joined_layers, "join", counting_join)
    join_layers(model)
    assert num_alive == list(range(len(old), 0, -1)) and len(old) > 2
