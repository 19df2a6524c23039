"""A LoRA adapter alone as a GGUF file, for llama.cpp's --lora.

report = export_adapter("examples/base", "runs/cherry", "cherry.gguf", "f16")
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

import gguf
import torch

from minisft.checkpoints.adapter_forms import LORA_HEAD, read_adapter, refuse_untrainable
from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.folders import generation_eos, open_model
from minisft.checkpoints.gguf_export import read_rows
from minisft.checkpoints.gguf_report import Report, summarize
from minisft.checkpoints.tied_weights import EMBEDDING, OUTPUT, equal_tensors
from minisft.common.errors import UserError
from minisft.common.tensor_files import StoredTensor
from minisft.gguf.mapping import ARCHITECTURES, gguf_name, is_interleaved, tensor_parts
from minisft.gguf.tensor_types import QUANTIZATIONS
from minisft.gguf.writer import Tensor, write_gguf
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora_tools import adapted_modules
from minisft.text.saved_form import saved_form
from minisft.text.template_choice import CHAT_TEMPLATE
from minisft.text.tokenizer import Tokenizer


def export_adapter(
    model_dir: str | Path, adapter_dir: str | Path, output: str | Path, quantization: str
) -> Report:
    """Write an adapter. Arguments and errors as in export_model."""
    model, base = open_model(model_dir, CausalLM)
    is_tied = model.config.tie_word_embeddings
    forms = read_adapter(adapter_dir, is_tied)
    refuse_untrainable(forms, "written for --lora")
    lora, adapter = load_adapter(model, adapter_dir), forms.tensors
    if is_tied and LORA_HEAD in adapter:  # the file of the base has no output matrix to change
        raise UserError(
            f"{adapter_dir}: changes lm_head, which is the embedding in this base. --lora cannot "
            "express that; use --format gguf"
        )
    base.setdefault(OUTPUT, base[EMBEDDING])  # tied
    complete = [
        name
        for name in forms.replaced_modules()
        # PEFT can store the base's embeddings beside the adapter, unchanged.
        if not equal_tensors(adapter[f"{name}.weight"], base[f"{name}.weight"])
    ]
    if complete:
        raise UserError(
            f"{adapter_dir}: holds {', '.join(complete)} in full, which --lora "
            "cannot express; use --format gguf"
        )
    architecture = ARCHITECTURES[model.config.model_type]
    file_type, type = QUANTIZATIONS[quantization]
    alpha = lora.alpha or 1.0  # llama.cpp multiplies by 1 if the file says 0
    tensors = []
    for name, module in adapted_modules(model).items():
        A, B = (adapter[f"{name}.lora_{factor}.weight"] for factor in "AB")
        # llama.cpp multiplies by alpha / rank, also for rsLoRA, so B is scaled by the ratio.
        factor = module.scaling * A.shape[0] / alpha
        for part, first, last in tensor_parts(f"{name}.weight", B.shape[0]):
            # The rows of B are the outputs of the module, reordered like the rows of its weight.
            head_dim = model.config.head_dim if is_interleaved(part, architecture) else None
            tensors += [
                _tensor(f"{gguf_name(part)}.lora_a", A, type, 1.0, None, 0, A.shape[0]),
                _tensor(f"{gguf_name(part)}.lora_b", B, type, factor, head_dim, first, last),
            ]
    metadata = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        "general.name": Path(adapter_dir).resolve().name,
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    write_gguf(output, architecture, metadata, tensors)
    return Report(summarize(output, tensors), prompt_notes(model.config, model_dir, adapter_dir))


def prompt_notes(config: ModelConfig, model_dir: str | Path, adapter_dir: str | Path) -> list[str]:
    """A note if the base's own chat template is not that of the training.

    llama.cpp prompts by the file of the base: an adapter's file has no template.
    """
    saved = Path(adapter_dir) / CHAT_TEMPLATE
    with suppress(UserError):  # a base without a tokenizer, for instance
        tokenizer, listed_stops = Tokenizer.load(model_dir), generation_eos(model_dir, config)
        base, trained = (
            saved_form(tokenizer, "auto", folder, listed_stops).chat_template
            for folder in (model_dir, adapter_dir)
        )
        if saved.is_file() and trained != base:
            return [
                "llama.cpp takes the chat template from the file of the base, and this adapter was "
                f"trained with another one. Write the base with export.py --model_name_or_path "
                f"{model_dir} --format gguf --template {saved} --output BASE.gguf"
            ]
    return []


def _tensor(
    name: str,
    source: StoredTensor,
    type: gguf.GGMLQuantizationType,
    factor: float,
    head_dim: int | None,
    first: int,
    last: int,
) -> Tensor:
    """Rows first..last-1 of a factor, scaled. F16 if its rows cannot be cut into blocks."""
    if source.shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
        type = gguf.GGMLQuantizationType.F16
    read = partial(_read_rows, source, factor, head_dim, first)
    return Tensor(name, (last - first, *source.shape[1:]), type, read, head_dim or 1)


def _read_rows(
    source: StoredTensor, factor: float, head_dim: int | None, first: int, begin: int, end: int
) -> torch.Tensor:
    return factor * read_rows(source, None, head_dim, (), (), first, begin, end)
