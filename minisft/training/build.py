"""Build the model that the options describe, and choose its trainable parameters.

    model, lora_config = build_model(options, model_dir, dtype, device)     # to train it
    model = model_on_meta(options, config, dtype)                           # to plan the training

LoRA, QLoRA and full fine-tuning differ only in which parameters are trainable.
"""

import dataclasses
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from minisft.checkpoints.adapter_forms import read_adapter, refuse_untrainable
from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.hub import resolve_adapter
from minisft.checkpoints.reward_models import load_reward_model
from minisft.common import processes
from minisft.common.devices import check_compile, dtype_name, has_fast_bfloat16
from minisft.common.threads import busy_note
from minisft.common.words import counted
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.lora_tools import resume_lora
from minisft.model.parameters import convert_parameters, count_parameters
from minisft.model.quantized import QuantizedLinear
from minisft.model.reward import Model, RewardModel
from minisft.model.vocabulary import resize_vocabulary, start_at_mean
from minisft.training import fsdp
from minisft.training.lora_options import check_targets, lora_from_options

NO_ROWS = range(0)


def build_model(
    options: Namespace,
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    new_rows: range = NO_ROWS,
) -> tuple[Model, LoraConfig | None]:
    """The model on `device`, and the LoraConfig of its adapter (None in full fine-tuning).

    new_rows: ids of new tokens, whose rows start at the mean; the vocabulary grows if it must.
    Frozen parameters have type `dtype`, trainable ones float32, or bfloat16 with --pure_bf16. With
    --parallel fsdp the model is sharded, and this rank holds its shard.
    """
    if options.compile:
        check_compile(device)
    if options.parallel != "fsdp":
        return load_trainable(options, model_dir, dtype, device, new_rows)
    meta = torch.device("meta")
    model, lora_config = load_trainable(options, model_dir, dtype, meta, new_rows)
    fsdp.distribute(model, lora_config, options, model_dir, dtype, device, new_rows)
    return model, lora_config


def load_trainable(
    options: Namespace,
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    new_rows: range = NO_ROWS,
) -> tuple[Model, LoraConfig | None]:
    """`build_model` without sharding. On the meta device it has shapes and types only."""
    if options.train_from_scratch:
        config = ModelConfig.load(model_dir)
        config.vocab_size = max(config.vocab_size, new_rows.stop)
        with torch.device(device):
            model = CausalLM(config)
        model.initialize(torch.Generator().manual_seed(options.seed))
        convert_parameters(model, weight_dtype(options, dtype))
        return model, None
    load = load_reward_model if options.stage == "rm" else load_model
    model = load(model_dir, weight_dtype(options, dtype), device, options.quantization_bit)
    if options.pure_bf16:  # the new head of a reward model, too
        convert_parameters(model, dtype)
    lora_config = make_trainable(model, options, new_rows)
    start_at_mean(model, new_rows)
    return model, lora_config


def weight_dtype(options: Namespace, dtype: torch.dtype) -> torch.dtype:
    """The type of the weights of the base. dtype: that of matrix products.

    Weights that are trained have float32, in which small updates do not vanish, or bfloat16 and
    stochastic rounding.
    """
    keeps_float32 = options.finetuning_type == "full" and not options.pure_bf16
    return torch.float32 if keeps_float32 else dtype


def make_trainable(
    model: Model, options: Namespace, new_rows: range = NO_ROWS
) -> LoraConfig | None:
    """Choose what is trained: all parameters, a new LoRA adapter, or that of --adapter.

    model: frozen; changed in place. The head of a reward model is always trained, and so are
    embedding and output matrix if there are new rows.
    """
    if new_rows:
        resize_vocabulary(model, max(model.config.vocab_size, new_rows.stop))
    if options.finetuning_type == "full":
        model.requires_grad_(True)
        return None
    head = ("score",) if options.stage == "rm" else ()
    if options.adapter:
        adapter_dir = resolve_adapter(options.adapter, offline=options.dry_run)
        adapter = read_adapter(adapter_dir, model.config.tie_word_embeddings)
        refuse_untrainable(adapter, "trained further")
        config = load_adapter(model, adapter_dir, options.lora_dropout)
        config.modules_to_save = tuple(dict.fromkeys((*config.modules_to_save, *head)))
        resume_lora(model, config)
        return config
    config = lora_from_options(options)
    if new_rows:
        head += ("embed_tokens", "lm_head") if isinstance(model, CausalLM) else ("embed_tokens",)
    config.modules_to_save = tuple(dict.fromkeys((*config.modules_to_save, *head)))
    check_targets(model, config)
    add_lora(model, config)
    return config


def model_on_meta(
    options: Namespace, config: ModelConfig, dtype: torch.dtype, new_rows: range = NO_ROWS
) -> Model:
    """The model of `build_model` on the meta device. Needs config.json, but no weights."""
    with torch.device("meta"):
        kind = RewardModel if options.stage == "rm" else CausalLM
        model = kind(dataclasses.replace(config))  # untying the embedding changes the config
        if options.quantization_bit:
            quantize_layers(model, options.quantization_bit)
    model.requires_grad_(False)
    convert_parameters(model, weight_dtype(options, dtype))
    make_trainable(model, options, new_rows)
    return model


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def num_trainable(module: nn.Module) -> int:
    """The number of trained values."""
    return sum(parameter.numel() for parameter in trained_parameters(module))


def quantize_layers(model: Model, bits: int) -> None:
    """Replace the linear modules of the decoder layers by empty quantised ones."""
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                sizes = module.in_features, module.out_features
                layer.set_submodule(name, QuantizedLinear(*sizes, bits, module.bias))


def describe_training(
    options: Namespace,
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    num_rows: int,
    num_held_out: int = 0,
) -> str:
    """A line for the log: rows or blocks of text, parameters, device, number type."""
    rows = counted(num_rows, "block" if options.stage == "pt" else "row")
    held_out = f", {num_held_out:,} held out" if num_held_out else ""
    threads = counted(torch.get_num_threads(), "thread")
    each = f", {threads} each" if device.type == "cpu" else ""
    text = (
        f"{rows}{held_out}; training {num_trainable(model):,} of "
        f"{count_parameters(model):,} parameters "
        f"({options.finetuning_type}) on {device}, {dtype_name(dtype)}, "
        f"{counted(processes.world_size(), 'process', 'processes')}{each}"
    )
    if device.type == "cpu" and (note := busy_note(torch.get_num_threads())):
        text += f"\n{note}"
    is_known = device.type != "mps"  # its speed is not measured
    if dtype == torch.bfloat16 and is_known and not has_fast_bfloat16(device):
        text += f"\n{slow_bfloat16_note(options)}"
    return text


def slow_bfloat16_note(options: Namespace) -> str:
    """A line for processors that multiply bfloat16 more slowly than float32."""
    if weight_dtype(options, torch.bfloat16) == torch.float32:  # it saves no weights
        return "this processor is faster with --dtype float32"
    faster = "without --pure_bf16" if options.pure_bf16 else "with --dtype float32"
    return f"bfloat16 halves the memory of the base model, but this processor is faster {faster}"
