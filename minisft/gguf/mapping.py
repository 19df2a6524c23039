"""A checkpoint's tensors and config in GGUF, the file format of llama.cpp.

    gguf_name("model.layers.0.self_attn.q_proj.weight")     # "blk.0.attn_q.weight"
    architecture_fields(config)["llama.block_count"]        # 22

Tensors get other names and keep their values, with one exception. Rotary embedding rotates pairs of
numbers of each head. Hugging Face pairs number i with number i + d/2 (d is the width of a head).
llama.cpp pairs 2i with 2i + 1 in the architectures of INTERLEAVED. There the rows of q_proj and
k_proj, which compute these numbers, are reordered in each head:

    rows of a head in the checkpoint    0 1 2 3 4 5 6 7    pairs (0, 4), (1, 5), (2, 6), (3, 7)
    rows of a head in the file          0 4 1 5 2 6 3 7    pairs of neighbours

unpack_config.py reads the config back.

The tour explains it: docs/tour/12_ship.md.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minisft.model.config import ModelConfig
from minisft.model.rotary import rotary_frequencies

# llama.cpp runs Mistral as `llama`. The file does not say which of the two a model was.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "baichuan": "baichuan",
}
INTERLEAVED = ("llama", "smollm3", "baichuan")
# The files of these have vocab_size and rope.dimension_count, too, as llama.cpp's converter writes
# them for Llama models. For the others, llama.cpp derives both from the rest of the file.
WITH_SIZES = ("llama", "smollm3", "baichuan")
# A matrix of Baichuan2 that the file holds as three, and what other families call them.
FUSED, PARTS = "W_pack", ("q_proj", "k_proj", "v_proj")
MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# The one tensor that no checkpoint has: see rotary_divisors.
ROTARY_DIVISORS = "rope_freqs.weight"
# Fields of generation_config.json that llama.cpp's server takes as defaults, with their types.
SAMPLING = {
    "temperature": ("temp", float),
    "top_k": ("top_k", np.int32),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}
MAX_PENALIZED = 2**20  # llama.cpp reserves memory for so many tokens


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{LAYER_MODULES[inner]}.{kind}"
    return f"{MODULES[module]}.{kind}"


def checkpoint_name(name: str) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`; unknown names stay."""
    module, _, kind = name.rpartition(".")
    modules, prefix = MODULES, ""
    if module.startswith("blk."):
        layer, _, module = module.removeprefix("blk.").partition(".")
        modules, prefix = LAYER_MODULES, f"model.layers.{layer}."
    original = {value: key for key, value in modules.items()}.get(module)
    return name if original is None else f"{prefix}{original}.{kind}"


def tensor_parts(name: str, num_rows: int) -> list[tuple[str, int, int]]:
    """The tensors that a tensor of a checkpoint becomes: [(name, first row, row after the last)].

    One with the same name, but three for W_pack.
    """
    if f".{FUSED}." not in name:
        return [(name, 0, num_rows)]
    size = num_rows // len(PARTS)
    return [(name.replace(FUSED, part), k * size, (k + 1) * size) for k, part in enumerate(PARTS)]


def is_interleaved(name: str, architecture: str) -> bool:
    """True if the rows of a tensor, named as in the checkpoint, are reordered in the file."""
    return architecture in INTERLEAVED and name.rpartition(".")[0].endswith(("q_proj", "k_proj"))


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a checkpoint -> rows of the file. rows: (heads * head_dim, ...), weight or bias."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def deinterleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `interleave`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def architecture_fields(config: ModelConfig) -> dict[str, Any]:
    """The metadata that describes a model to llama.cpp, such as {"llama.block_count": 22}."""
    architecture = ARCHITECTURES[config.model_type]
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        fields["rope.scaling.type"] = scaling["rope_type"]
        fields["rope.scaling.factor"] = float(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        fields |= _yarn_fields(config, scaling)
    if architecture in WITH_SIZES:
        fields |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def _yarn_fields(config: ModelConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    """YaRN's context length, its two bounds, and the factor on its temperature."""
    original = int(scaling["original_max_position_embeddings"])
    fields: dict[str, Any] = {"rope.scaling.original_context_length": original}
    for name in ("beta_fast", "beta_slow"):
        if scaling.get(name) is not None:
            fields[f"rope.scaling.yarn_{name}"] = float(scaling[name])
    _, temperature = rotary_frequencies(config, 0)
    factor = temperature / yarn_temperature(float(scaling["factor"]))
    if abs(factor - 1) > 1e-6:
        fields["rope.scaling.attn_factor"] = factor
    return fields


def yarn_temperature(factor: float) -> float:
    """The factor on cos and sin that llama.cpp uses for YaRN, unless the file changes it."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_divisors(config: ModelConfig) -> torch.Tensor | None:
    """(d/2,) divisors of the rotary frequencies for llama3 scaling; None for other scaling.

    llama.cpp has no metadata for this scaling. The file has the divisors as a tensor instead.
    """
    if (config.rope_scaling or {}).get("rope_type") != "llama3":
        return None
    unscaled = replace(config, rope_scaling=None)
    return rotary_frequencies(unscaled, 0)[0] / rotary_frequencies(config, 0)[0]


def sampling_fields(generation_config: dict[str, Any], context_length: int) -> dict[str, Any]:
    """The sampling that generation_config.json recommends, as metadata."""
    fields: dict[str, Any] = {}
    for name, (gguf_field, to_type) in SAMPLING.items():
        value: Any = generation_config.get(name)
        if type(value) in (int, float) and 0 <= value < 2**31:
            fields[f"general.sampling.{gguf_field}"] = to_type(value)
    if fields.get("general.sampling.penalty_repeat", 1.0) != 1.0:
        # transformers penalises the tokens of the whole text, llama.cpp those of the last 64.
        length = np.int32(min(context_length, MAX_PENALIZED))
        fields["general.sampling.penalty_last_n"] = length
    return fields
