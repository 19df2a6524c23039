"""The decoder against transformers: every family, rotary type and real config.json."""

import json

import pytest
import torch
import transformers
from families import SMALL, VARIANTS, reference

from minisft.checkpoints.folders import load_model
from minisft.common.errors import UserError
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.rotary import rotary_frequencies


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2, window", "qwen3", "smollm3"])
def test_packed_rows_do_not_see_each_other(name, tmp_path):
    """A pack gives the logits that transformers gives for each row alone, also with windows."""
    content = {**SMALL, **VARIANTS[name]}
    theirs = reference(content, tmp_path)
    ours, lengths = load_model(tmp_path), [30, 1, 7, 41]
    tokens = torch.randint(
        0, ours.config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(2)
    )
    actual = ours.logits(ours(tokens, lengths=lengths))
    expected = [theirs(row).logits for row in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(actual, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
    assert (actual - ours.logits(ours(tokens))).abs().max() > 0.1  # as a single text


@torch.no_grad()
def assert_same_logits(theirs, ours, length, positions=None):
    tokens = torch.randint(
        0, ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1)
    )
    expected = theirs(tokens, position_ids=positions).logits
    actual = ours.logits(ours(tokens, positions=positions))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, tmp_path):
    content = {**SMALL, **VARIANTS[name]}
    content = {
        key: value for key, value in content.items() if value is not None or key == "sliding_window"
    }
    theirs = reference(content, tmp_path)
    ours = load_model(tmp_path)
    assert_same_logits(theirs, ours, length=24)
    assert_same_logits(theirs, ours, length=200)  # beyond max_position_embeddings and every window


@pytest.mark.parametrize("name", ["llama", "llama3 rope", "yarn", "linear rope", "dynamic rope"])
def test_logits_at_far_positions(name, tmp_path):
    theirs = reference({**SMALL, **VARIANTS[name]}, tmp_path)
    positions = torch.arange(5000, 5024)[None]
    assert_same_logits(theirs, load_model(tmp_path), 24, positions)


def test_rotary_type_changes_logits(tmp_path):
    """The comparison above can tell rotary types apart."""
    theirs = reference({**SMALL, **VARIANTS["yarn"]}, tmp_path)
    ours = load_model(tmp_path)
    ours.config.rope_scaling["rope_type"] = "linear"
    with pytest.raises(AssertionError):
        assert_same_logits(theirs, ours, length=200)


def real_configs(shared_data):
    return sorted((shared_data / "configs").iterdir())


def test_real_configs(shared_data, tmp_path):
    """Every published config, shrunk to two narrow layers, is computed or refused by name."""
    for directory in real_configs(shared_data):
        content = json.loads((directory / "config.json").read_text())
        if content["model_type"] == "baichuan":  # transformers has no such model
            continue
        full = ModelConfig.load(directory)
        assert full.hidden_size == content["hidden_size"]
        ratio = content["num_attention_heads"] // content["num_key_value_heads"]
        content.update(
            num_hidden_layers=2,
            hidden_size=16 * ratio,
            intermediate_size=48,
            vocab_size=128,
            num_attention_heads=2 * ratio,
            num_key_value_heads=2,
            head_dim=16,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        )
        work = tmp_path / directory.name
        work.mkdir()
        theirs = reference(content, work)
        ours = load_model(work)
        assert_same_logits(theirs, ours, 24)
        assert_same_logits(theirs, ours, 24, torch.arange(40000, 40024)[None])


@torch.no_grad()
def test_full_size_frequencies(shared_data):
    """Rotary frequencies of the real, unshrunk configs equal transformers'."""
    for directory in real_configs(shared_data):
        if "Baichuan" in directory.name:
            continue
        config = transformers.AutoConfig.from_pretrained(directory)
        config.num_hidden_layers, config.vocab_size, config.intermediate_size = 1, 8, 8
        with torch.device("meta"):
            module = type(transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb)
        expected = module(config)
        ours, factor = rotary_frequencies(ModelConfig.load(directory), 1)
        torch.testing.assert_close(ours, expected.inv_freq, rtol=1e-6, atol=0)
        assert factor == expected.attention_scaling


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2, window", "qwen3", "smollm3"])
@torch.no_grad()
def test_cache_gives_the_same_states(name):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**SMALL, **VARIANTS[name]})).eval()
    tokens = torch.randint(0, 128, (2, 150))
    cache, parts = KeyValueCache(model.config), []
    for chunk in tokens.split([20, 1, 1, 70, 1, 57], dim=1):  # grows its store several times
        parts.append(model(chunk, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)
    cache.truncate(20)
    torch.testing.assert_close(
        model(tokens[:, 20:30], cache=cache), model(tokens)[:, 20:30], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_right_padding_needs_no_mask():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**SMALL, "model_type": "llama"})).eval()
    tokens = torch.randint(0, 128, (2, 30))
    shorter = torch.cat([tokens[:, :20], torch.zeros(2, 10, dtype=torch.long)], 1)
    torch.testing.assert_close(model(shorter)[:, :20], model(tokens)[:, :20])


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**SMALL, "model_type": "llama"})).train()
    tokens, gradients = torch.randint(0, 128, (2, 30)), []
    for on in (False, True):
        model.model.gradient_checkpointing = on
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_refused_configs(change, message):
    content = {**SMALL, "model_type": "llama", **change}
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(content)


def test_published_greedy_text(shared_data):
    """stories260K writes its published 256 tokens, exactly."""
    directory = shared_data / "models" / "stories260K"
    expected = json.loads((directory / "greedy_256_ids.json").read_text())
    model = load_model(directory)
    ids, cache, tokens = [1], KeyValueCache(model.config), torch.tensor([[1]])
    with torch.no_grad():
        for _ in range(256):
            best = model.logits(model(tokens, cache=cache)[:, -1]).argmax(-1)
            ids.append(int(best))
            tokens = best[None]
    assert ids[-256:] == expected[-256:]
