"""Read a config.json: the fields of its family, with the family's defaults where it has no value.

values = config_values({"model_type": "qwen2", "hidden_size": 896, ...}, "config.json")
"""

from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.model.baichuan_config import baichuan_values
from minisft.model.config_checks import (
    check_values,
    qwen_values,
    refuse_unsupported,
    rotary_values,
    smollm3_values,
)

# The fields of every family, besides those of rotary_values.
FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id"),
)
# The fields that a family has besides FIELDS, and its defaults where they differ from those of
# ModelConfig (from transformers' config classes). A family does not read other fields.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "qkv_bias": True,
    },
    "qwen3": {
        "attention_bias": False,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "qk_norm": True,
    },
    "smollm3": {
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    "baichuan": {"fused_qkv": True, "norm_head": True},
}
# Families with fields that need more than a default.
FAMILY_VALUES = {
    "qwen2": qwen_values,
    "qwen3": qwen_values,
    "smollm3": smollm3_values,
    "baichuan": baichuan_values,
}
# Fields in which null is a value: no window, or the number that ModelConfig derives. In other
# fields null means the family's default.
NULLABLE = ("sliding_window", "num_key_value_heads", "head_dim")
# Fields that follow from the family. A config.json may repeat them, as those of minisft do.
IMPLIED = ("qkv_bias", "qk_norm", "fused_qkv", "norm_head", "alibi")


def config_values(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The fields of ModelConfig in the content of a config.json; source: its path, for errors."""
    refuse_unsupported(content, list(FAMILY_DEFAULTS), source)
    family = content["model_type"]
    values = dict(FAMILY_DEFAULTS[family])
    for name in {*FIELDS, *values} - {*IMPLIED}:
        if name in content and (content[name] is not None or name in NULLABLE):
            values[name] = content[name]
    values |= rotary_values({**content, **values}, source)
    if family in FAMILY_VALUES:
        values |= FAMILY_VALUES[family](content, source)
    for name in IMPLIED:
        implied = values.get(name, False)
        if content.get(name) not in (None, implied):
            raise UserError(
                f"{source}: {name} must be {str(implied).lower()} in this model ({family}), "
                f"not {content[name]!r}"
            )
    check_values(values, source)
    for name in ("num_key_value_heads", "head_dim"):
        values[name] = values.get(name) or 0
    return values
