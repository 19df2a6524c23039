"""What a run would take, before anything is downloaded or loaded: `train.py --dry_run`.

    python train.py --config examples/recipes/llama3_8b_full.toml --dry_run --num_processes 8 \\
        --device cuda --device_memory 80GB --device_tflops 400

All it needs is config.json. Where there is no tokenizer, lengths are estimated from the bytes of
the rows; where there are no rows, every one is taken to be as long as the limit. It says which.
The memory is that of memory.py, the batches are those of lengths.py.
"""

import math
import os
from pathlib import Path

import torch

from minisft.checkpoints.adapters import load_adapter
from minisft.checkpoints.hub import resolve
from minisft.common.devices import resolve_device, resolve_dtype
from minisft.common.errors import UserError
from minisft.common.model_flags import dtype_option
from minisft.common.tensor_files import parse_size
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora
from minisft.model.lora_tools import resume_lora
from minisft.model.quantized import count_parameters
from minisft.model.reward import RewardModel
from minisft.training import memory
from minisft.training.lengths import look_at_data
from minisft.training.options import count_steps

# What a device's memory holds beside tensors, and loses to gaps between them.
COMFORTABLE = 0.9


def show(options):
    """Print the plan of a run with the options of train.py."""
    if int(os.environ.get("RANK", 0)):  # torchrun's first process says it for all
        return
    model_dir = local_folder(options.model_name_or_path)
    config = ModelConfig.load(model_dir)
    device = resolve_device(options.device, must_exist=False).type
    absent = device == "cuda" and not torch.cuda.is_available()
    available = memory_of_device(options, device)
    dtype = resolve_dtype(
        dtype_option(options), torch.device(device), torch.bfloat16 if absent else None
    )
    num_processes = options.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    if num_processes == 1 and options.parallel == "fsdp":
        raise UserError(
            "--parallel fsdp shards the model over processes: give --num_processes "
            "above 1, or --parallel ddp"
        )
    model = planned_model(options, config, dtype)
    data = look_at_data(options, config, model_dir, num_processes)
    step = planned_step(options, model, data.largest, dtype, device, num_processes)
    print("a plan: nothing is downloaded, loaded or written")
    tell_model(options, model, step)
    num_steps = tell_data(options, data, num_processes)
    tell_memory(list(memory.moments(model, step)), step, available)
    tell_time(options, model, data, num_steps, num_processes)


def local_folder(name):
    """The folder of a model that is on this machine; UserError rather than a download."""
    if Path(name).expanduser().exists() or name.count("/") != 1:
        return resolve(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return Path(found).parent
    raise UserError(
        f"{name}: is not on this machine, and --dry_run downloads nothing; put its "
        "config.json into a folder (tokenizer.json beside it for exact lengths) and "
        "give that as --model_name_or_path"
    )


def planned_model(options, config, dtype):
    """The model as train.py would train it, without its numbers."""
    build, head = (RewardModel, ("score",)) if options.stage == "rm" else (CausalLM, ())
    if options.finetuning_type == "full":
        return memory.skeleton(config, torch.float32, build=build).requires_grad_(True)
    model = memory.skeleton(config, dtype, options.quantization_bit, build)
    if options.adapter:
        adapter_dir = resolve(options.adapter, "adapter_config.json")
        lora_config = load_adapter(model, adapter_dir, options.lora_dropout)
        lora_config.modules_to_save += head
        resume_lora(model, lora_config)
    else:
        lora_config = LoraConfig.from_options(options)
        lora_config.modules_to_save += head
        add_lora(model, lora_config)
    return model


def planned_step(options, model, largest, dtype, device, num_processes):
    """The Step of a run whose largest micro-batch has so many (tokens, supervised ones)."""
    num_tokens, num_learned = largest
    is_sharded = options.parallel == "fsdp"
    return memory.Step(
        num_tokens,
        0 if options.stage == "rm" else num_learned,
        dtype,
        device,
        options.gradient_checkpointing,
        options.packing,
        options.gradient_accumulation_steps > 1,
        num_processes,
        is_sharded,
        num_copied(options, model, is_sharded),
    )


def num_copied(options, model, is_sharded):
    """How many numbers the reference of --stage dpo has for itself: copies of what is trained.

    Without a new adapter, which is left away where the reference is a module of its own.
    """
    if options.stage != "dpo" or options.precompute_reference:
        return 0
    return sum(
        one.numel()
        for name, one in model.named_parameters()
        if one.requires_grad and (is_sharded or options.adapter or ".lora_" not in name)
    )


# What is told


def tell_model(options, model, step):
    """Parameters, and how they are trained."""
    trained = memory.trained_numbers(model)
    how = "in full" if options.finetuning_type == "full" else "by LoRA"
    base = f", base in {options.quantization_bit} bits" if options.quantization_bit else ""
    print(
        f"model       {count_parameters(model):,} parameters, of which {trained:,} are trained "
        f"{how}{base}, {str(step.dtype).removeprefix('torch.')} on {step.num_processes} x "
        f"{step.device}"
    )
    if step.num_copied:
        print(f"reference   a copy of {step.num_copied:,} of them, as they are at the beginning")


def tell_data(options, data, num_processes):
    """Rows, tokens, padding and steps; returns the number of steps, None if it is not known."""
    each, accumulated = options.per_device_train_batch_size, options.gradient_accumulation_steps
    rows_per_step = each * accumulated * num_processes
    print(f"lengths     {data.origin}")
    told = f"{rows_per_step:,} rows each ({each} x {accumulated} x {num_processes} processes)"
    if data.num_examples is None:
        print(f"steps       {options.max_steps or 'not known: give --max_steps'}, {told}")
        return options.max_steps
    steps_per_epoch, num_steps = count_steps(options, data.num_examples, rows_per_step)
    answers = f", {data.num_texts:,} answers" if options.stage in ("rm", "dpo") else ""
    print(
        f"an epoch    {data.num_examples:,} rows{answers}, {data.num_tokens:,} tokens, "
        f"{data.padding:.1%} padding besides"
    )
    print(f"steps       {steps_per_epoch:,} an epoch, {num_steps:,} in all, {told}")
    return num_steps


def tell_memory(moments, step, available):
    """The parts of the memory: the most of each, and what they are when their sum is largest.

    available: bytes that the device has, None where that is not known.
    """
    peak = max(moments, key=lambda moment: moment.total)
    print("memory of each process, GB   at most   at the peak")
    for part in memory.PARTS:
        most = max(moment.parts[part] for moment in moments)
        print(f"  {part:<24} {most / 1e9:10,.2f} {peak.parts[part] / 1e9:13,.2f}")
    print(
        f"  {'together':<24} {'':10} {peak.total / 1e9:13,.2f}   at {peak.name}, with "
        f"{step.num_tokens:,} tokens in the largest micro-batch"
    )
    if available is None:
        print("fits        not known: give --device_memory, such as 80GB")
        return
    share = peak.total / available
    verdict = "yes" if share <= COMFORTABLE else "just about, or not" if share <= 1 else "NO"
    print(f"fits        {verdict}: {share:.0%} of {available / 1e9:,.1f} GB")


def memory_of_device(options, device):
    """Bytes of --device_memory, or of the device that is here; None where neither is known."""
    if options.device_memory:
        try:
            return parse_size(options.device_memory)
        except UserError as error:
            raise UserError(f"--device_memory: {error}") from error
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None


def tell_time(options, model, data, num_steps, num_processes):
    """Operations of the whole run, and the time at a stated speed."""
    if num_steps is None or data.num_tokens is None:
        return
    steps_per_epoch = data.num_examples / (
        options.per_device_train_batch_size * options.gradient_accumulation_steps * num_processes
    )
    epochs = num_steps / math.ceil(steps_per_epoch)
    tokens = data.num_tokens * epochs
    length = data.num_tokens / data.num_texts
    operations = epochs * operations_per_token(model, length, options.gradient_checkpointing)
    if options.stage == "dpo":  # the reference reads along, or reads every row once
        passes = 1 if options.precompute_reference else epochs
        operations += passes * forward_operations(model, length)
    operations *= data.num_tokens / (1 - data.padding)
    if options.tokens_per_second:
        seconds = tokens / options.tokens_per_second
        speed = f"{options.tokens_per_second:,g} tokens"
    elif options.device_tflops:
        seconds = operations / (options.device_tflops * 1e12 * num_processes)
        speed = f"{num_processes} x {options.device_tflops:,g} x 10^12 operations"
    print(f"work        {tokens:,.0f} tokens, {operations:.3g} operations")
    if options.tokens_per_second or options.device_tflops:
        print(f"time        {duration(seconds)} at {speed} a second")
    else:
        print("time        not known: give --tokens_per_second, or --device_tflops")


def operations_per_token(model, length, checkpointing):
    """Multiplications and additions to train on a token: 6 a trained weight, 4 a frozen one.

    Two go forward, two back to the layer's input, two to the weight's own gradient; two more are
    forward again with checkpointing. Of attention both factors have a gradient.
    """
    looked_up = num_looked_up(model) * model.model.embed_tokens.weight.requires_grad
    forward = forward_operations(model, length)
    return (
        forward * (2 if checkpointing else 1)
        + forward
        + attention_operations(model, length)
        + 2 * (memory.trained_numbers(model) - looked_up)
    )


def forward_operations(model, length):
    """Multiplications and additions to take a token through the model: 2 a weight."""
    matrices = count_parameters(model) - num_looked_up(model)
    return 2 * matrices + attention_operations(model, length)


def attention_operations(model, length):
    """Those of them that multiply no weight: a token meets half of its row on average."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length


def num_looked_up(model):
    """How many numbers nothing is multiplied by: the embedding, unless it gives the logits too."""
    tied = model.config.tie_word_embeddings
    return 0 if tied else model.model.embed_tokens.weight.numel()


def duration(seconds):
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 96 * 3600 else f"{seconds / 86400:,.1f} days"
