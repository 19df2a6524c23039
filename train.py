"""Fine-tune (or pre-train) a Llama-family model.

    python train.py --model_name_or_path examples/base --dataset examples/data/train.json \
        --template alpaca --finetuning_type lora --output_dir runs/demo

    torchrun --nproc_per_node 2 train.py ...     # the same on two GPUs or processes

The whole training loop is in `train` below: for every optimizer step it adds up the loss of the
supervised tokens over micro-batches and processes, divides once by their number, clips, steps.
"""

import math
import sys
import time
from pathlib import Path

from minisft.options import (
    SCHEDULES,
    OptionParser,
    UserError,
    add_model_flags,
    check_output_dir,
    count,
    natural,
    not_negative,
    positive,
    resolve_device,
    resolve_dtype,
    save_options,
    share,
)
from minisft.options import run as run_script


def parse_options(arguments=None):
    parser = OptionParser(description=__doc__.split("\n")[0])
    add, switch = add_model_flags(parser)
    add("--adapter", help="go on training this LoRA adapter")
    switch("--train_from_scratch", "ignore the checkpoint's weights: start from random ones")

    add, switch = parser.section("data")
    add("--stage", choices=["sft", "pt"], default="sft",
        help="sft: answers in conversations; pt: all of plain text")
    add("--dataset", help="files, folders and names in dataset_info.json, separated by commas")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    add("--train_dir", help="folder of files, instead of --dataset")
    add("--mix", metavar="FILE:RATIO",
        help="blend in general data, as this share of all rows (0.15 to 0.3 is usual)")
    add("--eval_dataset", help="the same as --dataset, held out for evaluation")
    add("--valid_dir", help="folder of files held out, instead of --eval_dataset")
    add("--validation_split", type=positive,
        help="hold out this share (below 1) or number of rows of --dataset")
    add("--max_samples", type=count, help="use only the first rows, for a quick try")
    switch("--skip_bad_rows", "leave broken rows out and count them, instead of stopping")
    add("--dataloader_num_workers", type=natural, default=2,
        help="processes that read and encode rows ahead of training (0: none)")
    add("--template", default="auto", help="conversation format, by name (auto: the checkpoint's)")
    add("--default_system", help="system prompt of conversations that have none")
    add("--cutoff_len", type=count, default=1024, help="longer rows are cut to this many tokens")
    add("--block_size", type=count, default=512, help="tokens of a block with --stage pt")
    add("--show_samples", type=natural, default=0, help="print N rows, what is learned in colour")

    add, switch = parser.section("what is trained")
    add("--finetuning_type", choices=["lora", "full"], default="lora", help="what is trained")
    add("--lora_rank", type=count, default=8, help="rank of the adapter")
    add("--lora_alpha", type=positive, help="scale of the adapter, over its rank (2 x rank)")
    add("--lora_dropout", type=share, default=0.0, help="dropout on the adapter's input")
    add("--lora_target", default="all", help="all, or module names separated by commas")
    switch("--use_rslora", "scale by alpha over the root of the rank")
    add("--modules_to_save", default="", help="train these in full: embed_tokens,lm_head")

    add, switch = parser.section("optimisation")
    add("--num_train_epochs", type=positive, default=3.0, help="passes over the rows")
    add("--max_steps", type=count, help="stop after this many optimizer steps instead")
    add("--per_device_train_batch_size", type=count, default=8, help="rows of a micro-batch")
    add("--gradient_accumulation_steps", type=count, default=1, help="micro-batches of a step")
    add("--learning_rate", type=positive, help="peak (1e-4 for lora, 1e-5 for full)")
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="course after warm-up")
    add("--lr_end", type=not_negative, default=0.0, help="where the polynomial course arrives")
    add("--warmup_ratio", type=share, default=0.03, help="share of the steps to warm up over")
    add("--warmup_steps", type=natural, help="number of steps to warm up over, instead")
    add("--weight_decay", type=not_negative, default=0.0, help="of matrices only")
    add("--adam_beta1", type=share, default=0.9, help="decay of AdamW's mean")
    add("--adam_beta2", type=share, default=0.999, help="decay of AdamW's square")
    add("--adam_epsilon", type=positive, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=not_negative, default=1.0, help="clip the gradient to it; 0: no")
    switch("--gradient_checkpointing", "compute activations twice instead of keeping them")
    add("--seed", type=natural, default=42, help="of the order of rows, adapter start and dropout")

    add, switch = parser.section("output")
    add("--output_dir", required=True, help="folder for the adapter or model, log and options")
    switch("--overwrite_output_dir", "write into a folder that has something in it")
    add("--logging_steps", type=count, default=10, help="steps between lines of metrics.jsonl")
    add("--eval_steps", type=count, help="steps between evaluations (default: at the end)")
    add("--per_device_eval_batch_size", type=count, default=8, help="rows of an evaluation batch")
    add("--save_steps", type=count, default=500, help="steps between checkpoints")
    add("--save_total_limit", type=count, default=2, help="checkpoints kept, and the best")
    add("--resume_from_checkpoint", metavar="auto|DIR",
        help="go on from a checkpoint; auto: from the newest complete one, if there is any")
    switch("--load_best_model_at_end", "in the end take the weights with the lowest eval loss")
    add("--early_stopping_patience", type=count, help="stop after so many evaluations without gain")
    switch("--plot_loss", "draw loss.png into the output folder (needs matplotlib)")
    options = parser.parse_options(arguments)
    return check_options(options, parser.given(options))


OF_LORA = {"adapter", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora",
           "modules_to_save"}
OF_SFT = {"template", "default_system", "cutoff_len", "show_samples"}


def check_options(options, given):
    """Refuse what cannot work before anything is loaded; fill in defaults that depend.

    given: the names of the flags that were set to something else than their default.
    """
    full, pretraining = options.finetuning_type == "full", options.stage == "pt"
    held_out = [options.eval_dataset, options.valid_dir, options.validation_split]
    for names, wrong, way_out in (
        (OF_LORA, full, "belongs to --finetuning_type lora"),
        (OF_SFT, pretraining, "belongs to --stage sft"),
        ({"block_size"}, not pretraining, "belongs to --stage pt"),
        ({"train_from_scratch"}, not full, "needs --finetuning_type full"),
        ({"lr_end"}, options.lr_scheduler_type != "polynomial", "needs a polynomial schedule"),
        ({"eval_steps", "load_best_model_at_end", "early_stopping_patience"}, not any(held_out),
         "needs --eval_dataset, --valid_dir or --validation_split"),
        ({"validation_split"}, options.eval_dataset or options.valid_dir,
         "contradicts --eval_dataset and --valid_dir"),
        ({"valid_dir"}, options.eval_dataset, "contradicts --eval_dataset"),
        ({"train_dir"}, options.dataset, "contradicts --dataset"),
        (OF_LORA - {"adapter", "lora_dropout"}, options.adapter,
         "is the adapter's own, which --adapter brings"),
    ):
        if wrong and names & given:
            raise UserError(f"--{min(names & given)} {way_out}")
    if not (options.dataset or options.train_dir):
        raise UserError("give --dataset or --train_dir: what to train on (see --help)")
    if options.learning_rate is None:
        options.learning_rate = 1e-5 if full else 1e-4
    if options.lora_alpha is None and not (full or options.adapter):
        options.lora_alpha = 2.0 * options.lora_rank
    return options


def load_data(options, tokenizer, template, config, say):
    """(Batches to train on, held-out examples or None). Mistakes in the rows are found here."""
    from minisft import batching, dataset

    plain_text = options.stage == "pt"
    flag = "block_size" if plain_text else "cutoff_len"
    limit = min(getattr(options, flag), config.context_length)
    if limit < getattr(options, flag):
        say(f"--{flag}: {limit} tokens, which is the context that the model is made for")
    skipped = [] if options.skip_bad_rows else None
    reading = dict(dataset_dir=options.dataset_dir, plain_text=plain_text, skipped=skipped,
                   seed=options.seed, say=say)
    rows = dataset.open_rows(options.dataset or options.train_dir, **reading)
    rows, held_out = rows[: options.max_samples], None
    if options.eval_dataset or options.valid_dir:
        held_out = dataset.open_rows(options.eval_dataset or options.valid_dir, **reading)
    elif options.validation_split:
        rows, held_out = dataset.split(rows, options.validation_split, options.seed)
    if options.mix:
        rows = dataset.mix(rows, options.mix, **reading)
    if skipped:
        say(f"{len(skipped)} broken rows left out, the first: {skipped[0]}")
    settings = dict(vocab_size=config.vocab_size, seed=options.seed,
                    num_workers=options.dataloader_num_workers)
    if plain_text:
        batches = batching.batches_of_texts(rows, tokenizer, limit, **settings)
    else:
        batches = batching.batches_of_rows(rows, template, limit, **settings)
    return batches, held_out and batches.held_out(held_out, say)


def load_trainable(options, model_dir, dtype, device):
    """The model with what is to be trained in float32, and its LoraConfig (None when full)."""
    import torch

    from minisft.config import ModelConfig
    from minisft.lora import LINEAR_NAMES, LoraConfig, add_lora, resume_lora
    from minisft.model import CausalLM
    from minisft.weights import load_adapter, load_model, resolve

    if options.train_from_scratch:
        model = CausalLM(ModelConfig.load(model_dir))
        model.initialize(torch.Generator().manual_seed(options.seed))
        return model.to(device), None
    if options.finetuning_type == "full":
        return load_model(model_dir, torch.float32, device).requires_grad_(True), None
    model = load_model(model_dir, dtype, device)
    if options.adapter:
        adapter_dir = resolve(options.adapter, "adapter_config.json")
        config = load_adapter(model, adapter_dir, options.lora_dropout)
        resume_lora(model, config)
        return model, config
    targets = listed(options.lora_target)
    config = LoraConfig(
        rank=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout,
        target_modules=LINEAR_NAMES if targets == ("all",) else targets,
        use_rslora=options.use_rslora, modules_to_save=listed(options.modules_to_save),
    )
    add_lora(model, config)
    return model, config


def listed(text):
    """Names separated by commas, as a tuple."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def train(run, batches, eval_examples):
    """The training loop. Returns the signal that interrupted it, or None when it is through."""
    from minisft import batching, parallel
    from minisft.checkpoint import Interruption
    from minisft.optimizer import learning_rate_at, set_learning_rate

    options, progress = run.options, run.progress
    rank, world_size = parallel.rank(), parallel.world_size()
    with Interruption() as interruption:
        for examples in batches.steps(run.rows_per_step, progress.step, run.total_steps):
            rate = learning_rate_at(progress.step, run.total_steps, options.learning_rate,
                                    options.lr_scheduler_type, run.warmup_steps, options.lr_end)
            set_learning_rate(run.optimizer, rate)
            parts = batching.micro_batches(examples, options.per_device_train_batch_size,
                                           rank, world_size)
            loss_sum, num_targets, grad_norm = train_step(
                run, [batching.collate(part, run.device) for part in parts])
            progress.add(loss_sum, num_targets, sum(len(example.ids) for example in examples))
            if due(run, options.logging_steps):
                progress.record(progress.step / run.steps_per_epoch, rate, grad_norm)
            if due(run, run.steps_per_epoch) and (report := batches.take_report()):
                progress.say(f"epoch {math.ceil(progress.step / run.steps_per_epoch)}: {report}")
            if eval_examples and due(run, options.eval_steps):
                evaluate(run, eval_examples)
                if early(run):
                    return None
            stopped = parallel.any_process(interruption.signal, run.device)
            if stopped or (due(run, options.save_steps) and progress.step < run.total_steps):
                run.save_checkpoint()
            if stopped:
                return stopped
    return None


def due(run, every):
    """Whether something done `every` so many steps, and at the end, is due after this step."""
    return run.progress.step == run.total_steps or every and run.progress.step % every == 0


def train_step(run, batches):
    """One optimizer step over this process's micro-batches.

    Returns this process's summed loss, the number of tokens it was summed over on all processes,
    and the norm of the gradient before clipping.
    """
    import torch

    from minisft import parallel
    from minisft.objective import next_token_loss

    run.model.train()
    # The loss of a step is the mean over all its supervised tokens, so they are counted first.
    mine = sum(int(supervised[:, 1:].sum()) for _, supervised in batches)
    (num_targets,) = parallel.sum_over_processes([mine], run.device)
    total = 0.0
    for index, (tokens, supervised) in enumerate(batches):
        with parallel.gradient_sync(run.wrapped, index == len(batches) - 1):
            with run.autocast:
                loss_sum, _ = next_token_loss(run.wrapped, tokens, supervised, run.model.logits)
            # DDP takes the mean over processes; the gradient wanted is that of their sum.
            run.scaler.scale(loss_sum * (parallel.world_size() / max(1, num_targets))).backward()
        total = total + loss_sum.detach()

    run.scaler.unscale_(run.optimizer)
    trained = [one for group in run.optimizer.param_groups for one in group["params"]]
    max_norm = run.options.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, max_norm).item()
    # In float16 an overflow now and then is how the loss scale is found; that step is skipped.
    finding_scale = run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if not math.isfinite(grad_norm) and not finding_scale:
        raise UserError(f"step {run.progress.step + 1}: the gradient's norm is {grad_norm}; "
                        "stopped before the weights were changed. Lower --learning_rate, or use "
                        "--dtype float32")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return total, num_targets, grad_norm


def evaluate(run, examples):
    """Log the loss on held-out rows; with --load_best_model_at_end save the model if it is best."""
    from minisft.objective import mean_loss

    began = time.monotonic()
    with run.autocast:
        loss = mean_loss(run.model, examples, run.options.per_device_eval_batch_size)
    run.progress.record_evaluation(loss, time.monotonic() - began)
    run.best["evaluations_since"] += 1
    if loss < run.best["loss"]:
        run.best = {"step": run.progress.step, "loss": loss, "evaluations_since": 0}
        if run.options.load_best_model_at_end:
            run.save_checkpoint()


def early(run):
    """Whether the loss has not improved for --early_stopping_patience evaluations."""
    patience = run.options.early_stopping_patience
    if patience is None or run.best["evaluations_since"] < patience:
        return False
    run.progress.say(f"stopped at step {run.progress.step}: no better evaluation in {patience}")
    return True


def main():
    options = parse_options()
    allowed = options.overwrite_output_dir or (
        options.resume_from_checkpoint and (Path(options.output_dir) / "options.toml").exists())
    output_dir = check_output_dir(options.output_dir, allowed, options.model_name_or_path,
                                  options.adapter)

    import torch

    from minisft import checkpoint, parallel
    from minisft.config import ModelConfig
    from minisft.run import Run
    from minisft.template import get_template
    from minisft.tokenizer import Tokenizer
    from minisft.weights import resolve

    device = parallel.start(resolve_device(options))
    dtype = resolve_dtype(options, device)
    is_main = parallel.rank() == 0

    def say(text):
        if is_main:
            print(text, flush=True)

    model_dir = resolve(options.model_name_or_path)
    config = ModelConfig.load(model_dir)
    tokenizer = Tokenizer.load(model_dir)
    template = None
    if options.stage == "sft":
        template = get_template(options.template, tokenizer, options.default_system)
        say(f"template: {template.name}")
    batches, eval_examples = load_data(options, tokenizer, template, config, say)
    for example in batches.first(options.show_samples if template else 0):
        say(template.show(example.ids.tolist(), example.supervised.tolist()) + "\n")

    torch.manual_seed(options.seed)
    model, lora_config = load_trainable(options, model_dir, dtype, device)
    torch.manual_seed(options.seed + parallel.rank())  # dropout differs between processes
    num_trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    num_parameters = sum(one.numel() for one in model.parameters())
    say(f"{len(batches.rows):,} rows; training {num_trained:,} of {num_parameters:,} parameters "
        f"({options.finetuning_type}) on {device}, {str(dtype).removeprefix('torch.')}, "
        f"{parallel.world_size()} process(es)")

    resumed = None
    if options.resume_from_checkpoint:
        resumed = checkpoint.find(output_dir, options.resume_from_checkpoint, say)
        say(f"resuming from {resumed}" if resumed else "no checkpoint to resume from: starting")
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        if resumed is None:
            checkpoint.remove_all(output_dir)
        save_options(options, output_dir / "options.toml")
    run = Run(options, model, lora_config, batches.num_examples, dtype, device, resumed)
    interrupted = train(run, batches, eval_examples)
    run.progress.close()
    if interrupted:
        say(f"stopped and saved at step {run.progress.step}; go on with\n"
            f"  python train.py --config {output_dir / 'options.toml'} "
            "--resume_from_checkpoint auto")
        parallel.stop()
        sys.exit(128 + interrupted)
    if options.load_best_model_at_end and run.best["step"]:
        best = output_dir / f"checkpoint-{run.best['step']}"
        checkpoint.restore_weights(model, best)
        say(f"took the weights of {best}, evaluation loss {run.best['loss']:.4f}")
    if is_main:
        save(options, model, lora_config, tokenizer, model_dir, output_dir)
        say(f"saved to {output_dir}")
    parallel.stop()


def save(options, model, lora_config, tokenizer, model_dir, output_dir):
    """Write the adapter, or the whole model in the type its checkpoint had."""
    import torch

    from minisft.metrics import plot_loss
    from minisft.weights import copy_generation_config, save_adapter, save_model, stored_dtype

    if lora_config is None:
        dtype = getattr(torch, model.config.dtype)
        save_model(model, output_dir,
                   dtype if options.train_from_scratch else stored_dtype(model_dir))
        copy_generation_config(model_dir, output_dir)
    else:
        save_adapter(model, output_dir, lora_config, options.model_name_or_path)
    tokenizer.save(output_dir)
    if options.plot_loss:
        try:
            print(f"drew {plot_loss(output_dir)}")
        except ImportError:
            print("--plot_loss needs matplotlib (requirements-extras.txt); the numbers are in "
                  f"{output_dir / 'metrics.jsonl'}")


if __name__ == "__main__":
    run_script(main)
