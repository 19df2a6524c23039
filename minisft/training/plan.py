"""Plan a run without downloading or loading anything: `train.py --dry_run`.

    python train.py --config examples/recipes/llama3_8b_full.toml --dry_run --num_processes 8 \\
        --device cuda --device_memory 80GB --device_tflops 400

It needs config.json only. lengths.py counts or estimates the tokens of the rows, memory.py computes
the memory and operations.py the arithmetic.
"""

import os
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import torch

from minisft.checkpoints.folders import open_checkpoint
from minisft.checkpoints.hub import resolve
from minisft.common.devices import dtype_name, resolve_device, resolve_dtype
from minisft.common.errors import UserError
from minisft.common.model_flags import dtype_option
from minisft.common.tensor_files import parse_size
from minisft.common.threads import SYSTEM
from minisft.common.torchrun import announced_processes, announced_rank
from minisft.common.words import counted, duration
from minisft.model.config import ModelConfig
from minisft.model.parameters import count_parameters
from minisft.model.reward import Model
from minisft.training.activation_memory import Step
from minisft.training.build import model_on_meta, num_trainable
from minisft.training.defaults import choose_learning_rate
from minisft.training.lengths import Data, Epoch, inspect_data
from minisft.training.memory import PARTS, Phase, phases
from minisft.training.operations import forward_operations, training_operations
from minisft.training.run import build_schedule, count_rows_per_step
from minisft.training.speed import measure_speed
from minisft.training.vocabulary import planned_rows

# Above this share of a device's memory, kernels and fragmentation may not fit.
COMFORTABLE = 0.9
# Above this, a layer is too large to be trained for a moment.
MAX_LAYER = 300_000_000
# A run takes this much of the time that the speed of a layer promises, at least and at most.
USUAL_SHARES = 0.8, 1.4


def show(options: Namespace) -> None:
    """Print the plan of a run with the options of train.py."""
    if announced_rank() != 0:
        return
    model_dir = local_folder(options.model_name_or_path)
    config = ModelConfig.load(model_dir)
    with suppress(UserError):  # weights on this disk decide whether the output matrix is tied
        config, _ = open_checkpoint(model_dir)
    device = resolve_device(options.device, must_exist=False)
    # Assume that a GPU of another machine is fast at bfloat16.
    is_absent = device.type == "cuda" and not torch.cuda.is_available()
    dtype = resolve_dtype(dtype_option(options), device, torch.bfloat16 if is_absent else None)
    num_processes = options.num_processes or announced_processes()
    available = device_memory(options, device, num_processes)
    if num_processes == 1 and options.parallel == "fsdp":
        raise UserError(
            "--parallel fsdp shards the model over processes. Give --num_processes above 1, or "
            "--parallel ddp."
        )
    model = model_on_meta(options, config, dtype, planned_rows(options, config, model_dir))
    data = inspect_data(options, model.config, model_dir, num_processes)
    step = planned_step(options, model, data.largest, dtype, device.type, num_processes)
    print("a plan: nothing is downloaded, loaded or written")
    choose_learning_rate(options, config.hidden_size, print)
    print_model(options, model, step)
    num_steps = print_data(options, data, num_processes)
    print_memory(phases(model, step), step, available)
    if data.epoch and num_steps:
        print_time(options, model, data.epoch, num_steps, step)


def local_folder(name: str) -> Path:
    """The folder of a model on this machine. UserError instead of a download."""
    if Path(name).expanduser().exists() or name.count("/") != 1:
        return resolve(name)
    from huggingface_hub import try_to_load_from_cache  # slow to import

    path = try_to_load_from_cache(name, "config.json")
    if isinstance(path, str):
        return Path(path).parent
    raise UserError(
        f"{name}: no such folder, and --dry_run downloads nothing. Put its config.json into "
        "a folder (with tokenizer.json for exact lengths) and give that as --model_name_or_path."
    )


def device_memory(options: Namespace, device: torch.device, num_processes: int) -> int | None:
    """Bytes of --device_memory, or of this machine's device; None if neither is known.

    Processes on a CPU share the memory of the machine.
    """
    if options.device_memory:
        try:
            return parse_size(options.device_memory)
        except UserError as error:
            raise UserError(f"--device_memory: {error}") from error
    if device.type == "cpu":
        return main_memory() // num_processes
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.mps.recommended_max_memory()
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None


def main_memory(system: Path = SYSTEM) -> int:
    """Bytes of this machine's memory, or of what its container may use."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(installed, int((system / "fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return installed


def planned_step(
    options: Namespace,
    model: Model,
    largest: tuple[int, int],
    dtype: torch.dtype,
    device_type: str,
    num_processes: int,
) -> Step:
    """The Step of a run. largest: tokens and supervised tokens of the largest micro-batch."""
    num_tokens, num_supervised = largest
    return Step(
        num_tokens,
        0 if options.stage == "rm" else num_supervised,  # a reward model has no logits
        dtype,
        device_type,
        checkpointing=options.gradient_checkpointing,
        accumulating=options.gradient_accumulation_steps > 1,
        num_processes=num_processes,
        is_sharded=options.parallel == "fsdp",
        num_copied=num_copied(options, model),
        eight_bit=options.optim == "adamw_8bit",
        pure_bf16=options.pure_bf16,
    )


def num_copied(options: Namespace, model: Model) -> int:
    """The number of parameters that the reference of DPO copies: the trainable ones.

    A new adapter changes nothing, so the reference leaves it out, unless the model is sharded.
    """
    if options.stage != "dpo" or options.precompute_reference:
        return 0
    if options.adapter or options.parallel == "fsdp":
        return num_trainable(model)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    )


# The lines of the plan


def print_model(options: Namespace, model: Model, step: Step) -> None:
    """Print the number of parameters, and how they are trained."""
    how = "in full" if options.finetuning_type == "full" else "by LoRA"
    base = f", base in {options.quantization_bit} bits" if options.quantization_bit else ""
    how += ", weights and gradients in bfloat16" * options.pure_bf16
    how += ", moments in 8 bits" * (options.optim == "adamw_8bit")
    print(
        f"model       {count_parameters(model):,} parameters, of which {num_trainable(model):,} "
        f"are trained {how}{base}, {dtype_name(step.dtype)} on "
        f"{step.num_processes} x {step.device}"
    )
    if step.num_copied:
        print(f"reference   a copy of {step.num_copied:,} parameters, with their initial values")


def print_data(options: Namespace, data: Data, num_processes: int) -> int | None:
    """Print rows, tokens, padding and steps; returns the number of steps, None if not known."""
    rows_per_step, epoch = count_rows_per_step(options, num_processes), data.epoch
    unit = "block" if options.stage == "pt" else "row"
    each = (
        f"{counted(rows_per_step, unit)} each ({options.per_device_train_batch_size} x "
        f"{options.gradient_accumulation_steps} x {counted(num_processes, 'process', 'processes')})"
    )
    print(f"lengths     {': '.join(filter(None, [data.origin, data.spread]))}")
    if data.report:
        print(f"rows        {data.report}")
    if epoch is None:
        print(f"steps       {options.max_steps or 'not known: give --max_steps'}, {each}")
        return options.max_steps
    answers = f", {epoch.num_texts:,} answers" if options.stage in ("rm", "dpo") else ""
    print(
        f"an epoch    {counted(epoch.num_rows, unit)}{answers}, {epoch.num_tokens:,} tokens, "
        f"{epoch.padding:.1%} padding"
    )
    schedule = build_schedule(options, epoch.num_rows, rows_per_step, print)
    steps_per_epoch, total_steps = schedule.steps_per_epoch, schedule.total_steps
    print(f"steps       {steps_per_epoch:,} an epoch, {total_steps:,} in all, {each}")
    return total_steps


def print_memory(points: list[Phase], step: Step, available: int | None) -> None:
    """Print the parts of the memory: the maximum of each, and each at the peak of the sum.

    available: bytes of the device; None if not known.
    """
    peak = max(points, key=lambda phase: phase.total)
    print("memory of each process, GB   at most   at the peak")
    for part in PARTS:
        most = max(phase.parts[part] for phase in points)
        print(f"  {part:<24} {most / 1e9:10,.2f} {peak.parts[part] / 1e9:13,.2f}")
    print(
        f"  {'total':<24} {'':10} {peak.total / 1e9:13,.2f}   at {peak.name}, with "
        f"{step.num_tokens:,} tokens in the largest micro-batch"
    )
    if available is None:
        print("fits        not known: give --device_memory, such as 80GB")
        return
    share = peak.total / available
    verdict = "yes" if share <= COMFORTABLE else "barely" if share <= 1 else "NO"
    print(f"fits        {verdict}: {share:.0%} of {available / 1e9:,.1f} GB")


def print_time(options: Namespace, model: Model, epoch: Epoch, num_steps: int, step: Step) -> None:
    """Print the operations of the run, and its time at the speed that the options state.

    Without one, the speed of this CPU is measured.
    """
    num_processes = step.num_processes
    rows_per_step = count_rows_per_step(options, num_processes)
    num_epochs = num_steps / build_schedule(options, epoch.num_rows, rows_per_step).steps_per_epoch
    length = epoch.num_tokens / epoch.num_texts
    per_token = num_epochs * training_operations(model, length, options.gradient_checkpointing)
    if options.stage == "dpo":  # the reference computes all rows in every epoch, or once
        passes = 1 if options.precompute_reference else num_epochs
        per_token += passes * forward_operations(model, length)
    operations = per_token * epoch.num_tokens / (1 - epoch.padding)
    num_tokens = epoch.num_tokens * num_epochs
    print(f"work        {num_tokens:,.0f} tokens, {operations:.3g} operations")
    if options.tokens_per_second:
        seconds = num_tokens / options.tokens_per_second
        speed = f"{options.tokens_per_second:,g} tokens"
    elif options.device_tflops:
        seconds = operations / (options.device_tflops * 1e12 * num_processes)
        speed = f"{num_processes} x {options.device_tflops:,g} x 10^12 operations"
    elif step.device == "cpu" and count_parameters(model.model.layers[0]) < MAX_LAYER:
        num_rows = options.per_device_train_batch_size * (2 if options.stage == "dpo" else 1)
        padded = round(length / (1 - epoch.padding))
        layer = measure_speed(model, options, step.dtype, num_rows, padded)
        # Processes on one machine share its cores.
        seconds = operations / layer.operations
        seconds += num_steps * num_trainable(model) * layer.seconds_to_update
        least, most = (duration(seconds * share) for share in USUAL_SHARES)
        print(
            f"time        {least} to {most}: one layer trains at {layer.operations / 1e9:,.3g} x "
            "10^9 operations a second here now. --tokens_per_second of a short run tells it better."
        )
        return
    else:
        print("time        not known: give --tokens_per_second, or --device_tflops")
        return
    print(f"time        {duration(seconds)} at {speed} a second")
