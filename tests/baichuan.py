"""Small random Baichuan2 models of both sizes, and their oracles.

    folder = write_checkpoint(tmp_path, "13B")
    theirs = published_model(shared_data / "baichuan2", folder)     # the published code, 13B only
    theirs = as_llama(folder)                                       # transformers' Llama, 7B only

The published code is for transformers 4: stubs replace its other files.
"""

import importlib
import json
import sys
import types

import torch
import transformers
from safetensors.torch import load_file

from minisft.checkpoints.folders import save_model
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM

SMALL = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "model_type": "baichuan",
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,  # no power of two, like the 40 heads of the 13B model
    "model_max_length": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# The differences between the config.json of the two models, besides numbers.
SIZES = {"7B": {"max_position_embeddings": 512}, "13B": {}}
PACKAGE = "published_baichuan2"


@torch.no_grad()
def random_model(size, **fields):
    """A model that shows mistakes: norms are not ones, rows of the head differ in length."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict({**SMALL, **SIZES[size], **fields})).eval()
    model.initialize()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    head = model.lm_head.weight
    head *= torch.linspace(0.5, 20, len(head))[:, None]
    return model


def write_checkpoint(folder, size, **fields):
    """Its checkpoint, with config.json as published."""
    save_model(random_model(size, **fields), folder)
    (folder / "config.json").write_text(json.dumps({**SMALL, **SIZES[size], **fields}))
    return folder


def published_code(source):
    """The module modeling_baichuan of a folder."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(source)]
        configuration = types.ModuleType(f"{PACKAGE}.configuration_baichuan")
        configuration.BaichuanConfig = BaichuanConfig
        sys.modules |= {PACKAGE: package, configuration.__name__: configuration}
    return importlib.import_module(f"{PACKAGE}.modeling_baichuan")


class BaichuanConfig(transformers.PretrainedConfig):
    """A stub of configuration_baichuan.py, which the folder lacks."""

    model_type = "baichuan"
    gradient_checkpointing, z_loss_weight = False, 0


def published_model(source, folder):
    """The checkpoint in a folder, computed by the published code of the 13B model."""
    content = json.loads((folder / "config.json").read_text())
    model = published_code(source).BaichuanForCausalLM(BaichuanConfig(**content)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def as_llama(folder):
    """The checkpoint of a 7B model as transformers' Llama: W_pack cut, the head normalised."""
    content = json.loads((folder / "config.json").read_text())
    names = content.keys() - {"architectures", "auto_map", "model_type", "tokenizer_class"}
    config = transformers.LlamaConfig(**{name: content[name] for name in names})
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.nn.functional.normalize(tensors["lm_head.weight"])
    for name in [name for name in tensors if "W_pack" in name]:
        for part, rows in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("W_pack", f"{part}_proj")] = rows.contiguous()
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model
