"""A checkpoint, with or without an adapter, as the one file that llama.cpp and Ollama run.

    summary = export_model("examples/base", "base-q8_0.gguf", "q8_0", adapter_dir="runs/cherry")
    export_adapter("examples/base", "runs/cherry", "cherry.gguf", "f16")    # for llama.cpp's --lora

Tensors go from the checkpoint's files to the GGUF file a few million numbers at a time: read, add
the adapter's update, reorder, convert, write. Memory holds a few such pieces, however large the
model is.
"""

import math
from collections import Counter
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from minisft.checkpoints import adapters, folders
from minisft.common.errors import UserError
from minisft.common.json_files import read_json
from minisft.gguf.mapping import (
    ARCHITECTURES,
    ROTARY_DIVISORS,
    architecture_fields,
    gguf_name,
    interleaved,
    is_interleaved,
    known_differences,
    rotary_divisors,
)
from minisft.gguf.vocabulary import tokenizer_differences, vocabulary_fields
from minisft.gguf.writer import TORCH_TYPES, Tensor, write_gguf
from minisft.model.lora import LoRALinear
from minisft.text.chat_template import conversation_form
from minisft.text.tokenizer import Tokenizer

# --quantization -> the type of the file and of most of its matrices.
QUANTIZATIONS = {
    "f32": (LlamaFileType.ALL_F32, Type.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, Type.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "q4_1": (LlamaFileType.MOSTLY_Q4_1, Type.Q4_1),
    "q5_0": (LlamaFileType.MOSTLY_Q5_0, Type.Q5_0),
    "q5_1": (LlamaFileType.MOSTLY_Q5_1, Type.Q5_1),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
}
# What a row takes whose length the blocks of a type do not divide (llama.cpp's choice).
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
# generation_config.json -> the defaults that llama.cpp's server takes over, and their types there.
SAMPLING = {
    "temperature": ("temp", float),
    "top_k": ("top_k", np.int32),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}


def export_model(model_dir, output, quantization, adapter_dir=None, name=None, template="auto"):
    """Write checkpoint `model_dir`, with the adapter merged if there is one; returns a summary.

    name: what programs show for the model, by default the folder's. template: the conversation
    format that they are to use, see conversation_form. The summary is {"tensors", "parameters",
    "bytes", "bits_per_weight", "types": {type name: tensors}, "notes": sentences on what llama.cpp
    will do differently}. Raises UserError where the model cannot be expressed, a number does not
    fit the type, or the disk is too small; no file is left then.
    """
    model_dir = Path(model_dir)
    model, stored = folders.open_model(model_dir)
    adapter = {}
    if adapter_dir is not None:
        adapters.load_adapter(model, adapter_dir)
        adapter = adapters.adapter_tensors(adapter_dir)
    config, tensors = model.config, model_tensors(model, stored, adapter, quantization)
    tokenizer = Tokenizer.load(model_dir)
    form = conversation_form(
        tokenizer,
        template,
        adapter_dir or model_dir,
        folders.generation_eos(model_dir, config),
        for_llama_cpp=True,
    )
    metadata = {
        "general.type": "model",
        "general.name": name or model_dir.resolve().name,
        "general.size_label": gguf.size_label(num_parameters(tensors), 0, 0, 0),
        **sampling_fields(model_dir),
        **architecture_fields(config),
        "general.file_type": int(QUANTIZATIONS[quantization][0]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **vocabulary_fields(tokenizer, config.vocab_size, form.stop_ids, form.writes_space),
    }
    if form.chat_template is not None:
        metadata["tokenizer.chat_template"] = form.chat_template
    write_gguf(output, ARCHITECTURES[config.model_type], metadata, tensors)
    notes = known_differences(config) + tokenizer_differences(form)
    return summary_of(output, tensors, notes)


def model_tensors(model, stored, adapter, quantization):
    """The tensors of the file, in the order of the model; adapted ones merged as they are read."""
    config, architecture, tensors = model.config, ARCHITECTURES[model.config.model_type], []
    scalings = {
        name: module.scaling
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        module, _, kind = name.rpartition(".")
        # An adapter brings whole modules too; where it has parted lm_head from a tied embedding
        # without training it, the embedding is still its source.
        source = adapter.get(name) or stored.get(name) or stored["model.embed_tokens.weight"]
        factors = ()
        if module in scalings and kind == "weight":
            factors = (
                adapter[f"{module}.lora_A.weight"],
                adapter[f"{module}.lora_B.weight"],
                scalings[module],
            )
        head_dim = config.head_dim if is_interleaved(name, architecture) else None
        type = tensor_type(gguf_name(name), parameter.shape, quantization, config)
        tensors.append(
            Tensor(
                gguf_name(name),
                tuple(parameter.shape),
                type,
                partial(read_rows, source, factors, head_dim),
                head_dim or 1,
            )
        )
    divisors = rotary_divisors(config)
    if divisors is not None:
        tensors.append(
            Tensor(
                ROTARY_DIVISORS,
                tuple(divisors.shape),
                Type.F32,
                lambda begin, end: divisors[begin:end],
            )
        )
    return tensors


def read_rows(source, factors, head_dim, begin, end):
    """Rows of a stored tensor in float32, LoRA's update added, reordered where heads rotate."""
    rows = source.read(begin, end).float()
    if factors:
        A, B, scaling = factors
        rows += scaling * (B.read(begin, end).float() @ A.read().float())
    return interleaved(rows, head_dim).contiguous() if head_dim else rows


def tensor_type(name, shape, quantization, config):
    """The type of a tensor in the file: llama.cpp's own choice for its quantised files.

    Vectors are few and matter: float32. The output matrix (a tied embedding is one) decides between
    tokens and stays finer than the rest; in q4_k_m so do the values and the down projections of the
    first and last eighth of the layers and of every third between.
    """
    type = QUANTIZATIONS[quantization][1]
    if len(shape) == 1:
        return Type.F32
    if type in TORCH_TYPES:
        return type
    output = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if name == output and type != Type.Q8_0:
        type = Type.Q6_K
    if quantization == "q4_k_m" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer, eighth = int(name.split(".")[1]), config.num_hidden_layers // 8
        last = 7 * config.num_hidden_layers // 8
        # For the values of a 70B model, few and shared by many heads, llama.cpp takes Q5_K, which
        # is not written here.
        is_shared = config.num_hidden_layers == 80 and name.endswith("attn_v.weight")
        if layer < eighth or layer >= last or (layer - eighth) % 3 == 2 or is_shared:
            type = Type.Q6_K
    if shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
        type = FALLBACKS.get(type, Type.F16)
    return type if shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0 else Type.F16


def sampling_fields(model_dir):
    """The sampling that generation_config.json recommends, as metadata."""
    content = read_json(Path(model_dir) / "generation_config.json", missing={})
    return {
        f"general.sampling.{ours}": kind(content[theirs])
        for theirs, (ours, kind) in SAMPLING.items()
        if type(content.get(theirs)) in (int, float) and 0 <= content[theirs] < 2**31
    }


def num_parameters(tensors):
    """How many numbers they hold."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


def summary_of(output, tensors, notes=()):
    """What export_model and export_adapter return."""
    parameters = num_parameters(tensors)
    bits = 8 * sum(tensor.nbytes for tensor in tensors) / parameters
    types = Counter(tensor.type.name for tensor in tensors)
    return {
        "tensors": len(tensors),
        "parameters": parameters,
        "bits_per_weight": bits,
        "bytes": Path(output).stat().st_size,
        "types": dict(types),
        "notes": list(notes),
    }


def export_adapter(model_dir, adapter_dir, output, quantization):
    """Write the adapter alone, for llama.cpp's `--lora`; returns a summary like export_model's."""
    model, _ = folders.open_model(model_dir)
    lora, adapter = adapters.load_adapter(model, adapter_dir), adapters.adapter_tensors(adapter_dir)
    config, architecture, tensors = model.config, ARCHITECTURES[model.config.model_type], []
    if lora.modules_to_save:
        raise UserError(
            f"{adapter_dir}: has trained {', '.join(lora.modules_to_save)} in full, "
            "which --lora cannot express; use --format gguf"
        )
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        A, B = (adapter[f"{name}.lora_{one}.weight"] for one in "AB")
        # llama.cpp multiplies by alpha / rank, whatever kind of LoRA it is.
        factor = module.scaling * A.shape[0] / lora.alpha
        head_dim = config.head_dim if is_interleaved(f"{name}.weight", architecture) else None
        tensors += [
            _adapter_tensor(f"{name}.weight", "a", A, quantization, 1.0, None),
            _adapter_tensor(f"{name}.weight", "b", B, quantization, factor, head_dim),
        ]
    metadata = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": lora.alpha,
        "general.name": Path(adapter_dir).resolve().name,
        "general.file_type": int(QUANTIZATIONS[quantization][0]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    write_gguf(output, architecture, metadata, tensors)
    return summary_of(output, tensors)


def _adapter_tensor(name, side, stored, quantization, factor, head_dim):
    """One of a module's two matrices, `a` or `b`, multiplied by `factor` as it is read."""

    def read(begin, end):
        """Its rows begin..end-1."""
        return factor * read_rows(stored, (), head_dim, begin, end)

    type = QUANTIZATIONS[quantization][1]
    if stored.shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
        type = Type.F16
    return Tensor(f"{gguf_name(name)}.lora_{side}", stored.shape, type, read, head_dim or 1)
