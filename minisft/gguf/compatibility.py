"""Models that llama.cpp cannot run, or runs differently.

check_architecture(config)                       # UserError for the first kind
for sentence in known_differences(config):       # notes on the second kind
    print(sentence)
"""

from minisft.common.errors import UserError
from minisft.gguf.mapping import ARCHITECTURES
from minisft.model.config import ModelConfig

USE_HF = "Export it with --format hf."


def check_architecture(config: ModelConfig) -> None:
    """UserError if llama.cpp cannot run the model."""
    architecture, scaling = ARCHITECTURES[config.model_type], config.rope_scaling or {}
    if config.head_dim % 2:
        raise UserError(
            f"llama.cpp cannot run models with an odd head_dim ({config.head_dim}). {USE_HF}"
        )
    width = config.head_dim * config.num_attention_heads
    if architecture == "qwen2" and width != config.hidden_size:
        raise UserError(
            "llama.cpp computes head_dim of qwen2 as hidden_size / num_attention_heads; this "
            f"checkpoint has head_dim {config.head_dim}. {USE_HF}"
        )
    biases = {"attention": config.attention_bias, "MLP": config.mlp_bias}
    for part, has_bias in biases.items():
        if architecture in ("qwen3", "smollm3") and has_bias:
            raise UserError(
                f"llama.cpp's {architecture} has no {part} biases, but this model has them. "
                f"{USE_HF}"
            )
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if architecture == "smollm3" and config.no_rope_layers != every_fourth:
        raise UserError(
            "llama.cpp's smollm3 leaves rotary positions out of every fourth layer, but this "
            f"checkpoint has no_rope_layers {config.no_rope_layers}. {USE_HF}"
        )
    if architecture == "baichuan" and config.num_hidden_layers != (40 if config.alibi else 32):
        raise UserError(
            "llama.cpp expects 32 layers of Baichuan2 with rotary positions, and 40 with ALiBi; "
            f"this checkpoint has {config.num_hidden_layers} layers. {USE_HF}"
        )
    if scaling.get("rope_type") == "llama3" and architecture != "llama":
        raise UserError(
            "llama.cpp has the rotary scaling llama3 for Llama and Mistral only, not for "
            f"{architecture}. {USE_HF}"
        )
    if scaling.get("rope_type") == "yarn" and not scaling.get("truncate", True):
        raise UserError(
            f"llama.cpp's YaRN always truncates; this model says truncate = false. {USE_HF}"
        )


def known_differences(config: ModelConfig) -> list[str]:
    """Sentences that say where the computation of llama.cpp differs from the checkpoint's."""
    sentences = []
    if config.has_dynamic_rope:
        sentences.append(
            "llama.cpp does not know dynamic rotary scaling: answers differ beyond "
            f"{config.max_position_embeddings} tokens"
        )
    scaling = config.rope_scaling or {"rope_type": "default"}
    flags = [
        f"--yarn-{name.replace('_', '-')} {scaling[name]}"
        for name, usual in (("beta_fast", 32), ("beta_slow", 1))
        if scaling["rope_type"] == "yarn" and (scaling.get(name) or usual) != usual
    ]
    if flags:
        sentences.append(
            "llama.cpp does not read YaRN's beta_fast and beta_slow from the file: answers are "
            f"wrong without its flags {' '.join(flags)}"
        )
    window, length = config.sliding_window, config.max_position_embeddings
    if "sliding_attention" in config.layer_types and window is not None and window < length:
        sentences.append(
            "llama.cpp does not use this model's sliding window: answers differ beyond "
            f"{window} tokens"
        )
    return sentences
