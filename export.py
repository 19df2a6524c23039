"""Write a model for others to use: merge an adapter, convert, split into shards.

    python export.py --model_name_or_path base --adapter runs/cherry --format hf --output_dir merged
    python export.py --model_name_or_path base --adapter runs/cherry --format gguf \
        --quantization q4_k_m --output cherry.gguf

hf is the folder that transformers, vLLM and others load, peft the adapter alone; gguf is the file
that llama.cpp, Ollama and LM Studio run, gguf-lora the adapter alone for llama.cpp's --lora. A
reward model (train.py --stage rm) becomes transformers' LlamaForSequenceClassification.
"""

from argparse import Namespace
from pathlib import Path

from minisft.common import tensor_files
from minisft.common.command_line import QUANTIZATIONS, OptionParser
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags
from minisft.common.outputs import (
    check_output_dir,
    check_output_file,
    recorded_options,
    save_options,
)
from minisft.common.script import run_script


def parse_options(arguments=None):
    """The options of export.py, checked; from the command line if no words are given."""
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = add_model_flags(parser, auto_dtype="the checkpoint's; float32 for peft")
    add("--adapter", help="LoRA adapter to merge (hf, gguf) or to write (peft, gguf-lora)")
    add, switch = parser.section("output")
    add(
        "--format",
        choices=["hf", "peft", "gguf", "gguf-lora"],
        default="hf",
        help="whole model (hf, gguf), or adapter alone (peft, gguf-lora)",
    )
    add("--output_dir", help="folder to write: hf, peft")
    add("--output", help="file to write: gguf, gguf-lora")
    add("--quantization", choices=QUANTIZATIONS, default="f16", help="type of the numbers in gguf")
    add(
        "--template",
        default="auto",
        help="conversation format that goes along (auto: the trained, else the checkpoint's)",
    )
    switch("--overwrite_output_dir", "write into a folder that has something in it, over a file")
    add("--max_shard_size", default="5GB", help="split the weights into files of at most this size")
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def check_options(options, given):
    """UserError for flags that are missing or that this format does not read."""
    to_file = options.format.startswith("gguf")
    needed, unread = ("output", "output_dir") if to_file else ("output_dir", "output")
    if needed not in given:
        raise UserError(f"--format {options.format} needs --{needed}")
    unread = {unread} | ({"dtype", "bf16", "fp16", "device"} if to_file else {"quantization"})
    if options.format != "hf":
        unread |= {"max_shard_size", "quantization_bit"}
    if options.format == "gguf-lora":
        unread |= {"template"}
    if unread & given:
        hint = "; --quantization says the type" if to_file else ""
        raise UserError(f"--format {options.format} does not read --{min(unread & given)}{hint}")
    if options.format in ("peft", "gguf-lora") and not options.adapter:
        raise UserError(f"--format {options.format} needs --adapter")


def main():
    options = parse_options()
    if options.format.startswith("gguf"):
        write_gguf(options)
    else:
        write_folder(options)


def write_gguf(options):
    """The GGUF formats: tensor by tensor from file to file, the model is never loaded."""
    output = check_gguf_output(options)

    from minisft.checkpoints import hub
    from minisft.checkpoints.gguf_export import export_adapter, export_model

    model_dir, adapter_dir = hub.resolve(options.model_name_or_path), None
    if options.adapter:
        adapter_dir = hub.resolve(options.adapter, tensor_files.ADAPTER_CONFIG)
        tell_of_quantization(options, adapter_dir)
    if options.format == "gguf-lora":
        summary = export_adapter(model_dir, adapter_dir, output, options.quantization)
    else:
        paths = [options.model_name_or_path, options.adapter]
        name = " + ".join(Path(path).resolve().name for path in paths if path)
        summary = export_model(
            model_dir, output, options.quantization, adapter_dir, name, options.template
        )
    types = ", ".join(f"{count} {name}" for name, count in summary["types"].items())
    print(
        f"wrote {output}: {summary['bytes'] / 1e6:,.1f} MB, {summary['bits_per_weight']:.2f} "
        f"bits per weight, "
        f"{summary['tensors']} tensors ({types})"
    )
    for note in summary["notes"]:
        print(f"note: {note}")


def tell_of_quantization(options, adapter_dir):
    """Say so where the adapter is not merged into the weights that it was trained on."""
    trained = recorded_options(adapter_dir).get("quantization_bit")
    if options.format in ("hf", "gguf") and trained != options.quantization_bit:
        base = f"a base in {trained} bits" if trained else "the full base"
        flag = f"--quantization_bit {trained}" if trained else "no --quantization_bit"
        way_out = f"; {flag} merges into that one" if options.format == "hf" else ""
        print(f"note: the adapter was trained on {base} and is merged into another{way_out}")


def check_gguf_output(options):
    """The file to write. An existing file is overwritten only if it is a GGUF file."""
    from minisft.gguf.reader import is_gguf

    path = check_output_file(
        "--output",
        options.output,
        [options.model_name_or_path],
        options.overwrite_output_dir,
        "--overwrite_output_dir",
    )
    if path.exists() and not is_gguf(path):
        raise UserError(f"--output {path} exists and is not a GGUF file. Choose another name.")
    return path


def write_folder(options):
    """The formats that are folders."""
    output_dir = check_output_dir(
        options.output_dir,
        options.overwrite_output_dir,
        options.model_name_or_path,
        options.adapter,
    )

    import torch

    from minisft.checkpoints import adapters, folders, hub
    from minisft.checkpoints.reward_models import choose_padding, has_head, load_reward_model
    from minisft.common.devices import resolve_device, resolve_dtype
    from minisft.common.model_flags import dtype_option
    from minisft.common.tensor_files import parse_size
    from minisft.model.lora import merge_lora
    from minisft.text.chat_template import conversation_form
    from minisft.text.tokenizer import Tokenizer

    max_shard_size = parse_size(options.max_shard_size)
    model_dir = hub.resolve(options.model_name_or_path)
    device = resolve_device(options.device)
    stored = folders.stored_dtype(model_dir)
    auto = torch.float32 if options.format == "peft" else stored
    dtype = resolve_dtype(dtype_option(options), device, auto)
    adapter_dir = options.adapter and hub.resolve(options.adapter, tensor_files.ADAPTER_CONFIG)
    is_reward_model = has_head(model_dir, adapter_dir)
    load = load_reward_model if is_reward_model else folders.load_model
    model = load(model_dir, stored, device, options.quantization_bit)
    tokenizer = Tokenizer.load(model_dir)

    trained_dir = adapter_dir or model_dir
    if adapter_dir:
        lora_config = adapters.load_adapter(model, adapter_dir)
        tell_of_quantization(options, adapter_dir)
    form = conversation_form(
        tokenizer, options.template, trained_dir, folders.generation_eos(model_dir, model.config)
    )
    if is_reward_model:
        choose_padding(model, tokenizer, form.stop_ids)
    if options.format == "peft":
        adapters.save_adapter(model, output_dir, lora_config, options.model_name_or_path, dtype)
    else:
        merge_lora(model, dtype)
        folders.save_model(model, output_dir, dtype, max_shard_size)
        folders.save_generation_config(model_dir, output_dir, model.config, form.stop_ids)
    tokenizer.save(output_dir, form.chat_template)
    # What chat.py looks for: the form of the conversations that the model was trained on.
    trained = recorded_options(trained_dir)
    name = trained.get("template") if options.template == "auto" else options.template
    save_options(
        Namespace(template=name, default_system=trained.get("default_system")),
        output_dir / "options.toml",
    )
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    run_script(main)
