"""Check a config.json for features that are not supported and for impossible values."""

from pathlib import Path
from typing import Any

from minisft.common.errors import UserError
from minisft.common.json_files import is_integer, is_number, token_ids

# Rotary scaling -> the numbers it needs.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
# Fields that change what a model computes, with the only value that minisft computes.
ONLY_VALUES = {
    "attention_dropout": 0,
    "hidden_act": "silu",
    "is_causal": True,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1,
}
LAYER_TYPES = ("full_attention", "sliding_attention")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# More than any model has, and small enough for torch to compute with; 2**20 for other sizes.
LARGEST = {"num_hidden_layers": 2**10, "vocab_size": 2**24, "max_position_embeddings": 2**40}


def refuse_unsupported(content: dict[str, Any], families: list[str], source: str | Path) -> None:
    """UserError if the model has a feature that minisft does not support."""
    family = content.get("model_type")
    if family not in families:
        raise UserError(
            f"{source}: model_type '{family}' is not supported. minisft supports "
            f"{', '.join(families)}; see docs/models.md."
        )
    for name, supported in ONLY_VALUES.items():
        if content.get(name) not in (None, supported):
            raise UserError(
                f"{source}: {name} {content[name]!r} is not supported, only {supported!r} is"
            )


def rotary_values(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json, which has three ways to state them."""
    scaling = content.get("rope_parameters") or content.get("rope_scaling")
    theta = content.get("rope_theta")
    theta = 10000.0 if theta is None else theta
    if not scaling:
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(scaling, dict):
        raise UserError(f"{source}: rope_scaling must be an object, not {scaling!r}")
    for name, value in scaling.items():
        is_partial = name == "partial_rotary_factor" and value not in (None, 1)
        if is_partial or isinstance(value, dict | list):
            raise UserError(f"{source}: '{name}' of the rotary positions is not supported")
    scaling = dict(scaling)
    stated = scaling.pop("rope_theta", None)
    theta = theta if stated is None else stated
    rope_type = scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise UserError(
            f"{source}: rope type '{rope_type}' is not supported. minisft supports "
            f"{', '.join(ROPE_TYPES)}."
        )
    # The field beside the scaling wins over the one in it, as in transformers.
    length = content.get("original_max_position_embeddings")
    length = scaling.get("original_max_position_embeddings") if length is None else length
    if length is None:
        length = content.get("max_position_embeddings", 2048)
    scaling["original_max_position_embeddings"] = length
    for name in ROPE_NUMBERS:
        value = scaling.get(name)
        is_optional = name not in ROPE_TYPES[rope_type]
        if not is_number(value) and not (value is None and is_optional):
            raise UserError(
                f"{source}: rope type '{rope_type}' needs the number '{name}', not {value!r}"
            )
    return {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else scaling}


def qwen_values(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The sliding window of Qwen2 and Qwen3, which has an effect with use_sliding_window only."""
    if not content.get("use_sliding_window"):
        return {}
    defaults = {"sliding_window": 4096, "max_window_layers": 28}
    names = ("sliding_window", "max_window_layers", "layer_types")
    is_set = {name for name in names if content.get(name) is not None}
    if "sliding_window" in content:  # null: no window
        is_set.add("sliding_window")
    return defaults | {name: content[name] for name in is_set}


def smollm3_values(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """no_rope_layers of SmolLM3: listed, or every fourth. UserError for sliding windows."""
    if content.get("use_sliding_window"):
        raise UserError(f"{source}: use_sliding_window is not supported for smollm3")
    if "sliding_attention" in (content.get("layer_types") or []):
        raise UserError(f"{source}: layer_types with sliding_attention need use_sliding_window")
    interval, layers = content.get("no_rope_layer_interval"), content.get("no_rope_layers")
    interval = 4 if interval is None else interval
    if not is_integer(interval, 1):
        raise UserError(
            f"{source}: no_rope_layer_interval must be a whole number of at least 1, "
            f"not {interval!r}"
        )
    num_layers = content.get("num_hidden_layers")
    if not is_integer(num_layers, 1, LARGEST["num_hidden_layers"]):
        return {}  # check_values refuses it
    if layers is None:
        layers = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(layers, list) or len(layers) < num_layers:
        raise UserError(f"{source}: no_rope_layers must have an entry for each layer")
    if any(entry not in (0, 1) for entry in layers):
        raise UserError(f"{source}: no_rope_layers must have 1 (rotary positions) or 0 (none)")
    return {"no_rope_layers": layers[:num_layers]}


def check_values(values: dict[str, Any], source: str | Path) -> None:
    """UserError if a field has a value that no model can have."""
    _check_sizes(values, source)
    _check_heads(values, source)
    for name, above in (("rms_norm_eps", 0), ("rope_theta", 1), ("initializer_range", 0)):
        if name in values and not is_number(values[name], above):
            raise UserError(
                f"{source}: {name} must be a number above {above}, not {values[name]!r}"
            )
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(values.get(name, False), bool):
            raise UserError(f"{source}: {name} must be true or false, not {values[name]!r}")
    for name in ("bos_token_id", "eos_token_id"):
        token_ids(values.get(name), source, name)
    window, num_full = values.get("sliding_window"), values.get("max_window_layers", 0)
    if window is not None and not is_integer(window, 1):
        raise UserError(
            f"{source}: sliding_window must be a whole number of at least 1, or null, "
            f"not {window!r}"
        )
    if not is_integer(num_full):
        raise UserError(f"{source}: max_window_layers must be a whole number, not {num_full!r}")
    _check_layer_types(values, source)


def _check_sizes(values: dict[str, Any], source: str | Path) -> None:
    for name in REQUIRED:
        if name not in values:
            raise UserError(f"{source}: '{name}' is missing")
    for name in (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        most = LARGEST.get(name, 2**20)
        if values.get(name) is not None and not is_integer(values[name], 1, most):
            raise UserError(
                f"{source}: {name} must be a whole number from 1 to {most:,}, not {values[name]!r}"
            )


def _check_heads(values: dict[str, Any], source: str | Path) -> None:
    num_heads = values["num_attention_heads"]
    num_key_value_heads = values.get("num_key_value_heads") or num_heads
    if num_heads % num_key_value_heads:
        raise UserError(
            f"{source}: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_key_value_heads}"
        )
    head_dim = values.get("head_dim")
    if head_dim is None:
        if values["hidden_size"] % num_heads:
            raise UserError(f"{source}: hidden_size is not a multiple of num_attention_heads")
        head_dim = values["hidden_size"] // num_heads
    if head_dim % 2 or head_dim < 4:
        raise UserError(
            f"{source}: the width of a head is {head_dim}; it must be even and at least 4"
        )


def _check_layer_types(values: dict[str, Any], source: str | Path) -> None:
    layer_types, num_layers = values.get("layer_types"), values["num_hidden_layers"]
    if layer_types is None:
        return
    is_valid = isinstance(layer_types, list) and all(name in LAYER_TYPES for name in layer_types)
    if not is_valid or len(layer_types) != num_layers:
        raise UserError(
            f"{source}: layer_types must have one of {', '.join(LAYER_TYPES)} for each of the "
            f"{num_layers} layers of num_hidden_layers"
        )
