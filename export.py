"""Write a trained model for other programs, in the format that they read.

    python export.py --model_name_or_path base --adapter runs/cherry --format hf --output_dir merged
    python export.py --model_name_or_path base --adapter runs/cherry --format gguf \
        --quantization q4_k_m --output cherry.gguf

    hf           a folder for transformers and vLLM, with the adapter merged
    peft         a folder with the adapter alone, for peft
    gguf         a file for llama.cpp, Ollama and LM Studio, with the adapter merged
    gguf-lora    a file with the adapter alone, for llama.cpp's --lora

A reward model (train.py --stage rm) becomes transformers' LlamaForSequenceClassification.
"""

from argparse import Namespace
from pathlib import Path

from minisft.common.command_line import QUANTIZATIONS, OptionParser
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags, dtype_option
from minisft.common.outputs import (
    check_output_dir,
    check_output_file,
    recorded_options,
    save_options,
)
from minisft.common.script import run_script

FILE_FORMATS = ("gguf", "gguf-lora")


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """The options; UserError for flags that are missing or have no effect."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = add_model_flags(parser, auto_dtype="the checkpoint's; float32 for peft")
    add("--adapter", help="LoRA adapter to merge (hf, gguf) or to write (peft, gguf-lora)")
    add, switch = parser.section("output")
    formats = ["hf", "peft", *FILE_FORMATS]
    add("--format", choices=formats, default="hf", help="the model, or the adapter alone")
    add("--output_dir", help="folder to write: hf, peft")
    add("--output", help="file to write: gguf, gguf-lora")
    add("--quantization", choices=QUANTIZATIONS, default="f16", help="number type in a GGUF file")
    add("--template", default="auto", help="chat template to write (auto: that of the training)")
    switch("--overwrite_output_dir", "write into a folder that is not empty, or over a file")
    add("--max_shard_size", default="5GB", help="split the weights into files of at most this size")
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def check_options(options: Namespace, given: set[str]) -> None:
    """UserError for flags that are missing, or that the format does not use."""
    format = options.format
    needed = "output" if format in FILE_FORMATS else "output_dir"
    if needed not in given:
        raise UserError(f"--format {format} needs --{needed}")
    if format in ("peft", "gguf-lora") and not options.adapter:
        raise UserError(f"--format {format} needs --adapter")
    unused = {
        "hf": {"output", "quantization"},
        "peft": {"output", "quantization", "max_shard_size", "quantization_bit"},
        "gguf": {"output_dir", "max_shard_size", "quantization_bit"},
        "gguf-lora": {"output_dir", "max_shard_size", "quantization_bit", "template"},
    }[format]
    if format in FILE_FORMATS:
        unused |= {"dtype", "bf16", "fp16", "device"}
    if unused & given:
        hint = "; --quantization sets the number type" if format in FILE_FORMATS else ""
        raise UserError(f"--format {format} does not use --{min(unused & given)}{hint}")


def check_output(options: Namespace) -> Path:
    """The file or folder to write; UserError if it is an input, or exists."""
    inputs, overwrite = (options.model_name_or_path, options.adapter), options.overwrite_output_dir
    if options.format in FILE_FORMATS:
        flag = "--overwrite_output_dir"
        return check_output_file("--output", options.output, inputs, overwrite, flag)
    return check_output_dir(options.output_dir, overwrite, *inputs)


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


def main() -> None:
    options = parse_options()
    output = check_output(options)

    # Loading torch takes seconds, so everything above comes first.
    import torch

    from minisft.checkpoints import adapters, folders
    from minisft.checkpoints.adapter_forms import (
        read_adapter,
        refuse_untrainable,
        tokenizer_dir,
    )
    from minisft.checkpoints.gguf_export import export_model
    from minisft.checkpoints.gguf_lora import export_adapter
    from minisft.checkpoints.hub import resolve
    from minisft.checkpoints.reward_models import choose_padding, has_head, load_reward_model
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.common.tensor_files import ADAPTER_CONFIG, parse_size
    from minisft.gguf.reader import is_gguf
    from minisft.model.lora import merge_lora
    from minisft.text.chat_template import conversation_form
    from minisft.text.tokenizer import Tokenizer

    if output.is_file() and not is_gguf(output):
        raise UserError(f"--output {output} exists and is not a GGUF file. Choose another name.")
    max_shard_size = parse_size(options.max_shard_size)
    device = resolve_device(options.device)
    model_dir = resolve(options.model_name_or_path)
    adapter_dir = resolve(options.adapter, ADAPTER_CONFIG) if options.adapter else None
    trained_dir = adapter_dir or model_dir  # where train.py has left its options
    if adapter_dir and (note := quantization_note(options, adapter_dir)):
        print(f"note: {note}")

    # The GGUF formats go from file to file; the model is never loaded.
    if options.format in FILE_FORMATS:
        if adapter_dir and options.format == "gguf-lora":
            report = export_adapter(model_dir, adapter_dir, output, options.quantization)
        else:
            paths = [options.model_name_or_path, options.adapter]
            name = " + ".join(Path(path).resolve().name for path in paths if path)
            report = export_model(
                model_dir, output, options.quantization, adapter_dir, name, options.template
            )
        print(f"wrote {output}: {report.summary}")
        for note in report.notes:
            print(f"note: {note}")
        return

    # The folders need the model and the adapter, in memory.
    stored_dtype = folders.stored_dtype(model_dir)
    auto_dtype = torch.float32 if options.format == "peft" else stored_dtype
    dtype = resolve_dtype(dtype_option(options), device, auto_dtype)
    is_reward_model = has_head(model_dir, adapter_dir)
    load = load_reward_model if is_reward_model else folders.load_model
    model = load(model_dir, stored_dtype, device, options.quantization_bit)
    if adapter_dir and options.format == "peft":
        forms = read_adapter(adapter_dir, model.config.tie_word_embeddings)
        refuse_untrainable(forms, "written again")
    lora_config = adapters.load_adapter(model, adapter_dir) if adapter_dir else None

    # Other programs must use the chat template of the training.
    tokenizer = Tokenizer.load(tokenizer_dir(model_dir, adapter_dir))
    listed_stops = folders.generation_eos(model_dir, model.config)
    form = conversation_form(tokenizer, options.template, trained_dir, listed_stops)
    if is_reward_model:
        choose_padding(model, tokenizer, form.stop_ids)

    if lora_config and options.format == "peft":
        adapters.save_adapter(model, output, lora_config, options.model_name_or_path, dtype)
    else:
        merge_lora(model, dtype)
        folders.save_model(model, output, dtype, max_shard_size)
        folders.save_generation_config(model_dir, output, model.config, form.stop_ids)
    tokenizer.save(output, form.chat_template)
    trained = recorded_options(trained_dir)
    template = trained.get("template") if options.template == "auto" else options.template
    record = Namespace(template=template, default_system=trained.get("default_system"))
    save_options(record, output / "options.toml")  # for chat.py
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main)
