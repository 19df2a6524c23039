"""Write a checkpoint, with or without an adapter, as a GGUF file for llama.cpp and Ollama.

    report = export_model("examples/base", "base-q8_0.gguf", "q8_0", adapter_dir="runs/cherry")

The path of a tensor:

    model.layers.0.self_attn.q_proj.weight    rows from the checkpoint's file, in float32
    + scaling * B A                           if the adapter changes this module
    rows of a head are reordered              q_proj and k_proj only: mapping.py
    Q4_K                                      the number type: tensor_types.py, writer.py
    blk.0.attn_q.weight                       the name in the GGUF file: mapping.py

A few million numbers are converted at a time, so memory does not grow with the model. The model
itself is built on the meta device, only for its names and shapes.

The tour explains it: docs/tour/12_ship.md.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import torch
import torch.nn.functional as F

from minisft.checkpoints.adapter_forms import Change, read_adapter, tokenizer_dir
from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.folders import generation_eos, open_model
from minisft.checkpoints.gguf_report import Report, larger_types, num_parameters, summarize
from minisft.checkpoints.tied_weights import OUTPUT
from minisft.common.json_files import read_json
from minisft.common.tensor_files import StoredTensor
from minisft.gguf.compatibility import check_architecture, known_differences
from minisft.gguf.mapping import (
    ARCHITECTURES,
    ROTARY_DIVISORS,
    architecture_fields,
    gguf_name,
    interleave,
    is_interleaved,
    rotary_divisors,
    sampling_fields,
    tensor_parts,
)
from minisft.gguf.prompts import llama_cpp_prompts
from minisft.gguf.tensor_types import QUANTIZATIONS, tensor_type
from minisft.gguf.vocabulary import vocabulary_fields
from minisft.gguf.writer import Tensor, write_gguf
from minisft.model.decoder import CausalLM
from minisft.model.lora_tools import adapted_modules, plain_name
from minisft.text.saved_form import saved_form
from minisft.text.tokenizer import Tokenizer


def export_model(
    model_dir: str | Path,
    output: str | Path,
    quantization: str,
    adapter_dir: str | Path | None = None,
    name: str | None = None,
    template: str = "auto",
    **template_choices: Any,
) -> Report:
    """Write a checkpoint, with the adapter merged into it.

    quantization: a key of QUANTIZATIONS. name: the display name of the model; by default the
    folder's name. template, template_choices: the chat template for other programs, see saved_form.
    UserError, and no file, if llama.cpp cannot run the model, a number does not fit its type, or
    the disk is full.
    """
    model_dir = Path(model_dir)
    model, stored = open_model(model_dir, CausalLM)
    adapter: dict[str, StoredTensor] = {}
    changes: dict[str, Change] = {}
    if adapter_dir is not None:
        forms = read_adapter(adapter_dir, model.config.tie_word_embeddings)
        adapter, changes = forms.tensors, forms.changes
        load_adapter(model, adapter_dir)
    config, tokenizer = model.config, Tokenizer.load(tokenizer_dir(model_dir, adapter_dir))
    check_architecture(config)
    tensors = model_tensors(model, stored, adapter, quantization, changes)
    listed_stops = generation_eos(model_dir, config)
    trained_dir = adapter_dir or model_dir
    form = saved_form(tokenizer, template, trained_dir, listed_stops, **template_choices)
    prompts = llama_cpp_prompts(form, tokenizer)
    metadata = {
        "general.type": "model",
        "general.name": name or model_dir.resolve().name,
        "general.size_label": gguf.size_label(num_parameters(tensors), 0, 0, 0),
        **sampling_fields(
            read_json(model_dir / "generation_config.json", missing={}), config.context_length
        ),
        **architecture_fields(config),
        "general.file_type": int(QUANTIZATIONS[quantization][0]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **vocabulary_fields(tokenizer, config.vocab_size, form.stop_ids, prompts),
    }
    write_gguf(output, ARCHITECTURES[config.model_type], metadata, tensors)
    notes = larger_types(tensors, quantization, config) + known_differences(config)
    return Report(summarize(output, tensors), notes + form.notes + prompts.notes)


def model_tensors(
    model: CausalLM,
    stored: Mapping[str, StoredTensor],
    adapter: Mapping[str, StoredTensor],
    quantization: str,
    changes: Mapping[str, Change] = MappingProxyType({}),
) -> list[Tensor]:
    """The tensors of the file, in the order of the model.

    model: on the meta device, wrapped with the adapter. stored and adapter: {name: StoredTensor}.
    changes: {name: another change of its rows by the adapter}, see adapter_forms.py.
    """
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    scalings = {name: module.scaling for name, module in adapted_modules(model).items()}
    tensors = []
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name:
            continue
        name = plain_name(parameter_name)
        # An adapter can replace a module. If it has untied lm_head from the embedding without
        # training it, lm_head still equals the embedding.
        source = adapter.get(name) or stored.get(name) or stored["model.embed_tokens.weight"]
        # An adapter changes the base, as load_adapter does; then come B A and the NormHead.
        before = [changes[name]] if name in changes else []
        after = [normalize_rows] if config.norm_head and name == OUTPUT else []
        lora, module_name = None, name.removesuffix(".weight")
        if module_name in scalings:
            A, B = (adapter[f"{module_name}.lora_{factor}.weight"] for factor in "AB")
            lora = A, B, scalings[module_name]
        for part, first, last in tensor_parts(name, parameter.shape[0]):
            head_dim = config.head_dim if is_interleaved(part, architecture) else None
            shape = (last - first, *parameter.shape[1:])
            tensors.append(
                Tensor(
                    gguf_name(part),
                    shape,
                    tensor_type(gguf_name(part), shape, quantization, config),
                    read=partial(read_rows, source, lora, head_dim, before, after, first),
                    row_group=head_dim or 1,
                )
            )
    divisors = rotary_divisors(config)
    if divisors is not None:
        tensors.append(
            Tensor(
                ROTARY_DIVISORS,
                tuple(divisors.shape),
                gguf.GGMLQuantizationType.F32,
                read=lambda begin, end, divisors=divisors: divisors[begin:end],
            )
        )
    return tensors


def read_rows(
    source: StoredTensor,
    lora: tuple[StoredTensor, StoredTensor, float] | None,
    head_dim: int | None,
    before: Sequence[Change],
    after: Sequence[Change],
    first: int,
    begin: int,
    end: int,
) -> torch.Tensor:
    """Rows begin..end-1 of a tensor of the file in float32, merged and in the file's order.

    lora: (A, B, scaling). head_dim: set if rows are reordered; begin and end are multiples. first:
    the row of `source` with which the tensor begins. before, after: changes of the rows before and
    after B A is added.
    """
    begin, end = first + begin, first + end
    rows = source.read(begin, end).float()
    for change in before:
        rows = change(rows, begin)
    if lora:
        A, B, scaling = lora
        rows = rows + scaling * (B.read(begin, end).float() @ A.read().float())
    for change in after:
        rows = change(rows, begin)
    return interleave(rows, head_dim).contiguous() if head_dim else rows


def normalize_rows(rows: torch.Tensor, begin: int) -> torch.Tensor:
    """The rows with length 1, which llama.cpp expects of a NormHead."""
    return F.normalize(rows)
