"""Baichuan2 against the published code and transformers' Llama, in every way to compute it."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from baichuan import SIZES, SMALL, as_llama, published_code, published_model, write_checkpoint
from transformers import AutoModelForSequenceClassification

from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.folders import load_model, save_model
from minisft.checkpoints.reward_models import load_reward_model
from minisft.common.errors import UserError
from minisft.generation.compiled import next_logits
from minisft.generation.generate import generate
from minisft.generation.sampling import Sampling
from minisft.model import layer_arguments
from minisft.model.alibi import alibi_factors, alibi_slopes
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.families import position_factors
from minisft.model.lora import LoraConfig, LoRALinear, add_lora, merge_lora
from minisft.model.loss import next_token_loss
from minisft.model.quantized import QuantizedLinear
from minisft.training.lora_options import check_targets


@pytest.fixture(params=SIZES)
def folder(request, tmp_path):
    return write_checkpoint(tmp_path / request.param, request.param)


def random_tokens(*shape, seed=1):
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def oracle(folder, shared_data):
    if folder.name == "7B":
        return as_llama(folder)
    return published_model(shared_data / "baichuan2", folder)


def logits(model, tokens, **arguments):
    return model.logits(model(tokens, **arguments))


@torch.no_grad()
def test_logits_equal_the_oracle(folder, shared_data):
    theirs, ours = oracle(folder, shared_data), load_model(folder)
    for length, tolerance in ((24, 1e-5), (400, 5e-5), (700, 1e-4)):  # beyond the context, too
        expected = theirs(random_tokens(2, length)).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(
            logits(ours, random_tokens(2, length)), expected, rtol=0, atol=tolerance
        )


@torch.no_grad()
@pytest.mark.parametrize("part", ["head", "slopes"])
def test_the_comparison_can_fail(part, shared_data, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "13B", "13B")
    theirs, ours = oracle(folder, shared_data), load_model(folder)
    if part == "head":
        ours.lm_head = torch.nn.Linear(48, 128, bias=False).requires_grad_(False)
        ours.lm_head.weight = load_model(folder).lm_head.weight
    else:
        queries, keys = alibi_factors(ours.config, torch.arange(24), torch.float32)
        factors = queries.flip(1), keys
        monkeypatch.setattr(layer_arguments, "position_factors", lambda *_: factors)
    tokens = random_tokens(1, 24)
    assert (logits(ours, tokens) - theirs(tokens).logits).abs().max() > 0.1


def test_gradients_equal_the_published_code(shared_data, tmp_path):
    """In training the published code normalises the head in the graph, and so do we."""
    folder = write_checkpoint(tmp_path / "13B", "13B")
    theirs, ours = oracle(folder, shared_data).train(), load_model(folder).train()
    ours.requires_grad_(True)
    tokens = random_tokens(2, 40)
    theirs(tokens, labels=tokens).loss.backward()
    loss, count = next_token_loss(ours, tokens, torch.ones_like(tokens, dtype=torch.bool))
    (loss / count).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
    # A longer row does not change the scores, so the gradient is at right angles to every row.
    head = ours.lm_head.weight
    assert (head.grad * head).sum(1).abs().max() < 1e-6 < head.grad.abs().max()


@torch.no_grad()
def test_rotary_positions_far_away(tmp_path):
    folder = write_checkpoint(tmp_path / "7B", "7B")
    tokens, positions = random_tokens(1, 24), torch.arange(5000, 5024)[None]
    expected = as_llama(folder)(tokens, position_ids=positions).logits
    actual = logits(load_model(folder), tokens, positions=positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_published_config(shared_data, tmp_path):
    """With two narrow layers."""
    content = json.loads((shared_data / "configs/Baichuan2-7B-Chat/config.json").read_text())
    narrow = dict.fromkeys(("hidden_size", "intermediate_size"), 64) | {"vocab_size": 128}
    content |= {**narrow, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder, tokens = write_checkpoint(tmp_path / "7B", "7B", **content), random_tokens(1, 24)
    expected = as_llama(folder)(tokens).logits
    torch.testing.assert_close(logits(load_model(folder), tokens), expected, rtol=0, atol=1e-5)


def test_slopes_equal_the_published_code(shared_data):
    for num_heads in range(1, 65):
        expected = published_code(shared_data / "baichuan2")._get_interleave(num_heads)
        torch.testing.assert_close(alibi_slopes(num_heads), torch.tensor(expected).double())


def test_factors_are_exact_in_bfloat16():
    config = ModelConfig.from_dict({**SMALL, "num_attention_heads": 40, "hidden_size": 5120})
    positions = torch.tensor([0, 1, 255, 256, 4095, 65_535])
    queries, keys = alibi_factors(config, positions, torch.bfloat16)
    products = (queries.double() @ keys.double().mT)[0, :, 0]  # (H, T)
    expected = alibi_slopes(40)[:, None] * positions * (128 + 8) ** 0.5
    torch.testing.assert_close(products, expected, rtol=2e-7, atol=0)
    positions = torch.arange(257 * 256 + 1)
    keys = alibi_factors(config, positions, torch.bfloat16)[1][0, 0].double()  # (T, 8)
    assert (keys[:, :2].sum(1) != positions).nonzero().flatten().tolist() == [257 * 256]


@torch.no_grad()
def test_positions_survive_bfloat16(shared_data, tmp_path):
    """At 2,000 tokens the published code, whose mask is in bfloat16, has lost them."""
    folder = write_checkpoint(tmp_path / "13B", "13B", num_hidden_layers=1, model_max_length=2000)
    tokens = random_tokens(1, 2000)
    exact = logits(load_model(folder), tokens)
    ours = logits(load_model(folder, torch.bfloat16), tokens)
    theirs = oracle(folder, shared_data).bfloat16()(tokens).logits
    assert 5 * (ours - exact).std() < (theirs - exact).std()


@torch.no_grad()
def test_packed_rows_do_not_see_each_other(folder):
    model, lengths = load_model(folder), [30, 1, 7, 300]
    tokens = random_tokens(1, sum(lengths))
    alone = [logits(model, row) for row in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(
        logits(model, tokens, lengths=lengths), torch.cat(alone, 1), rtol=0, atol=2e-5
    )


@torch.no_grad()
def test_cache_gives_the_same_states(folder):
    model, tokens = load_model(folder), random_tokens(2, 150)
    cache, parts = KeyValueCache(model.config), []
    for chunk in tokens.split([20, 1, 1, 70, 1, 57], dim=1):
        parts.append(model(chunk, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=5e-5)


@pytest.mark.parametrize("sampling", [Sampling(30, greedy=True), Sampling(30, seed=3)])
def test_padded_batch_equals_single_prompts(folder, sampling):
    model = load_model(folder)
    prompts = [random_tokens(length, seed=length).tolist() for length in (40, 3, 1, 17)]
    single = [generate(model, [ids], sampling, {2}, [n])[0] for n, ids in enumerate(prompts)]
    assert generate(model, prompts, sampling, {2}) == single


@torch.inference_mode()
def test_the_step_that_is_compiled(folder):
    model, tokens = load_model(folder), random_tokens(1, 20)
    fixed, factors = (
        KeyValueCache(model.config, 32),
        position_factors(model.config, torch.arange(32), torch.float32),
    )
    model(tokens[:, :4], cache=fixed)
    for place in range(4, 20):
        expected = logits(model, tokens[:, : place + 1])[:, -1]
        token, position = tokens[:, place : place + 1], torch.tensor([place])
        x = model.model.embed_tokens(token)
        found = next_logits(model, x, position, factors, fixed.pairs)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_lora_adapts_the_fused_matrix(folder):
    """`all` are the linear layers of this model; peft agrees for the name W_pack."""
    model = load_model(folder)
    add_lora(model, LoraConfig(rank=2))
    adapted = {
        name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, LoRALinear)
    }
    assert adapted == {"W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name in ("q_proj", "lm_head"):
        with pytest.raises(UserError, match="Choose from all, .*W_pack"):
            check_targets(load_model(folder), LoraConfig(target_modules=(name,)))


@torch.no_grad()
def test_an_adapter_of_peft(shared_data, tmp_path):
    folder = write_checkpoint(tmp_path / "13B", "13B")
    config = peft.LoraConfig(r=4, target_modules=["W_pack"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(oracle(folder, shared_data), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.1)
        elif "modules_to_save" in name:
            parameter.normal_()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokens = load_model(folder), random_tokens(1, 24)
    load_adapter(ours, tmp_path / "adapter")
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits(ours, tokens), expected, rtol=0, atol=2e-5)
    merge_lora(ours)
    torch.testing.assert_close(logits(ours, tokens), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(folder, bits):
    """The head and the embedding are not quantised; the adapter beside W_pack learns."""
    model, tokens = load_model(folder, quantization_bit=bits), random_tokens(2, 30)
    assert isinstance(model.model.layers[0].self_attn.W_pack, QuantizedLinear)
    add_lora(model, LoraConfig(rank=4, target_modules=("W_pack",)))
    before = logits(model, tokens)
    loss, _ = next_token_loss(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    loss.backward()
    assert model.model.layers[0].self_attn.W_pack.lora_B.weight.grad.abs().max() > 0
    merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=2e-5)


@torch.no_grad()
def test_reward_model(tmp_path):
    """No library has a class for it: config.json names none, and transformers refuses it."""
    folder, tokens = write_checkpoint(tmp_path / "7B", "7B"), random_tokens(2, 24)
    ours = load_reward_model(folder)
    save_model(ours, tmp_path / "judge")
    content = json.loads((tmp_path / "judge" / "config.json").read_text())
    assert content["architectures"] == [] and "auto_map" not in content
    with pytest.raises(ValueError, match="baichuan"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    again, states = load_reward_model(tmp_path / "judge"), as_llama(folder).model(tokens)[0]
    expected = states @ ours.score.weight[0]
    torch.testing.assert_close(again.rewards(again(tokens)), expected, rtol=0, atol=1e-5)


def test_which_size_a_config_is(shared_data):
    published = json.loads((shared_data / "configs/Baichuan2-7B-Chat/config.json").read_text())
    assert not ModelConfig.from_dict(published).alibi
    large = {**published, "num_hidden_layers": 40, "num_attention_heads": 40, "hidden_size": 5120}
    assert ModelConfig.from_dict(large).alibi  # with max_position_embeddings, which someone added
    del large["max_position_embeddings"], published["max_position_embeddings"]
    assert ModelConfig.from_dict(large).max_position_embeddings == 4096
    assert not ModelConfig.from_dict(published).alibi
    assert ModelConfig.from_dict(large).to_dict()["auto_map"] == published["auto_map"]
    made_here = replace(ModelConfig.from_dict({**SMALL, **SIZES["13B"]}), original={})
    assert made_here.alibi and ModelConfig.from_dict(made_here.to_dict()).alibi


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 64000}, "Baichuan 1"),
        ({"vocab_size": 64001}, "Baichuan 1"),  # with a token added
        ({"architectures": ["BaiChuanForCausalLM"]}, "Baichuan 1"),  # of Baichuan-7B
        ({"architectures": 5, "vocab_size": 0}, "vocab_size"),
        ({"norm_head": False}, "norm_head"),
        ({"fused_qkv": False}, "fused_qkv"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 16}, "head_dim"),
        ({"z_loss_weight": 0.1}, "z_loss_weight"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "ALiBi"),
        ({"model_max_length": "long"}, "max_position_embeddings"),
        ({"num_hidden_layers": [40]}, "num_hidden_layers"),
    ],
)
def test_refused_configs(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict({**SMALL, **change})
