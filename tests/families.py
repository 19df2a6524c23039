"""Small random models of every family and rotary type, built by transformers."""

import json

import torch
import transformers

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
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
    "yarn, untruncated": {
        "model_type": "qwen2",
        "rope_scaling": {
            **YARN,
            "truncate": False,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.3,
        },
    },
    "yarn, mscale": {
        "model_type": "llama",
        "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    },
    "rope_parameters": {
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE},
    },
    "yarn, its context stated twice": {
        "model_type": "llama",
        "rope_scaling": YARN,
        "original_max_position_embeddings": 48,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000},
    "qwen3, default head_dim": {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "rope_scaling": YARN},
    "smollm3, every second layer": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "smollm3, biases, listed": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 1],
        "rope_theta": 5000000.0,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
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
