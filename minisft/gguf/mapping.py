"""What a checkpoint's tensors and config fields are called in a GGUF file, and how they lie there.

    gguf_name("model.layers.0.self_attn.q_proj.weight")     # "blk.0.attn_q.weight"
    metadata = {"general.architecture": "llama"} | architecture_fields(config)
    config_fields(metadata, tensor_names)                    # the config.json they stand for

Both directions are here, side by side, so that what is exported is what is read back.
"""

import math
from functools import partial

from minisft.common.errors import UserError
from minisft.model.config import ModelConfig
from minisft.model.rotary import rotary_frequencies

# llama.cpp runs Mistral by its code for Llama; which of the two it was, a file does not say.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
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
ROTARY_DIVISORS = "rope_freqs.weight"


def gguf_name(name):
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{MODULES[inner]}.{kind}"
    return f"{MODULES[module]}.{kind}"


def interleaved(rows, head_dim):
    """Rows of q_proj or k_proj in the order in which llama.cpp's `llama` rotates them.

    A checkpoint pairs the rows i and i + d/2 of a head, llama.cpp the rows 2i and 2i + 1. `rows`:
    (n * head_dim, ...), whole heads; a weight or a bias.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def deinterleaved(rows, head_dim):
    """The inverse of `interleaved`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def is_interleaved(name, architecture):
    """Whether this tensor (by its name in the checkpoint) has its rows interleaved in the file."""
    return architecture == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj"))


def architecture_fields(config):
    """The metadata {key: value} that describe a model's architecture; UserError if none can."""
    architecture = ARCHITECTURES[config.model_type]
    _refuse_impossible(config, architecture)
    fields = {
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
        **_rotary_fields(config),
    }
    if architecture == "llama":
        fields |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def _refuse_impossible(config, architecture):
    scaling = config.rope_scaling or {}
    if config.head_dim % 2:
        raise UserError(f"head_dim {config.head_dim} is odd: GGUF cannot describe its rotation")
    if architecture == "qwen2" and config.head_dim * config.num_attention_heads != (
        config.hidden_size
    ):
        raise UserError(
            "llama.cpp's qwen2 takes heads of hidden_size / num_attention_heads only; "
            f"this checkpoint has head_dim {config.head_dim}"
        )
    if architecture == "qwen3" and config.attention_bias:
        raise UserError("llama.cpp's qwen3 has no place for this checkpoint's attention biases")
    if scaling.get("rope_type") == "yarn" and not scaling.get("truncate", True):
        raise UserError("llama.cpp's YaRN always truncates; this checkpoint says truncate = false")


def _rotary_fields(config):
    """Rotary scaling; `llama3` is a tensor instead, `dynamic` is unknown to llama.cpp."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return {}
    factor = float(scaling["factor"])
    fields = {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": factor}
    if scaling["rope_type"] == "yarn":
        original = int(scaling["original_max_position_embeddings"])
        fields["rope.scaling.original_context_length"] = original
        for name in ("beta_fast", "beta_slow"):
            if scaling.get(name) is not None:
                fields[f"rope.scaling.yarn_{name}"] = float(scaling[name])
        # llama.cpp multiplies YaRN's usual temperature by this.
        correction = rotary_frequencies(config, 0)[1] / _usual_temperature(factor)
        if abs(correction - 1) > 1e-6:
            fields["rope.scaling.attn_factor"] = correction
    return fields


def _usual_temperature(factor):
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_divisors(config):
    """What each rotary frequency is divided by (d/2,), for llama3 scaling; None for other types."""
    if (config.rope_scaling or {}).get("rope_type") != "llama3":
        return None
    plain = ModelConfig(**{**vars(config), "rope_scaling": None})
    return rotary_frequencies(plain, 0)[0] / rotary_frequencies(config, 0)[0]


def known_differences(config):
    """Sentences on where llama.cpp will compute something else than the checkpoint says."""
    sentences = []
    if (config.rope_scaling or {}).get("rope_type") == "dynamic":
        sentences.append(
            "llama.cpp does not know dynamic rotary scaling: answers differ beyond "
            f"{config.max_position_embeddings} tokens"
        )
    windowed = "sliding_attention" in config.layer_types
    if windowed and config.sliding_window < config.max_position_embeddings:
        sentences.append(
            "llama.cpp does not use this model's sliding window: answers differ "
            f"beyond {config.sliding_window} tokens"
        )
    return sentences


def checkpoint_name(name):
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`; others as they are."""
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("blk."):
        number, _, module = module.removeprefix("blk.").partition(".")
        layer = f"model.layers.{number}."
    for theirs, ours in MODULES.items():
        if ours == module and bool(layer) == (not theirs.startswith(("model.", "lm_head"))):
            return f"{layer}{theirs}.{kind}"
    return name


def config_fields(metadata, tensor_names, divisors=None):
    """The config.json that a GGUF file's metadata describe; UserError where minisft has no such.

    tensor_names: those of the file, by which biases and an output matrix are known. divisors: the
    numbers of ROTARY_DIVISORS, if the file has it.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        raise UserError(
            f"architecture '{architecture}' is not supported; minisft knows "
            f"{', '.join(sorted(set(ARCHITECTURES.values())))}"
        )
    get, tokens = partial(_number, metadata, architecture), metadata.get("tokenizer.ggml.tokens")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // max(heads, 1))
    _refuse_variants(architecture, get, head_dim)
    config = {
        "architectures": [f"{architecture.title()}ForCausalLM"],
        "model_type": architecture,
        "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_output.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_up.bias" in tensor_names,
        "rope_theta": get("rope.freq_base", 10000.0),
    }
    scaling = _scaling(metadata, architecture, get)
    if divisors is not None:
        scaling = llama3_scaling(divisors, config)
    return {**config, "rope_scaling": scaling}


def _refuse_variants(architecture, get, head_dim):
    """UserError for experts, and for heads of which keys, values and rotation differ in size."""
    for name, needed in (
        ("attention.value_length", head_dim),
        ("expert_count", 0),
        ("rope.dimension_count", head_dim),
    ):
        if get(name, needed) != needed:
            raise UserError(f"{architecture}.{name} {get(name)} is not supported (only {needed})")


def _number(metadata, architecture, name, default=None):
    value = metadata.get(f"{architecture}.{name}", default)
    if type(value) not in (int, float):
        raise UserError(f"{architecture}.{name} is {value!r}; a number is needed")
    return value


def _scaling(metadata, architecture, get):
    """rope_scaling of the types `linear` and `yarn`; None for none."""
    # As llama.cpp takes it: a factor alone is a linear one, and had another name once.
    kind = metadata.get(f"{architecture}.rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0))
    if kind == "none" or factor in (0, 1):
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{architecture}.rope.scaling.type '{kind}' is not supported")
    scaling = {"rope_type": kind, "factor": factor}
    original = get("rope.scaling.original_context_length", get("context_length"))
    scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if f"{architecture}.rope.scaling.yarn_{name}" in metadata:
                scaling[name] = get(f"rope.scaling.yarn_{name}")
        correction = get("rope.scaling.attn_factor", 1.0)
        if correction != 1:
            scaling["attention_factor"] = correction * _usual_temperature(scaling["factor"])
    return scaling


def llama3_scaling(divisors, config):
    """The rope_scaling of type llama3 that gives these divisors (a tensor), found by trying.

    The largest divisor is the factor; 1 and 4 bound the frequencies that are blended in every
    published model, and the original context is a power of two.
    """
    for exponent in range(4, 24):
        scaling = {
            "rope_type": "llama3",
            "factor": divisors.max().item(),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**exponent,
        }
        found = rotary_divisors(ModelConfig.from_dict({**config, "rope_scaling": scaling}))
        if found.shape == divisors.shape and (found - divisors).abs().max() < 1e-4:
            return scaling
    raise UserError(f"{ROTARY_DIVISORS} holds divisors that llama3 scaling does not give")
