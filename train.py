"""Fine-tune (or pre-train) a Llama-family model.

    python train.py --model_name_or_path examples/base --dataset examples/data/train.json \
        --template plain --finetuning_type lora --output_dir runs/demo

    torchrun --nproc_per_node 2 train.py ...     # the same on two GPUs or processes

`fine_tune` is the whole job in order. `train` is the training loop, and `train_step` one optimizer
step: sum the loss over the supervised tokens of all micro-batches and ranks, divide once by their
number, clip the gradient, update the weights.

The tour explains it: docs/tour/08_step.md.
"""

import math
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minisft.common.script import run_script
from minisft.data.early_checks import check_places
from minisft.training.options import parse_options

if __name__ == "__main__":
    # Before torch is imported, so that --help and a mistyped flag or path answer at once.
    command_line = run_script(lambda: check_places(parse_options()))
else:
    command_line = None

import torch
from torch import Tensor

from minisft.checkpoints.hub import resolve, resolve_adapter
from minisft.checkpoints.reward_models import choose_padding
from minisft.common import processes
from minisft.common.devices import resolve_device, resolve_dtype
from minisft.common.model_flags import dtype_option
from minisft.common.outputs import check_output_dir
from minisft.common.single_writer import single_writer
from minisft.data.batching import Batches, micro_batches
from minisft.data.encoding import Example
from minisft.evaluation.exact_match import exact_match
from minisft.model.reward import Model, RewardModel
from minisft.text.chat_template import ChatTemplate
from minisft.training import early_end, plan, resume
from minisft.training.adapter_options import complete_options
from minisft.training.build import build_model, describe_training
from minisft.training.data import (
    evaluation_note,
    load_data,
    load_template,
    show_samples,
    training_steps,
)
from minisft.training.defaults import choose_learning_rate
from minisft.training.identity import finished_note, is_finished_run
from minisft.training.interruption import Interruption
from minisft.training.metrics import Progress
from minisft.training.objective import NextToken, Objective, mean_metrics, perplexity
from minisft.training.optimizer import build_optimizer, set_learning_rate
from minisft.training.preference import DirectPreference, Reward
from minisft.training.reference import build_reference
from minisft.training.reports import Reports
from minisft.training.result import save_result
from minisft.training.run import (
    Best,
    Run,
    build_precision,
    build_schedule,
    count_rows_per_step,
    wrap_model,
)
from minisft.training.vocabulary import load_vocabulary

say = processes.print_rank0


def main(options: Namespace | None = None) -> None:
    """Train with these options; by default those of the command line."""
    options = options or parse_options()
    complete_options(options)
    if options.dry_run:
        return plan.show(options)
    may_exist = options.overwrite_output_dir or resume.can_resume(options)
    inputs = options.model_name_or_path, options.adapter
    hint = early_end.unfinished_run_hint(options)
    output_dir = check_output_dir(options.output_dir, may_exist, *inputs, hint=hint)
    device = processes.start(resolve_device(options.device), options.parallel)
    if is_finished_run(options):
        say(finished_note(options))
    else:
        with processes.on_rank0(single_writer(output_dir, is_folder=True)):
            fine_tune(options, output_dir, device)
    processes.stop()


def fine_tune(options: Namespace, output_dir: Path, device: torch.device) -> None:
    """The job in order, from the tokenizer to the saved result."""
    dtype = resolve_dtype(dtype_option(options), device)

    model_dir = resolve(options.model_name_or_path)
    adapter_dir = resolve_adapter(options.adapter) if options.adapter else None
    tokenizer, config, new_rows = load_vocabulary(options, model_dir, adapter_dir, say)
    choose_learning_rate(options, config.hidden_size, say)
    options.template_date = resume.template_date(options)
    template = load_template(options, tokenizer, say)  # None with --stage pt
    batches, eval_examples = load_data(options, tokenizer, template, config, say)
    show_samples(options, batches, tokenizer, say)

    torch.manual_seed(options.seed)  # every rank draws the same adapter
    model, lora_config = build_model(options, model_dir, dtype, device, new_rows)
    torch.manual_seed(options.seed + processes.rank())  # dropout differs between ranks
    if template and isinstance(model, RewardModel):
        choose_padding(model, tokenizer, template.stop_token_ids(model.config.eos_token_ids))
    num_held_out = len(eval_examples or [])
    say(describe_training(options, model, dtype, device, batches.num_examples, num_held_out))

    saved = resume.load_saved_run(options, batches, say)  # None for a new run
    rows_per_step = (
        saved.rows_per_step if saved else count_rows_per_step(options, processes.world_size())
    )
    schedule = build_schedule(options, batches.num_examples, rows_per_step, say)
    precision = build_precision(options, dtype, device)
    # The reference of DPO is the model as it is here, before the weights of a checkpoint.
    objective = build_objective(options, model, batches, eval_examples, precision.autocast, saved)
    reports, note = Reports(options), evaluation_note(options, model.config, num_held_out)
    run = Run(
        options=options,
        model=model,
        lora_config=lora_config,
        objective=objective,
        optimizer=build_optimizer(model, options),
        schedule=schedule,
        precision=precision,
        progress=Progress(
            schedule.total_steps, output_dir / "metrics.jsonl", device, reports, note
        ),
        wrapped=wrap_model(model, options),
        num_bytes=resume.count_bytes(batches),
        tokenizer=tokenizer,
    )
    if saved:
        resume.restore(run, saved)
    resume.claim_output_dir(run, saved)

    with early_end.going_on_later(run):
        interrupted_by = train(run, batches, eval_examples, template)
    run.progress.close()
    if interrupted_by:
        say(early_end.how_to_continue(run))
    else:
        save_result(run, model_dir, tokenizer, template)
    reports.finish()
    if interrupted_by:
        processes.stop()
        sys.exit(128 + interrupted_by)


def build_objective(
    options: Namespace,
    model: Model,
    batches: Batches,
    eval_examples: list[Example] | None,
    autocast: torch.autocast,
    saved: resume.SavedRun | None = None,
) -> Objective:
    """The loss to minimise: next-token loss, a reward loss, or DPO."""
    if isinstance(model, RewardModel):  # --stage rm
        return Reward(model)
    if options.stage == "dpo":
        log_probs = saved.reference_log_probs if saved else {}
        reference = build_reference(options, model, batches, eval_examples, autocast, log_probs)
        return DirectPreference(
            model, reference, options.dpo_beta, options.dpo_label_smoothing, options.dpo_ftx
        )
    return NextToken(model)


def train(
    run: Run,
    batches: Batches,
    eval_examples: list[Example] | None = None,
    template: ChatTemplate | None = None,
) -> int | None:
    """The training loop. Returns the signal that interrupted it, or None at the end."""
    options, schedule, progress = run.options, run.schedule, run.progress
    rank, world_size = processes.rank(), processes.world_size()
    progress.start()
    with Interruption() as interruption:
        for examples in training_steps(
            batches, schedule.rows_per_step, progress.step, schedule.total_steps
        ):
            learning_rate = schedule.learning_rate(progress.step)
            set_learning_rate(run.optimizer, learning_rate)
            # All ranks read the rows of the step; each trains on its own share of them.
            parts = micro_batches(examples, options.per_device_train_batch_size, rank, world_size)
            result = train_step(run, [run.collate(part) for part in parts])
            num_tokens = sum(len(example.ids) for example in examples)
            progress.add(result.sums, result.count, num_tokens)
            progress.add_gradient(result.grad_norm, result.failed)

            step = progress.step
            is_last, epoch = step == schedule.total_steps, step / schedule.steps_per_epoch
            if step == 1 or is_last or every(options.logging_steps, step):
                progress.record(epoch, learning_rate)
            progress.print_line()
            if is_last or every(schedule.steps_per_epoch, step):
                if report := batches.changed_report():
                    progress.say(f"epoch {math.ceil(epoch)}: {report}")
            if eval_examples and (is_last or every(schedule.eval_steps, step)):
                evaluate(run, eval_examples, template)
                if is_stalled(run):
                    progress.record(epoch, learning_rate)  # the steps since the last record
                    return None
            is_best = options.load_best_model_at_end and run.best.step == step
            interrupted_by = processes.max_over_ranks(interruption.signal, run.device)
            if interrupted_by:
                resume.save_checkpoint(run)
                return interrupted_by
            if is_best or (every(schedule.save_steps, step) and not is_last):
                resume.save_if_room(run)
    return None


def every(num_steps: int | None, step: int) -> bool:
    """True every `num_steps` steps; never if it is None."""
    return num_steps is not None and step % num_steps == 0


@dataclass
class StepResult:
    """Result of an optimizer step. The mean of a metric is its sum over all ranks / count."""

    sums: dict[str, Tensor]  # over this rank's micro-batches
    count: float  # supervised tokens, or rows if answers are compared, of all ranks
    grad_norm: Tensor  # (), before clipping
    failed: Tensor  # (), True if training cannot go on with it


def train_step(run: Run, batches: list[Any]) -> StepResult:
    """One optimizer step on this rank's micro-batches."""
    run.model.train()
    scaler = run.precision.scaler
    # The loss of a step is the mean over all its supervised tokens, so count them first.
    (count,) = processes.sum_over_ranks([run.objective.count(batches)], run.device)
    sums: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        # DDP communicates only after the last micro-batch.
        with processes.gradient_sync(run.wrapped, index == len(batches) - 1):
            with run.precision.autocast:
                batch_sums = run.objective.sums(run.wrapped, batch)
            # DDP averages gradients over ranks; scale by world_size to get the sum.
            loss = batch_sums["loss"] * (processes.world_size() / max(1, count))
            scaler.scale(loss).backward()
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + value.detach()

    scaler.unscale_(run.optimizer)
    parameters = [
        parameter for group in run.optimizer.param_groups for parameter in group["params"]
    ]
    max_norm = run.options.max_grad_norm or math.inf
    grad_norm = processes.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    # In float16 the loss scale starts too high on purpose: steps that overflow are skipped, and
    # the scale is halved.
    failed = ~grad_norm.isfinite() & (scaler.get_scale() <= 1)
    # Without a token to learn, the gradient is zero, and AdamW would repeat its last move.
    if count:
        scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    # With one process, nothing here reads a number from the GPU, so the CPU prepares the next step
    # meanwhile. With float16, the scaler reads its scale and whether the gradient overflowed.
    return StepResult(sums, count, grad_norm, failed)


def evaluate(run: Run, examples: list[Example], template: ChatTemplate | None) -> None:
    """Log the mean loss of held-out rows, and remember the step if it is the best so far."""
    began, batch_size = time.monotonic(), run.options.per_device_eval_batch_size
    with run.precision.autocast:
        metrics = mean_metrics(run.objective, examples, batch_size, run.collate, run.device)
        if run.options.stage in ("sft", "pt"):
            metrics["perplexity"] = perplexity(metrics["loss"])
        if run.options.eval_exact_match:
            assert template and not isinstance(run.model, RewardModel)  # --stage sft
            metrics["exact_match"] = exact_match(run.model, examples, template, batch_size)
    run.progress.record_evaluation(metrics, time.monotonic() - began)
    run.best.evaluations_since += 1
    if metrics["loss"] < run.best.loss:
        run.best = Best(run.progress.step, metrics["loss"])


def is_stalled(run: Run) -> bool:
    """True if the loss has not improved for --early_stopping_patience evaluations."""
    patience = run.options.early_stopping_patience
    if patience is None or run.best.evaluations_since < patience:
        return False
    run.progress.say(
        f"stopped at step {run.progress.step}: the last {patience} evaluations were no better"
    )
    return True


if __name__ == "__main__":
    run_script(partial(main, command_line))
