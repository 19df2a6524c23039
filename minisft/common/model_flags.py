"""The flags that several scripts share: model, device, data, chat template."""

import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from minisft.common.command_line import OptionParser
from minisft.common.errors import UserError
from minisft.common.option_types import (
    boolean,
    json_object,
    quantization_bits,
    replacements,
    with_line_breaks,
)

DTYPES = ["auto", "float32", "bfloat16", "float16"]
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
# Tokens at which train.py truncates a row; select.py warns of longer ones.
CUTOFF_LEN = 1024
AUTO_DTYPE = "bfloat16 or float32, whichever is faster on this processor"


def add_model_flags(
    parser: OptionParser, auto_dtype: str = AUTO_DTYPE
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Add the section "model"; returns its (add, switch) for more flags, --adapter among them."""
    add, switch = parser.section("model")
    model = "folder of a checkpoint, GGUF file, or hub id"
    names = "an adapter, given with --adapter, names its model"
    add("--model_name_or_path", required=True, unless="adapter", remark=names, help=model)
    add_device_flags(add, switch, auto_dtype)
    return add, switch


def add_dataset_flags(add: Callable[..., Any], required: bool = False) -> None:
    """Add the flags that name the data to a section."""
    names = "files, folders, names in dataset_info.json or on the hub, separated by commas"
    add("--dataset", required=required, help=names)
    add("--dataset_dir", default="data", help="folder of dataset_info.json")


def add_replace_flag(add: Callable[..., Any]) -> None:
    """Add --replace to a section."""
    values = "fill in {{name}} and <your name> in the rows: name=Pebble,author=the Riverside Lab"
    add("--replace", type=replacements, metavar="NAME=VALUE,...", help=values)


def add_device_flags(
    add: Callable[..., Any], switch: Callable[..., Any], auto_dtype: str = AUTO_DTYPE
) -> None:
    """Add --device, --dtype and --quantization_bit to a section."""
    device = "auto, cpu, cuda, cuda:N or mps, a Mac's GPU (auto: a GPU if there is one)"
    add("--device", default="auto", help=device)
    number_type = f"number type (auto: {auto_dtype})"
    add("--dtype", type=dtype_choice, choices=DTYPES, default="auto", help=number_type)
    switch("--bf16", "short for --dtype bfloat16")
    switch("--fp16", "short for --dtype float16")
    bits = "hold the frozen linear layers in 4 bits (NF4) or 8 bits (int8 rows)"
    add("--quantization_bit", type=quantization_bits, metavar="4|8", help=bits)


def dtype_choice(text: str) -> str:
    """An argparse type: a number type of --dtype, also by its short name, such as bf16."""
    return SHORT_DTYPES.get(text.lower(), text.lower())


TEMPLATE_FLAGS = ("template", "default_system", "template_kwargs", "enable_thinking")


def add_template_flags(add: Callable[..., Any], auto: str) -> None:
    """Add the flags of chat templates to a section. auto: what --template auto means."""
    name = f"chat template: a name, a .jinja file, or auto ({auto})"
    add("--template", default="auto", help=name)
    as_text = partial(with_line_breaks, name="--default_system")
    system = "system prompt of conversations that have none; '' for no system prompt"
    add("--default_system", type=as_text, help=system)
    add_template_settings(add)


def add_template_settings(add: Callable[..., Any]) -> None:
    """Add --template_kwargs and --enable_thinking to a section."""
    kwargs = 'variables for the chat template, such as \'{"date_string": "26 Jul 2024"}\''
    add("--template_kwargs", type=json_object, metavar="JSON", help=kwargs)
    thinking = "ask for thoughts before answers (Qwen3 and others)"
    add("--enable_thinking", type=boolean, metavar="true|false", help=thinking)


def template_options(options: Namespace) -> dict[str, Any]:
    """The arguments of get_template, except the name, from these flags."""
    return {
        "default_system": options.default_system,
        **template_settings(options),
    }


def template_settings(options: Namespace) -> dict[str, Any]:
    """The arguments of get_template from --template_kwargs and --enable_thinking."""
    return {
        "template_kwargs": options.template_kwargs and json.loads(options.template_kwargs),
        "enable_thinking": options.enable_thinking,
    }


def dtype_option(options: Namespace) -> str:
    """The number type of `--dtype`, `--bf16` or `--fp16`: auto, float32, bfloat16 or float16."""
    name = options.dtype
    if options.bf16 and options.fp16:
        raise UserError("--bf16 contradicts --fp16: give one of the two")
    for flag, meaning in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(options, flag):
            if name not in ("auto", meaning):
                raise UserError(f"--{flag} contradicts --dtype {name}: give one of the two")
            name = meaning
    return name
