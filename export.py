"""Write a model for others to use: merge an adapter, convert, split into shards.

    python export.py --model_name_or_path base --adapter runs/cherry --format hf --output_dir merged
    python export.py --model_name_or_path base --adapter runs/cherry --format peft --output_dir out

hf is the folder that transformers, vLLM and others load; peft is the adapter alone.
"""

from argparse import Namespace

from minisft.options import (
    OptionParser,
    UserError,
    add_model_flags,
    check_output_dir,
    recorded_options,
    run,
    save_options,
)


def parse_options(arguments=None):
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = add_model_flags(parser, auto_dtype="the checkpoint's; float32 for peft")
    add("--adapter", help="LoRA adapter to merge (hf) or to write (peft)")
    add, switch = parser.section("output")
    add("--format", choices=["hf", "peft"], default="hf", help="whole model, or adapter alone")
    add("--output_dir", required=True, help="folder to write")
    switch("--overwrite_output_dir", "write into a folder that has something in it")
    add("--max_shard_size", default="5GB", help="split the weights into files of at most this size")
    options = parser.parse_options(arguments)
    if options.format == "peft" and not options.adapter:
        raise UserError("--format peft needs --adapter")
    return options


def main():
    options = parse_options()
    output_dir = check_output_dir(options.output_dir, options.overwrite_output_dir,
                                  options.model_name_or_path, options.adapter)

    import torch

    from minisft import weights
    from minisft.lora import merge_lora
    from minisft.options import resolve_device, resolve_dtype
    from minisft.tokenizer import Tokenizer

    max_shard_size = weights.parse_size(options.max_shard_size)
    model_dir = weights.resolve(options.model_name_or_path)
    device = resolve_device(options)
    stored = weights.stored_dtype(model_dir)
    auto = torch.float32 if options.format == "peft" else stored
    dtype = resolve_dtype(options, device, auto)
    model = weights.load_model(model_dir, stored, device)
    tokenizer = Tokenizer.load(model_dir)

    if options.adapter:
        adapter_dir = weights.resolve(options.adapter, weights.ADAPTER_CONFIG)
        lora_config = weights.load_adapter(model, adapter_dir)
    if options.format == "peft":
        weights.save_adapter(model, output_dir, lora_config, options.model_name_or_path, dtype)
    else:
        merge_lora(model, dtype)
        weights.save_model(model, output_dir, dtype, max_shard_size)
        weights.copy_generation_config(model_dir, output_dir)
    tokenizer.save(output_dir)
    # What chat.py looks for: the form of the conversations that the model was trained on.
    trained = recorded_options(adapter_dir if options.adapter else model_dir)
    form = {name: trained.get(name) for name in ("template", "default_system")}
    save_options(Namespace(**form), output_dir / "options.toml")
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    run(main)
