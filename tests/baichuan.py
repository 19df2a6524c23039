"""Small Baichuan2 models, and the published code as their oracle.

    theirs = published_model({**SMALL, **SIZES["13B"]})     # from ../shared/data/baichuan2
    folder = save(theirs, tmp_path)                         # a checkpoint as published

The published code is for transformers 4. Stubs stand for what transformers 5 no longer has.
"""

import importlib
import importlib.util
import json
import sys
import types

import torch
import transformers
from safetensors.torch import save_file

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
    "num_attention_heads": 6,
    "model_max_length": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SIZES = {"7B": {"max_position_embeddings": 512}, "13B": {}}
PACKAGE = "published_baichuan2"


def published_code(folder):
    """The module modeling_baichuan of a folder, in a package with the stubs that it needs."""
    name = f"{PACKAGE}.modeling_baichuan"
    if name in sys.modules:
        return sys.modules[name]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    configuration = types.ModuleType(f"{PACKAGE}.configuration_baichuan")
    configuration.BaichuanConfig = BaichuanConfig
    sys.modules |= {PACKAGE: package, configuration.__name__: configuration}
    return importlib.import_module(name)


class BaichuanConfig(transformers.PretrainedConfig):
    """What configuration_baichuan.py defines; that file is not in the folder."""

    model_type = "baichuan"
    gradient_checkpointing, z_loss_weight = False, 0


def published_model(folder, content):
    """A random model of the published 13B code, in evaluation mode."""
    torch.manual_seed(0)
    model = published_code(folder).BaichuanForCausalLM(BaichuanConfig(**content)).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model):
    """Weights whose mistakes show: norms are not ones, rows of the head differ in length."""
    for name, parameter in model.named_parameters():
        if "norm.weight" in name or "layernorm" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0.0, 0.3)
    head = model.lm_head.weight
    head *= torch.linspace(0.5, 20, len(head))[:, None]


def save(model, content, folder):
    """The checkpoint of a model, with its config.json as published."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(
        {n: t for n, t in tensors.items() if "future_mask" not in n}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(content))
    return folder
