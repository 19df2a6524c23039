"""The flags of `export.py`, and which of them a format uses.

options = parse_options(["--model_name_or_path", "examples/base", "--output_dir", "runs/copy"])
options.format                               # "hf", the default
"""

from argparse import Namespace
from collections.abc import Sequence

from minisft.common.command_line import QUANTIZATIONS, Neighbour, OptionParser
from minisft.common.errors import UserError
from minisft.common.model_flags import TEMPLATE_FLAGS, add_model_flags, add_template_flags

EXAMPLES = """\
  python export.py --adapter runs/a --output_dir merged
  python export.py --adapter runs/a --format gguf --quantization q4_k_m --output a.gguf
  python export.py --adapter runs/a --format gguf-lora --output adapter.gguf
"""
FILE_FORMATS = ("gguf", "gguf-lora")
MERGES: Neighbour = ((True,), "--format peft keeps the adapter apart; the other formats merge it")
# Flags of other programs.
NEIGHBOURS: dict[str, Neighbour] = {
    "bits": ((16,), "use --format gguf --quantization q4_k_m, or another type of --help"),
    **dict.fromkeys(("merge", "merge_lora", "merge_adapter", "merge_and_unload", "fuse"), MERGES),
}


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of export.py, checked; by default from the command line."""
    description = "Write a trained model for other programs, in the format that they read."
    common = "model_name_or_path adapter format output_dir output quantization"
    parser = OptionParser(EXAMPLES, common, NEIGHBOURS, description=description)
    add, switch = add_model_flags(parser, "the checkpoint's; float32 for peft")
    add("--adapter", help="LoRA adapter to merge (hf, gguf) or to write (peft, gguf-lora)")
    add, switch = parser.section("output")
    formats = ["hf", "peft", *FILE_FORMATS]
    add("--format", choices=formats, default="hf", help="the model, or the adapter alone")
    add("--output_dir", help="folder to write: hf, peft")
    add("--output", help="file to write: gguf, gguf-lora")
    add("--quantization", choices=QUANTIZATIONS, default="f16", help="number type in a GGUF file")
    switch("--overwrite_output_dir", "write into a folder that is not empty")
    switch("--overwrite", "replace the file if there is one")
    add("--max_shard_size", default="5GB", help="split the weights into files of at most this size")
    add, switch = parser.section("prompts of the exported model")
    add_template_flags(add, auto="that of the training, else the checkpoint's own")
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    return options


def check_options(options: Namespace, given: set[str]) -> None:
    """UserError for flags that are missing, or that the format does not use."""
    format = options.format
    needed = "output" if format in FILE_FORMATS else "output_dir"
    if needed not in given:
        hint = ""
        if format in FILE_FORMATS and options.output_dir:
            hint = f": a file, not a folder. Give --output {options.output_dir}.gguf instead"
        elif options.output:
            hint = ": a folder, not a file. A GGUF file is --format gguf"
        raise UserError(f"--format {format} needs --{needed}{hint}")
    if format in ("peft", "gguf-lora") and not options.adapter:
        raise UserError(f"--format {format} needs --adapter")
    unused = {
        "hf": {"quantization"},
        "peft": {"quantization", "max_shard_size", "quantization_bit"},
        "gguf": {"max_shard_size", "quantization_bit"},
        "gguf-lora": {"max_shard_size", "quantization_bit", *TEMPLATE_FLAGS},
    }[format]
    if format in FILE_FORMATS:
        unused |= {"output_dir", "overwrite_output_dir", "dtype", "bf16", "fp16", "device"}
    else:
        unused |= {"output", "overwrite"}
    if unused & given:
        flag = min(unused & given)
        hint = {
            "dtype": "; --quantization sets the number type",
            "overwrite": "; a folder needs --overwrite_output_dir",
            "overwrite_output_dir": "; a file needs --overwrite",
        }
        if format == "gguf":
            hint["quantization_bit"] = "; merge by --format hf, then export that folder"
        raise UserError(f"--format {format} does not use --{flag}{hint.get(flag, '')}")
