"""Write a trained model for other programs, in the format that they read.

    python export.py --model_name_or_path base --adapter runs/cherry --format hf --output_dir merged
    python export.py --model_name_or_path base --adapter runs/cherry --format gguf \
        --quantization q4_k_m --output cherry.gguf

    hf           a folder for transformers and vLLM, with the adapter merged
    peft         a folder with the adapter alone, for peft
    gguf         a file for llama.cpp, Ollama and LM Studio, with the adapter merged
    gguf-lora    a file with the adapter alone, for llama.cpp's --lora

A reward model (train.py --stage rm) becomes transformers' LlamaForSequenceClassification. For
Baichuan2 transformers has no such class, and minisft alone reads the folder.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

from minisft.checkpoints.export_options import FILE_FORMATS, parse_options
from minisft.common.script import run_script
from minisft.data.early_checks import check_places

if __name__ == "__main__":
    # Before torch is imported, so that --help and a mistyped flag or path answer at once.
    command_line = run_script(lambda: check_places(parse_options()))
else:
    command_line = None

import torch

from minisft.checkpoints import adapters, folders
from minisft.checkpoints.adapter_forms import (
    read_adapter,
    refuse_untrainable,
    tokenizer_dir,
)
from minisft.checkpoints.code_files import copy_code_files
from minisft.checkpoints.gguf_export import export_model
from minisft.checkpoints.gguf_lora import export_adapter
from minisft.checkpoints.hub import model_or_base, resolve, resolve_adapter
from minisft.checkpoints.model_card import write_model_card
from minisft.checkpoints.new_folder import new_folder
from minisft.checkpoints.reward_models import choose_padding, has_head, load_reward_model
from minisft.common.devices import resolve_device, resolve_dtype
from minisft.common.errors import UserError
from minisft.common.metric_lines import read_metrics
from minisft.common.model_flags import dtype_option, template_options
from minisft.common.outputs import check_output_dir, check_output_file, recorded_options
from minisft.common.single_writer import single_writer
from minisft.common.tensor_files import ADAPTER_CONFIG, parse_size
from minisft.gguf.reader import is_gguf
from minisft.model.lora import merge_lora
from minisft.text.saved_form import saved_form
from minisft.text.tokenizer import Tokenizer


def main(options: Namespace | None = None) -> None:
    """Export with these options; by default those of the command line."""
    options = options or parse_options()
    options.model_name_or_path = model_or_base(options.model_name_or_path, options.adapter)
    output, is_file = check_output(options), options.format in FILE_FORMATS
    max_shard_size = parse_size(options.max_shard_size)
    model_dir = resolve(options.model_name_or_path)
    adapter_dir = resolve_adapter(options.adapter) if options.adapter else None
    if adapter_dir and (note := quantization_note(options, adapter_dir)):
        print(f"note: {note}")
    with single_writer(output, is_folder=not is_file):
        if is_file:
            write_file(options, model_dir, adapter_dir, output)
        else:
            write_folder(options, model_dir, adapter_dir, output, max_shard_size)


def check_output(options: Namespace) -> Path:
    """The file or folder to write; UserError if it is an input, or exists."""
    inputs = options.model_name_or_path, options.adapter
    if options.format in FILE_FORMATS:
        path = check_output_file("--output", options.output, inputs, options.overwrite)
        if path.is_file() and not is_gguf(path):
            raise UserError(f"--output {path} exists and is not a GGUF file. Choose another name.")
        return path
    return check_output_dir(options.output_dir, options.overwrite_output_dir, *inputs)


def quantization_note(options: Namespace, adapter_dir: Path) -> str | None:
    """A note if the adapter is merged into other weights than it was trained on."""
    trained = recorded_options(adapter_dir).get("quantization_bit")
    if options.format not in ("hf", "gguf") or trained == options.quantization_bit:
        return None
    note = f"the adapter was trained on {_weights(trained)}"
    note += f" and is merged into {_weights(options.quantization_bit)}"
    if options.format == "hf":
        flag = f"--quantization_bit {trained}" if trained else "no --quantization_bit"
        note += f"; with {flag} both are the same"
    return note


def _weights(bits: int | None) -> str:
    return f"{bits}-bit weights" if bits else "full weights"


def write_file(options: Namespace, model_dir: Path, adapter_dir: Path | None, output: Path) -> None:
    """Write a GGUF file. It goes from file to file; the model is never loaded."""
    if adapter_dir and options.format == "gguf-lora":
        report = export_adapter(model_dir, adapter_dir, output, options.quantization)
    else:
        paths = [options.model_name_or_path, options.adapter]
        name = " + ".join(Path(path).resolve().name for path in paths if path)
        report = export_model(
            model_dir,
            output,
            options.quantization,
            adapter_dir,
            name,
            options.template,
            **template_options(options),
        )
    print(f"wrote {output}: {report.summary}")
    for note in report.notes:
        print(f"note: {note}")


def write_folder(
    options: Namespace, model_dir: Path, adapter_dir: Path | None, output: Path, max_shard_size: int
) -> None:
    """Write the model or the adapter, with tokenizer, chat template and stop tokens."""
    device, stored_dtype = resolve_device(options.device), folders.stored_dtype(model_dir)
    auto_dtype = torch.float32 if options.format == "peft" else stored_dtype
    dtype = resolve_dtype(dtype_option(options), device, auto_dtype)
    is_reward_model = has_head(model_dir, adapter_dir)
    load = load_reward_model if is_reward_model else folders.load_model
    # A checkpoint may have weights in more digits than its embedding.
    loaded_dtype = torch.float32 if dtype == torch.float32 else stored_dtype
    model = load(model_dir, loaded_dtype, device, options.quantization_bit)
    if adapter_dir and options.format == "peft":
        forms = read_adapter(adapter_dir, model.config.tie_word_embeddings)
        refuse_untrainable(forms, "written again")
    lora_config = adapters.load_adapter(model, adapter_dir, dtype=dtype) if adapter_dir else None

    # Other programs must use the chat template of the training.
    trained_dir = adapter_dir or model_dir  # where train.py saved its options
    tokenizer = Tokenizer.load(tokenizer_dir(model_dir, adapter_dir))
    listed_stops = folders.generation_eos(model_dir, model.config)
    choices = template_options(options)
    form = saved_form(tokenizer, options.template, trained_dir, listed_stops, **choices)
    for note in form.notes:
        print(f"note: {note}")
    if is_reward_model:
        choose_padding(model, tokenizer, form.stop_ids)

    base, is_adapter = options.model_name_or_path, options.format == "peft"
    marker = ADAPTER_CONFIG if is_adapter else "config.json"
    if not is_adapter:
        merge_lora(model, dtype)
    advice = "Make room, or restore what is missing, and start again."
    with new_folder(output, marker, advice) as folder:
        if lora_config and is_adapter:
            adapters.save_adapter(model, folder, lora_config, base, dtype)
        else:
            folders.save_model(model, folder, dtype, max_shard_size)
            folders.save_generation_config(model_dir, folder, model.config, form.stop_ids)
        tokenizer.save(folder, form.chat_template)
        copy_code_files(model_dir, folder)
        write_model_card(
            output,
            recorded_options(trained_dir),
            base,
            read_metrics(trained_dir / "metrics.jsonl"),
            is_adapter,
            written_to=folder,
            context_length=model.config.context_length,
            is_reward_model=is_reward_model,
        )
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(partial(main, command_line))
