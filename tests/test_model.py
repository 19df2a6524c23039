"""The decoder against transformers: every family, rotary type and real config.json."""

import json

import pytest
import torch
import transformers

from minisft.checkpoints.folders import load_model
from minisft.common.errors import UserError
from minisft.model.cache import KeyValueCache
from minisft.model.config import ModelConfig
from minisft.model.decoder import (
    CausalLM,
    Linear,
    RMSNorm,
    attend_causally,
    attend_in_rows,
    attend_in_rows_at_once,
    kernel_for_rows,
)
from minisft.model.rotary import rotary_frequencies

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

VARIANTS = {
    "llama": {"model_type": "llama"},
    "llama1, without num_key_value_heads": {"model_type": "llama", "num_key_value_heads": None},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, head_dim": {"model_type": "llama", "head_dim": 16},
    "llama3 rope": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "linear rope": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic rope": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"model_type": "llama", "rope_scaling": YARN},
    "yarn, untruncated": {"model_type": "qwen2", "rope_scaling": {
        **YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3}},
    "yarn, mscale": {"model_type": "llama", "rope_scaling": {
        **YARN, "mscale": 0.7, "mscale_all_dim": 1.1}},
    "rope_parameters": {"model_type": "llama",
                        "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
                      "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000},
    "qwen3, default head_dim": {"model_type": "qwen3", "num_attention_heads": 2,
                                "num_key_value_heads": 1},
}


def reference(content, directory):
    """A random transformers model of this config.json, saved to `directory`."""
    (directory / "config.json").write_text(json.dumps(content))
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide mistakes
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(content))  # as published, not as rewritten
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2, window", "qwen3"])
def test_packed_rows_do_not_see_each_other(name, tmp_path):
    """transformers' logits of each row alone, out of one packed row; windows included."""
    content = {**SMALL, **VARIANTS[name]}
    theirs = reference(content, tmp_path)
    ours, lengths = load_model(tmp_path), [30, 1, 7, 41]
    tokens = torch.randint(0, ours.config.vocab_size, (1, sum(lengths)),
                           generator=torch.Generator().manual_seed(2))
    actual = ours.logits(ours(tokens, lengths=lengths))
    expected = [theirs(row).logits for row in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(actual, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
    assert (actual - ours.logits(ours(tokens))).abs().max() > 0.1  # as if it were one text


@torch.no_grad()
def assert_same_logits(theirs, ours, length, positions=None):
    tokens = torch.randint(0, ours.config.vocab_size, (2, length),
                           generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, position_ids=positions).logits
    actual = ours.logits(ours(tokens, positions=positions))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, tmp_path):
    content = {**SMALL, **VARIANTS[name]}
    content = {key: value for key, value in content.items()
               if value is not None or key == "sliding_window"}
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
        if content["model_type"] == "baichuan":
            with pytest.raises(UserError, match="baichuan"):
                ModelConfig.load(directory)
            continue
        full = ModelConfig.load(directory)
        assert full.hidden_size == content["hidden_size"]
        ratio = content["num_attention_heads"] // content["num_key_value_heads"]
        content.update(num_hidden_layers=2, hidden_size=16 * ratio, intermediate_size=48,
                       vocab_size=128, num_attention_heads=2 * ratio,
                       num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2,
                       initializer_range=0.3)
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


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2, window", "qwen3"])
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
    torch.testing.assert_close(model(tokens[:, 20:30], cache=cache), model(tokens)[:, 20:30],
                               rtol=1e-4, atol=1e-5)


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
        gradients.append([one.grad.clone() for one in model.model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "baichuan"}, "baichuan"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"vocab_size": -5}, "vocab_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
])
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


def operations(function):
    """function() without gradients -> its result, and the names of the operations it took."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        result = function()
    return result, " ".join(event.name for event in profile.events())


@pytest.mark.parametrize("has_onednn", [torch.backends.mkldnn.is_available(), False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (8, 1), (2, 40), (5, 40)])
def test_few_rows_are_multiplied_by_onednn(rows, bias, has_onednn, monkeypatch):
    """Linear equals torch's, in value and layout, with and without the shortcut."""
    monkeypatch.setattr("minisft.model.HAS_ONEDNN", has_onednn)
    torch.manual_seed(0)
    layer, x = Linear(512, 768, bias=bias), torch.randn(*rows, 512)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    actual, names = operations(lambda: layer(x))
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ("_linear_pointwise" in names) == (has_onednn and rows[0] * rows[1] <= 64)


@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (64, 1), (65, 1), (1, 8)])
def test_one_token_of_few_rows_is_normalised_by_a_product(rows):
    """RMSNorm equals torch's with and without the shortcut."""
    torch.manual_seed(0)
    norm, x = RMSNorm(512, eps=1e-5), 3 * torch.randn(*rows, 512)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    actual, names = operations(lambda: norm(x))
    torch.testing.assert_close(actual, torch.nn.functional.rms_norm(x, (512,), norm.weight, 1e-5),
                               rtol=1e-5, atol=1e-6)
    assert ("baddbmm" in names) == (rows[0] <= 64 and rows[1] == 1)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_token(masked):
    """One query over all keys, as it is computed for the last of several."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 20, 16) for heads in (4, 2, 2))
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    mask = causal & (torch.rand(3, 1, 20, 20) < 0.7) | torch.eye(20, dtype=torch.bool)
    mask = mask if masked else None
    several = attend_causally(q, k, v, mask)[:, :, -1:]
    one = attend_causally(q[:, :, -1:], k, v, mask[:, :, -1:] if masked else None)
    torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rows", [1, 8, 65])
def test_a_step_of_generation_equals_the_plain_path(name, rows, monkeypatch):
    """A model large enough for every shortcut, with and without them: after a cached prompt."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8}
    model = CausalLM(ModelConfig.from_dict({**SMALL, **VARIANTS[name], **sizes}))
    model.initialize()
    tokens = torch.randint(0, 128, (rows, 9))

    def step():
        cache = KeyValueCache(model.config)
        model(tokens[:, :-1], cache=cache)
        return model.logits(model(tokens[:, -1:], cache=cache))

    quick, names = operations(step)
    assert ("baddbmm" in names) == (rows <= 64)
    monkeypatch.setattr("minisft.model.are_few_on_cpu", lambda x, weight: False)
    plain, names = operations(step)
    assert "baddbmm" not in names and "_linear_pointwise" not in names
    torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-4 * plain.std().item())


def test_the_shortcut_keeps_out_of_autocast_and_half_precision():
    layer, x = Linear(512, 768), torch.randn(1, 512)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.float()(x.requires_grad_()).requires_grad


def varlen_by_rows(q, k, v, bounds, bounds_k, longest, longest_k, window_size, enable_gqa):
    """What torch documents of varlen_attn: rows (T, heads, d) one after another, a left window."""
    assert enable_gqa and bounds.dtype == torch.int32 and longest == bounds.diff().max()
    rows = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        near = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            near = near.triu(-window_size[0])
        parts = (one[start:end].transpose(0, 1) for one in (q, k, v))
        rows.append(torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=near, enable_gqa=True).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 4])
def test_rows_of_a_pack_at_once(window, monkeypatch):
    """The GPU's way through a pack hands over what the CPU's way does row by row."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_rows)
    torch.manual_seed(0)
    lengths = [3, 9, 1, 5]
    q, k, v = (torch.randn(1, heads, sum(lengths), 16) for heads in (4, 2, 2))
    masks = [torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n)) for n in lengths]
    expected = attend_in_rows(q, k, v, lengths, masks)
    bounds = torch.tensor([0, 3, 12, 13, 18], dtype=torch.int32)
    actual = attend_in_rows_at_once(
        q, k, v, kernel_for_rows(), bounds, 9, -1 if window is None else window - 1)
    torch.testing.assert_close(actual, expected)
