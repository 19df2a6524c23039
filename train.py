"""Fine-tune (or pre-train) a Llama-family model.

    python train.py --model_name_or_path examples/base --dataset examples/data/train.json \
        --template alpaca --finetuning_type lora --output_dir runs/demo

    torchrun --nproc_per_node 2 train.py ...     # the same on two GPUs or processes

The whole training loop is in `train` below: for every optimizer step it adds up the loss of the
supervised tokens (or of rows with several answers, --stage rm and dpo) over micro-batches and
processes, divides once by their number, clips, steps.
"""

import math
import shlex
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.model_flags import dtype_option
from minisft.common.outputs import check_output_dir, save_options
from minisft.common.script import run_script as run_script
from minisft.training.options import can_go_on, parse_options


def load_trainable(options, model_dir, dtype, device):
    """The model with what is to be trained in float32, and its LoraConfig (None when full)."""
    import torch

    from minisft.checkpoints.adapters import load_adapter
    from minisft.checkpoints.folders import load_model
    from minisft.checkpoints.hub import resolve
    from minisft.checkpoints.reward_models import load_reward_model
    from minisft.model.config import ModelConfig
    from minisft.model.decoder import CausalLM
    from minisft.model.lora import LoraConfig, add_lora
    from minisft.model.lora_tools import resume_lora

    load, head = load_model, ()
    if options.stage == "rm":
        load, head = load_reward_model, ("score",)

    if options.train_from_scratch:
        with torch.device(device):
            model = CausalLM(ModelConfig.load(model_dir))
        model.initialize(torch.Generator().manual_seed(options.seed))
        return model, None
    if options.finetuning_type == "full":
        return load(model_dir, torch.float32, device).requires_grad_(True), None
    model = load(model_dir, dtype, device, options.quantization_bit)
    if options.adapter:
        adapter_dir = resolve(options.adapter, "adapter_config.json")
        config = load_adapter(model, adapter_dir, options.lora_dropout)
        config.modules_to_save = tuple(dict.fromkeys((*config.modules_to_save, *head)))
        resume_lora(model, config)
        return model, config
    config = LoraConfig.from_options(options)
    config.modules_to_save += head
    add_lora(model, config)
    return model, config


def train(run, batches, eval_examples, template=None):
    """The training loop. Returns the signal that interrupted it, or None when it is through."""
    from minisft.common import processes
    from minisft.data import batching
    from minisft.training.checkpoint import Interruption
    from minisft.training.optimizer import learning_rate_at, set_learning_rate

    options, progress = run.options, run.progress
    rank, world_size = processes.rank(), processes.world_size()
    with Interruption() as interruption:
        for examples in steps_to_go(run, batches):
            rate = learning_rate_at(
                progress.step,
                run.total_steps,
                options.learning_rate,
                options.lr_scheduler_type,
                run.warmup_steps,
                options.lr_end,
            )
            set_learning_rate(run.optimizer, rate)
            parts = batching.micro_batches(
                examples, options.per_device_train_batch_size, rank, world_size
            )
            sums, total, grad_norm = train_step(
                run, [run.collate(part, run.device) for part in parts]
            )
            progress.add(sums, total, sum(len(example.ids) for example in examples))
            if due(run, options.logging_steps):
                progress.record(progress.step / run.steps_per_epoch, rate, grad_norm)
            if due(run, "epoch") and (report := batches.take_report()):
                progress.say(f"epoch {math.ceil(progress.step / run.steps_per_epoch)}: {report}")
            if eval_examples and due(run, options.eval_steps):
                evaluate(run, eval_examples, template)
                if early(run):
                    return None
            stopped = processes.max_over_ranks(interruption.signal, run.device)
            is_best = options.load_best_model_at_end and run.best["step"] == progress.step
            if (
                stopped
                or is_best
                or (due(run, options.save_steps) and progress.step < run.total_steps)
            ):
                run.save_checkpoint()
            if stopped:
                return stopped
    return None


def steps_to_go(run, batches):
    """Yield the rows of every step; before a broken row ends the run, what was learned is saved."""
    first = run.progress.step
    try:
        yield from batches.steps(run.rows_per_step, first, run.total_steps)
    except UserError as error:
        if run.progress.step == first:
            raise
        run.save_checkpoint()
        raise UserError(
            f"{error}; saved at step {run.progress.step}: mend the row and go on with "
            "--resume_from_checkpoint auto"
        ) from error


def due(run, every):
    """Whether something done `every` so many steps (or "epoch"), and at the end, is due now."""
    every = run.steps_per_epoch if every == "epoch" else every
    return run.progress.step == run.total_steps or every and run.progress.step % every == 0


def train_step(run, batches):
    """One optimizer step over this process's micro-batches.

    Returns {figure: sum} of this process, the number of tokens (or rows of preferences) that all
    processes' sums are over, and the norm of the gradient before clipping.
    """
    import torch

    from minisft.common import processes

    run.model.train()
    # The loss of a step is the mean over all its supervised tokens, so they are counted first.
    totals = processes.sum_over_ranks(run.objective.count(batches), run.device)
    total, sums = totals[0], Counter()
    for index, batch in enumerate(batches):
        with processes.gradient_sync(run.wrapped, index == len(batches) - 1):
            with run.autocast:
                found = run.objective(run.wrapped, batch, totals)
            # The mean over processes is taken; the gradient wanted is that of their sum.
            loss = found["loss"] * (processes.world_size() / max(1, total))
            run.scaler.scale(loss).backward()
        sums.update({name: value.detach() for name, value in found.items()})

    run.scaler.unscale_(run.optimizer)
    trained = [one for group in run.optimizer.param_groups for one in group["params"]]
    max_norm = run.options.max_grad_norm or math.inf
    grad_norm = processes.full_tensor(torch.nn.utils.clip_grad_norm_(trained, max_norm)).item()
    # In float16 an overflow now and then is how the loss scale is found; that step is skipped.
    finding_scale = run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if not math.isfinite(grad_norm) and not finding_scale:
        raise UserError(
            f"step {run.progress.step + 1}: the gradient's norm is {grad_norm}; "
            "stopped before the weights were changed. Lower --learning_rate, or use "
            "--dtype float32"
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return sums, total, grad_norm


def evaluate(run, examples, template):
    """Log the figures of held-out rows, and remember the step if it is the best.

    With --eval_exact_match also the share of them that the model answers as they do.
    """
    from minisft.evaluation.exact_match import exact_match

    began, batch_size = time.monotonic(), run.options.per_device_eval_batch_size
    with run.autocast:
        figures = run.objective.evaluate(examples, batch_size, run.collate)
        if run.options.eval_exact_match:
            figures["exact_match"] = exact_match(run.model, examples, template, batch_size)
    run.progress.record_evaluation(figures, time.monotonic() - began)
    run.best["evaluations_since"] += 1
    if figures["loss"] < run.best["loss"]:
        run.best = {"step": run.progress.step, "loss": figures["loss"], "evaluations_since": 0}


def early(run):
    """Whether the loss has not improved for --early_stopping_patience evaluations."""
    patience = run.options.early_stopping_patience
    if patience is None or run.best["evaluations_since"] < patience:
        return False
    run.progress.say(f"stopped at step {run.progress.step}: no better evaluation in {patience}")
    return True


def build_model(options, model_dir, dtype, device):
    """(model, LoraConfig or None) to train, on `device`; with --parallel fsdp this process's part.

    Leaves the random generators as training is to find them.
    """
    import torch

    from minisft.common import processes

    torch.manual_seed(options.seed)
    is_sharded = options.parallel == "fsdp"
    model, lora_config = load_trainable(
        options, model_dir, dtype, torch.device("meta") if is_sharded else device
    )
    if is_sharded:
        from minisft.training import fsdp

        fsdp.distribute(model, lora_config, options, model_dir, dtype, device)
    torch.manual_seed(options.seed + processes.rank())  # dropout differs between processes
    return model, lora_config


def main():
    from minisft.common.devices import resolve_device, resolve_dtype

    options = parse_options()
    if options.dry_run:
        from minisft.training import plan

        return plan.show(options)
    output_dir = check_output_dir(
        options.output_dir,
        options.overwrite_output_dir
        or (options.resume_from_checkpoint and can_go_on(Path(options.output_dir))),
        options.model_name_or_path,
        options.adapter,
    )

    from minisft.checkpoints.hub import resolve
    from minisft.common import processes

    device = processes.start(resolve_device(options.device), options.parallel)
    dtype = resolve_dtype(dtype_option(options), device)
    model_dir = resolve(options.model_name_or_path)
    tokenizer, template, batches, eval_examples = prepare_data(options, model_dir)
    run = begin_run(options, model_dir, output_dir, dtype, device, template, batches, eval_examples)
    interrupted = train(run, batches, eval_examples, template)
    run.progress.close()
    if interrupted:
        record = shlex.quote(str(output_dir / "options.toml"))
        processes.print_rank0(
            f"stopped and saved at step {run.progress.step}; go on with\n  "
            f"{processes.launch_command()} train.py --config {record} "
            "--resume_from_checkpoint auto"
        )
    else:
        save(run, tokenizer, template, model_dir, output_dir)
    processes.stop()
    if interrupted:
        sys.exit(128 + interrupted)


def prepare_data(options, model_dir):
    """(Tokenizer, Template or None, Batches, held-out examples or None); shows some of the rows."""
    from minisft.common import processes
    from minisft.model.config import ModelConfig
    from minisft.text.template import get_template
    from minisft.text.tokenizer import Tokenizer
    from minisft.training.data import load_data

    say = processes.print_rank0
    config, tokenizer, template = ModelConfig.load(model_dir), Tokenizer.load(model_dir), None
    if options.stage != "pt":
        template = get_template(options.template, tokenizer, options.default_system)
        say(f"template: {template.name}")
    batches, eval_examples = load_data(options, tokenizer, template, config, say)
    for example in batches.first(options.show_samples if template else 0):
        for text in example.texts():
            say(template.show(text.ids.tolist(), text.supervised.tolist()) + "\n")
    return tokenizer, template, batches, eval_examples


def begin_run(options, model_dir, output_dir, dtype, device, template, batches, eval_examples):
    """The Run, with its model, new or from a checkpoint; only then its folder is written to."""
    import torch

    from minisft.common import processes
    from minisft.common.devices import has_fast_bfloat16
    from minisft.model.quantized import count_parameters
    from minisft.training import checkpoint, preference
    from minisft.training.run import Run

    say, resuming = processes.print_rank0, options.resume_from_checkpoint
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device):
        say(
            "bfloat16 halves the memory of the base, but this processor only emulates it: "
            "--dtype float32 is faster here"
        )
    model, lora_config = build_model(options, model_dir, dtype, device)
    num_trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    say(
        f"{len(batches.rows):,} rows; training {num_trained:,} of {count_parameters(model):,} "
        f"parameters ({options.finetuning_type}) on {device}, "
        f"{str(dtype).removeprefix('torch.')}, {processes.world_size()} process(es)"
    )
    resumed = resuming and processes.broadcast_from_rank0(
        lambda: checkpoint.find(output_dir, resuming, say)
    )
    if resuming:
        say(f"resuming from {resumed}" if resumed else "no checkpoint to resume from: starting")
    if processes.rank() == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
    run = Run(
        options,
        model,
        lora_config,
        batches.num_examples,
        dtype,
        device,
        resumed,
        partial(preference.build, template=template, batches=batches, held_out=eval_examples),
        num_bytes=int(batches.rows.sizes().sum()),
    )
    if processes.rank() == 0:  # only now that nothing speaks against the run
        checkpoint.remove_others(output_dir, resumed, run.progress.step)
        save_options(options, output_dir / "options.toml")
    return run


def save(run, tokenizer, template, model_dir, output_dir):
    """Write the adapter, or the whole model in the type its checkpoint had; draw the losses."""
    from minisft.common import processes
    from minisft.training import checkpoint
    from minisft.training.metrics import plot_loss

    options, say = run.options, processes.print_rank0
    if options.load_best_model_at_end and run.best["step"]:
        best = output_dir / f"checkpoint-{run.best['step']}"
        if fault := processes.broadcast_from_rank0(lambda: checkpoint.damage(best)):
            say(f"{best}: {fault}; the last weights are saved instead of the best")
        else:
            checkpoint.restore_weights(run.model, best)
            say(f"took the weights of {best}, evaluation loss {run.best['loss']:.4f}")
    try:
        write_result(run, tokenizer, template, model_dir, output_dir)
    except (OSError, UserError) as error:
        raise UserError(
            f"{error}; make room, and --resume_from_checkpoint auto goes on from the "
            "last checkpoint"
        ) from error
    say(f"saved to {output_dir}")
    if options.plot_loss and processes.rank() == 0:
        try:
            say(f"drew {plot_loss(output_dir)}")
        except ImportError:
            say(
                "--plot_loss needs matplotlib (requirements-extras.txt); the numbers are in "
                f"{output_dir / 'metrics.jsonl'}"
            )


def write_result(run, tokenizer, template, model_dir, output_dir):
    """Write what was trained and the tokenizer, as chat.py, export.py and eval.py read them."""
    import torch

    from minisft.checkpoints import adapters, folders
    from minisft.common import processes
    from minisft.text.chat_template import chat_template_text

    model, options = run.model, run.options
    if run.lora_config:
        adapters.save_adapter(model, output_dir, run.lora_config, options.model_name_or_path)
    else:
        fresh = options.train_from_scratch
        dtype = getattr(torch, model.config.dtype) if fresh else folders.stored_dtype(model_dir)
        folders.save_model(model, output_dir, dtype)
    if processes.rank() != 0:
        return
    if not run.lora_config:
        listed = folders.generation_eos(model_dir, model.config)
        folders.save_generation_config(
            model_dir,
            output_dir,
            model.config,
            template.stop_token_ids(listed) if template else listed,
        )
    tokenizer.save(output_dir, template and chat_template_text(template, options.default_system))


if __name__ == "__main__":
    run_script(main)
