"""Random weights in the shapes of well-known models, for the benchmarks.

write_checkpoint("runs/shape", "tinyllama", num_layers=2)         # files for both sides
model = random_model("llama3-8b", None, torch.bfloat16, "cuda")   # no files, on the GPU
twin = transformers_twin(model, "llama3-8b")                      # the same weights
"""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisft.common.devices import dtype_name
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM

COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "tiny": {
        "vocab_size": 1536,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    "small": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "tinyllama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "baichuan2-13b": {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "vocab_size": 125696,
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "model_max_length": 4096,
        "alibi": True,
    },
}


# A key of SHAPES, or fields of a config.json.
Shape = str | dict[str, Any]


def config_json(shape: Shape, num_layers: int | None = None) -> dict[str, Any]:
    """The content of config.json. num_layers: by default that of the shape."""
    content = COMMON | (SHAPES[shape] if isinstance(shape, str) else shape)
    return content | {"num_hidden_layers": num_layers or content["num_hidden_layers"]}


def write_checkpoint(
    folder: str | Path,
    shape: Shape,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_dir: str | Path | None = None,
) -> None:
    """Write config.json, one safetensors file for each layer, and an index.

    tokenizer_dir: copy the tokenizer files of this folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = config_json(shape, num_layers) | {"torch_dtype": dtype_name(dtype)}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(content))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    generator, shards, weight_map = torch.Generator().manual_seed(0), {}, {}
    for name in shapes:
        shard = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{shard}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {name: random_tensor(name, shapes[name], generator).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )
    for path in Path(tokenizer_dir).glob("*token*") if tokenizer_dir else ():
        shutil.copy(path, folder)


def write_in_own_process(*arguments: Any) -> None:
    """`write_checkpoint` in another process, so that its memory does not count for this one."""
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=arguments)
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"writing the checkpoint failed with status {writer.exitcode}")


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Ones for a norm, else normal values with the usual standard deviation."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * 0.02


def random_model(
    shape: Shape, num_layers: int | None, dtype: torch.dtype, device: torch.device | str
) -> CausalLM:
    """A frozen CausalLM with random weights, drawn on the device. No file is written."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(config_json(shape, num_layers)))
    model.requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value = value.fill_(1.0) if name.endswith("norm.weight") else value.normal_(0.0, 0.02)
        owner, _, attribute = name.rpartition(".")
        setattr(
            model.get_submodule(owner), attribute, torch.nn.Parameter(value, requires_grad=False)
        )
    return model.eval()


def transformers_twin(model: CausalLM, shape: Shape) -> Any:
    """The same model in transformers, on the same tensors in memory, with torch's attention."""
    # Imported here, so that a stage without a peer does not import it.
    from transformers import AutoModelForCausalLM, LlamaConfig

    weights = model.state_dict()
    embedding = weights["model.embed_tokens.weight"]
    with torch.device(embedding.device):
        twin = AutoModelForCausalLM.from_config(
            LlamaConfig(**config_json(shape, model.config.num_hidden_layers)),
            dtype=embedding.dtype,
            attn_implementation="sdpa",
        )
    twin.load_state_dict(weights, assign=True)
    twin.generation_config.eos_token_id = None  # as for ours, no token ends an answer
    return twin.requires_grad_(False).eval()


@torch.inference_mode()
def logit_difference(model: CausalLM, twin: Any) -> float:
    """Relative difference of the logits on random tokens: norm of the difference / norm."""
    device = model.model.embed_tokens.weight.device
    tokens = torch.randint(3, model.config.vocab_size, (1, 64), device=device)
    ours, theirs = model.logits(model(tokens)).float(), twin(tokens).logits.float()
    return ((theirs - ours).norm() / ours.norm()).item()


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(parameters of the layers and the output matrix, which multiply every token; all)."""
    with torch.device("meta"):
        model = CausalLM(dataclasses.replace(config))
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = config.vocab_size * config.hidden_size
    return total - (0 if config.tie_word_embeddings else embedding), total
