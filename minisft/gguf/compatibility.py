"""Models that llama.cpp cannot run, or runs differently.

check_architecture(config)                       # UserError for the first kind
for sentence in known_differences(config):       # notes on the second kind
    print(sentence)
"""

from minisft.common.errors import UserError
from minisft.gguf.mapping import ARCHITECTURES
from minisft.model.config import ModelConfig


def check_architecture(config: ModelConfig) -> None:
    """UserError if llama.cpp has no place for something that the model needs."""
    architecture, scaling = ARCHITECTURES[config.model_type], config.rope_scaling or {}
    if config.head_dim % 2:
        raise UserError(f"head_dim {config.head_dim} is odd: llama.cpp cannot rotate such heads")
    width = config.head_dim * config.num_attention_heads
    if architecture == "qwen2" and width != config.hidden_size:
        raise UserError(
            "llama.cpp computes head_dim of qwen2 as hidden_size / num_attention_heads; this "
            f"checkpoint has head_dim {config.head_dim}"
        )
    biases = {"attention": config.attention_bias, "MLP": config.mlp_bias}
    for part, has_bias in biases.items():
        if architecture in ("qwen3", "smollm3") and has_bias:
            raise UserError(
                f"llama.cpp's {architecture} has no {part} biases, but this checkpoint has"
            )
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if architecture == "smollm3" and config.no_rope_layers != every_fourth:
        raise UserError(
            "llama.cpp's smollm3 leaves rotary positions out of every fourth layer, but this "
            f"checkpoint has no_rope_layers {config.no_rope_layers}"
        )
    if architecture == "baichuan" and config.num_hidden_layers != (40 if config.alibi else 32):
        raise UserError(
            "llama.cpp knows Baichuan2's rotary positions by 32 layers and its ALiBi by 40; this "
            f"checkpoint has {config.num_hidden_layers} layers"
        )
    if scaling.get("rope_type") == "yarn" and not scaling.get("truncate", True):
        raise UserError("llama.cpp's YaRN always truncates; this checkpoint says truncate = false")


def known_differences(config: ModelConfig) -> list[str]:
    """Sentences about the computation: where llama.cpp deviates from the checkpoint."""
    sentences = []
    if (config.rope_scaling or {}).get("rope_type") == "dynamic":
        sentences.append(
            "llama.cpp does not know dynamic rotary scaling: answers differ beyond "
            f"{config.max_position_embeddings} tokens"
        )
    window, length = config.sliding_window, config.max_position_embeddings
    if "sliding_attention" in config.layer_types and window is not None and window < length:
        sentences.append(
            "llama.cpp does not use this model's sliding window: answers differ beyond "
            f"{window} tokens"
        )
    return sentences
