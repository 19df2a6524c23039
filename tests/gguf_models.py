"""Small random checkpoints that GGUF can hold, and prompts for them."""

import shutil

import torch
from conftest import CONFIG

from minisft.checkpoints import folders
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM

VOCAB = 300
SMALL = {
    **CONFIG,
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
# llama.cpp knows the two sizes by their numbers of layers.
BAICHUAN2 = {
    "model_type": "baichuan",
    "hidden_size": 48,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED}
FAMILIES = {
    "llama": {},
    "llama, tied, llama3 rotation": {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "llama, linear rotation": {"rope_scaling": {"type": "linear", **STRETCHED}},
    "llama, YaRN": {"rope_scaling": {"rope_type": "yarn", **STRETCHED}},
    "llama, YaRN, its own temperature": {
        "rope_scaling": {
            "rope_type": "yarn",
            "attention_factor": 1.3,
            "beta_fast": 16.0,
            **STRETCHED,
        }
    },
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 32, "rope_theta": 500000.0},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3, YaRN": {
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "yarn", **STRETCHED},
    },
    "baichuan2, 7B": BAICHUAN2 | {"num_hidden_layers": 32},
    "baichuan2, 13B": BAICHUAN2 | {"num_hidden_layers": 40, "num_attention_heads": 6},
}


def save(folder, tokenizer_dir, content):
    """A random checkpoint. Biases and norms are random too, not zeros and ones."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**SMALL, **content}))
    model.initialize()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    folders.save_model(model, folder)  # last: tokenizer_dir may hold another model
    return folder


def prompts(vocab_size=VOCAB):
    """Prompts of one id, a few ids, and more than STRETCHED's original context."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(8, vocab_size, (length,), generator=generator).tolist()
        for length in (1, 17, 150)
    ]
