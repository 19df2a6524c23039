"""The metadata of a GGUF file as a config.json: the inverse of mapping.py.

config_fields(file.metadata, file.tensors)["num_hidden_layers"]
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from minisft.common.errors import UserError
from minisft.gguf.mapping import ARCHITECTURES, ROTARY_DIVISORS, rotary_divisors, yarn_temperature
from minisft.model.class_names import class_name
from minisft.model.config import ModelConfig


def config_fields(
    metadata: dict[str, Any], tensor_names: Collection[str], divisors: torch.Tensor | None = None
) -> dict[str, Any]:
    """The config.json of a file; UserError if minisft has no such model.

    tensor_names: show whether the model has biases and an output matrix. divisors: the tensor
    ROTARY_DIVISORS (d/2,), if the file has it.
    """
    architecture: Any = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        raise UserError(
            f"architecture '{architecture}' is not supported; minisft knows "
            f"{', '.join(sorted(set(ARCHITECTURES.values())))}"
        )
    get = partial(_number, metadata, architecture)
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden_size // max(num_heads, 1))
    # Mixtures of experts, and heads whose keys, values and rotation differ in width.
    for name, supported in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("expert_count", 0),
    ):
        if get(name, supported) != supported:
            raise UserError(f"{architecture}.{name} must be {supported}, not {get(name)}")
    config = {
        "architectures": [class_name(architecture)],
        "model_type": architecture,
        "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_output.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_up.bias" in tensor_names,
        "rope_theta": get("rope.freq_base", 10000.0),
    }
    if architecture == "baichuan":
        config["model_max_length"] = config["max_position_embeddings"]
    config["rope_scaling"] = _rope_scaling(metadata, architecture)
    if divisors is not None:
        config["rope_scaling"] = _llama3_scaling(config, divisors)
    return config


def _number(metadata: dict[str, Any], architecture: str, name: str, default: Any = None) -> Any:
    value = metadata.get(f"{architecture}.{name}", default)
    if type(value) not in (int, float):
        raise UserError(f"{architecture}.{name} must be a number, not {value!r}")
    return value


def _rope_scaling(metadata: dict[str, Any], architecture: str) -> dict[str, Any] | None:
    """rope_scaling of the types `linear` and `yarn`; None if there is none."""
    get = partial(_number, metadata, architecture)
    # As in llama.cpp: a factor without a type is linear. Older files call it scale_linear.
    rope_type = metadata.get(f"{architecture}.rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0))
    # YaRN changes the temperature even with a factor of 1.
    if rope_type == "none" or factor == 0 or (factor == 1 and rope_type == "linear"):
        return None
    if rope_type not in ("linear", "yarn"):
        raise UserError(f"{architecture}.rope.scaling.type '{rope_type}' is not supported")
    scaling = {
        "rope_type": rope_type,
        "factor": factor,
        "original_max_position_embeddings": get(
            "rope.scaling.original_context_length", get("context_length")
        ),
    }
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if f"{architecture}.rope.scaling.yarn_{name}" in metadata:
                scaling[name] = get(f"rope.scaling.yarn_{name}")
        attention_factor = get("rope.scaling.attn_factor", 1.0)
        if attention_factor != 1:
            scaling["attention_factor"] = attention_factor * yarn_temperature(factor)
    return scaling


def _llama3_scaling(config: dict[str, Any], divisors: torch.Tensor) -> dict[str, Any]:
    """The rope_scaling of type llama3 with these divisors (d/2,).

    The largest divisor is the factor. Every published model has the frequency factors 1 and 4, and
    a power of two as its original context, which we search.
    """
    for exponent in range(4, 24):
        scaling = {
            "rope_type": "llama3",
            "factor": divisors.max().item(),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**exponent,
        }
        candidate = rotary_divisors(ModelConfig.from_dict({**config, "rope_scaling": scaling}))
        if candidate is not None and candidate.shape == divisors.shape:
            if (candidate - divisors).abs().max() < 1e-4:
                return scaling
    raise UserError(f"{ROTARY_DIVISORS} is not a llama3 scaling with a context of a power of two")
