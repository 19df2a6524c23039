"""Every field of transformers' config classes is used, harmless or refused, and so is every family.

If a new version of transformers adds a field, this test fails until the field is in a table below.
Baichuan2 has no config class in transformers; see test_baichuan.py.
"""

import re
from dataclasses import fields
from importlib import import_module
from inspect import getsource

import pytest
import torch
import transformers
from families import LLAMA3_ROPE
from transformers import AutoModelForCausalLM, modeling_rope_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from minisft.common.errors import UserError
from minisft.model.class_names import class_name
from minisft.model.config import ModelConfig
from minisft.model.config_checks import ROPE_NUMBERS
from minisft.model.config_values import FAMILY_DEFAULTS
from minisft.model.decoder import CausalLM

FAMILIES = [family for family in FAMILY_DEFAULTS if family in CONFIG_MAPPING]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
# Field -> another value, and the other fields that it needs to have an effect. Logits change, and
# equal transformers'.
USED = {
    "vocab_size": (50, {}),
    "hidden_size": (32, {}),
    "intermediate_size": (40, {}),
    "num_hidden_layers": (3, {}),
    "num_attention_heads": (2, {}),
    "num_key_value_heads": (4, {}),
    "head_dim": (4, {}),
    "max_position_embeddings": (8, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "rms_norm_eps": (0.3, {}),
    "rope_parameters": (LLAMA3_ROPE | {"rope_theta": 100.0}, {}),
    "tie_word_embeddings": (True, {}),
    "attention_bias": (True, {}),
    "mlp_bias": (True, {}),
    "sliding_window": (9, WINDOW),
    "use_sliding_window": (False, WINDOW),
    "max_window_layers": (1, WINDOW),
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"], WINDOW),
    "no_rope_layers": ([0, 1, 1, 0], {}),
    "no_rope_layer_interval": (2, {}),
}
# Field -> another value. minisft does not read the field, and has the logits of transformers.
HARMLESS = {
    "initializer_range": 0.1,  # of new weights only
    "pretraining_tp": 2,  # how old versions of transformers cut a matrix product
    "chunk_size_feed_forward": 4,  # how other families cut a matrix product
    "use_cache": False,  # of transformers' generate
    "output_hidden_states": True,  # what transformers' forward returns, and how
    "return_dict": True,  # transformers fails with False
    "bos_token_id": 5,  # text, not logits
    "eos_token_id": [5, 6],
    "pad_token_id": 5,  # transformers does not train this row of the embedding
    "transformers_version": "4.0.0",
    "architectures": ["AnyForCausalLM"],
    "dtype": "bfloat16",  # of the file; --dtype chooses
    "id2label": {"0": "A"},  # of classifiers
    "label2id": {"A": 0},
    "problem_type": "regression",
}
REFUSED = {"hidden_act": "gelu", "attention_dropout": 0.1, "is_encoder_decoder": True}
# The differences of a family.
EXCEPTIONS = {
    ("smollm3", "tie_word_embeddings"): (False, {}),
    ("mistral", "sliding_window"): (4, {}),
}
SMOLLM3_REFUSED = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}
SMOLLM3_HARMLESS = {"sliding_window": 4}  # without use_sliding_window


def tables(family):
    """USED, HARMLESS and REFUSED of a family."""
    used = USED | {name: value for (key, name), value in EXCEPTIONS.items() if key == family}
    if family != "smollm3":
        return used, HARMLESS, REFUSED
    refused, harmless = REFUSED | SMOLLM3_REFUSED, HARMLESS | SMOLLM3_HARMLESS
    return {k: v for k, v in used.items() if k not in refused | harmless}, harmless, refused


def field_names(family):
    """The fields of transformers' config class that config.json can set."""
    names = {field.name for field in fields(CONFIG_MAPPING[family]) if field.init}
    return names | {"id2label", "label2id"}


@torch.no_grad()
def both_logits(content):
    """Logits of transformers' model with random weights, and of ours with the same."""
    config = CONFIG_MAPPING[content["model_type"]].from_dict(dict(content))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.uniform_(-1, 1)
    ours = CausalLM(ModelConfig.from_dict(content)).eval()
    weights = theirs.state_dict()
    if ours.config.tie_word_embeddings:
        assert weights.pop("lm_head.weight") is not None
    ours.load_state_dict(weights)
    tokens = torch.arange(24)[None] * 7 % 50
    output = theirs(tokens, return_dict=True)
    return output.logits, ours.logits(ours(tokens))


def assert_same(logits):
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_used_harmless_or_refused(family):
    used, harmless, refused = tables(family)
    names, known = field_names(family), used.keys() | harmless.keys() | refused.keys()
    assert names - known == set(), "new fields: use them, or refuse them if they change logits"
    content = {**SMALL, "model_type": family}
    for name in sorted(names & used.keys()):
        value, others = used[name]
        if "use_sliding_window" not in names:
            others = {key: other for key, other in others.items() if key not in WINDOW}
        before = both_logits({**content, **others})
        after = both_logits({**content, **others, name: value})
        assert_same(before)
        assert_same(after)
        changes = before[0].shape != after[0].shape or (before[0] - after[0]).abs().max() > 1e-3
        assert changes, f"{name} = {value} changes nothing, so this says nothing about {name}"
    for name in sorted(names & harmless.keys()):
        assert_same(both_logits({**content, name: harmless[name]}))
    for name in sorted(names & refused.keys()):
        with pytest.raises(UserError, match=name):
            ModelConfig.from_dict({**content, name: refused[name]})


def names_read(module, owner):
    """The attributes and keys of a variable that a module of transformers reads."""
    dotted, quoted = rf"\b{owner}\.(\w+)", rf"""\b{owner}(?:\.get\(|\[|, )\s*["'](\w+)"""
    return {name for match in (dotted, quoted) for name in re.findall(match, getsource(module))}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_the_code_of_transformers_reads_is_known(family):
    """Also a field that the config class does not declare, such as one behind getattr."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    read = names_read(module, "config")
    assert {"hidden_size", "head_dim", "rope_parameters"} < read
    known = set().union(*tables(family)) | {"_attn_implementation"}  # how, not what
    assert read - known == set(), "transformers reads these: use them, or refuse them"


def test_all_numbers_of_rotary_scaling_are_known():
    read = names_read(modeling_rope_utils, "rope_parameters(?:_dict)?")
    read |= names_read(modeling_rope_utils, "rope_params(?:_dict)?")
    assert {"factor", "low_freq_factor", "beta_fast"} < read
    longrope, methods = {"long_factor", "short_factor"}, {"get", "items", "keys", "values"}
    methods |= {"setdefault", "pop", "copy", "update", "ignore_keys_at_rope_validation"}
    known = {*ROPE_NUMBERS, "rope_theta", "rope_type", "type", "truncate", "partial_rotary_factor"}
    assert read - known - longrope - methods == set(), "numbers of rotary scaling that we ignore"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["alibi", "norm_head", "fused_qkv", "qkv_bias", "qk_norm"])
def test_what_a_family_implies_cannot_be_changed(family, name):
    content = {**SMALL, "model_type": family}
    implied = getattr(ModelConfig.from_dict(content), name)
    assert getattr(ModelConfig.from_dict({**content, name: implied}), name) == implied
    with pytest.raises(UserError, match=f"{name} must be {str(implied).lower()}"):
        ModelConfig.from_dict({**content, name: not implied})


@pytest.mark.parametrize("family", FAMILIES)
def test_null_means_the_default(family):
    """Where transformers has null as missing, or fails."""
    content = {**SMALL, "model_type": family}
    expected = vars(ModelConfig.from_dict(content)) | {"original": None}
    nullable = {"sliding_window", "head_dim", "num_key_value_heads"}
    for name in (field_names(family) - SMALL.keys() - nullable) | {"rope_theta", "rope_scaling"}:
        found = vars(ModelConfig.from_dict({**content, name: None})) | {"original": None}
        assert found == expected, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_field_has_the_default_of_transformers(family):
    required = {name: SMALL[name] for name in SMALL if not name.startswith(("head", "num_key"))}
    required |= {"hidden_size": 128, "num_attention_heads": 32}  # a multiple of 32 key heads
    theirs = CONFIG_MAPPING[family].from_dict(dict(required))
    ours = ModelConfig.from_dict({**required, "model_type": family})
    # Where the ids of BOS and EOS are missing, the tokenizer has them.
    compared = field_names(family) & vars(ours).keys() - {"bos_token_id", "eos_token_id"}
    compared -= {"max_window_layers", "no_rope_layer_interval"}
    for name in compared:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert len(compared) > 10


def test_every_other_family_is_refused_by_name():
    others = [name for name in CONFIG_MAPPING if name not in FAMILIES]
    assert len(others) > 200
    for name in others:
        with pytest.raises(UserError, match=f"'{name}'.*llama, mistral, .*smollm3"):
            ModelConfig.from_dict({**SMALL, "model_type": name})
    with pytest.raises(UserError, match="is_causal"):  # a field of no class that transformers reads
        ModelConfig.from_dict({**SMALL, "model_type": "llama", "is_causal": False})


@pytest.mark.parametrize("task", ["CausalLM", "SequenceClassification"])
def test_architectures_are_classes_of_transformers(task):
    for family in FAMILIES:
        assert hasattr(transformers, class_name(family, task)), family
