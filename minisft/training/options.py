"""The flags of `train.py`, which of them belong together, and what follows from them alone.

options = parse_options(["--model_name_or_path", "examples/base", "--output_dir", "runs/demo",
                         "--dataset", "examples/data/train.json"])
options.learning_rate                        # 1e-4, as nothing was said and it trains LoRA
"""

import math

from minisft.common.command_line import (
    SCHEDULES,
    OptionParser,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from minisft.common.errors import UserError
from minisft.common.model_flags import add_model_flags


def count_or_epoch(text):
    """An argparse type: a number of steps, or `epoch` for as many as an epoch has."""
    return text if text == "epoch" else positive_int(text)


def parse_options(arguments=None):
    """The options of train.py, checked against each other; UserError names the flag at fault.

    arguments: the words of the command line; by default those of this process.
    """
    parser = OptionParser(description="Fine-tune (or pre-train) a Llama-family model.")
    add, switch = add_model_flags(parser)
    add("--adapter", help="go on training this LoRA adapter")
    switch("--train_from_scratch", "ignore the checkpoint's weights: start from random ones")
    _add_data_flags(*parser.section("data"))
    _add_tuning_flags(*parser.section("what is trained"))
    _add_preference_flags(*parser.section("preferences (--stage dpo)"))
    _add_optimisation_flags(*parser.section("optimisation"))
    _add_output_flags(*parser.section("output"))
    _add_plan_flags(*parser.section("plan"))
    options = parser.parse_options(arguments)
    return check_options(options, parser.given(options))


def _add_data_flags(add, switch):
    add(
        "--stage",
        choices=["sft", "pt", "rm", "dpo"],
        default="sft",
        help="sft: answers in conversations; pt: all of plain text; of several answers the better: "
        "rm: to reward it, dpo: to write it",
    )
    add("--dataset", help="files, folders and names in dataset_info.json, separated by commas")
    add("--dataset_dir", default="data", help="folder of dataset_info.json")
    add("--train_dir", help="folder of files, instead of --dataset")
    add(
        "--mix",
        metavar="FILE:RATIO",
        help="blend in general data, as this share of all rows (0.15 to 0.3 is usual)",
    )
    add("--eval_dataset", help="the same as --dataset, held out for evaluation")
    add("--valid_dir", help="folder of files held out, instead of --eval_dataset")
    add(
        "--validation_split",
        type=positive_float,
        help="hold out this share (below 1) or number of rows of --dataset",
    )
    add("--max_samples", type=positive_int, help="use only the first rows, for a quick try")
    switch("--skip_bad_rows", "leave broken rows out and count them, instead of stopping")
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=2,
        help="processes that read and encode rows ahead of training (0: none)",
    )
    add("--template", default="auto", help="conversation format, by name (auto: the checkpoint's)")
    add("--default_system", help="system prompt of conversations that have none")
    add(
        "--cutoff_len",
        type=positive_int,
        default=1024,
        help="longer rows are cut to this many tokens",
    )
    add("--block_size", type=positive_int, default=512, help="tokens of a block with --stage pt")
    add(
        "--show_samples",
        type=non_negative_int,
        default=0,
        help="print N rows, what is learned in colour",
    )


def _add_tuning_flags(add, switch):
    add("--finetuning_type", choices=["lora", "full"], default="lora", help="what is trained")
    add("--lora_rank", type=positive_int, default=8, help="rank of the adapter")
    add("--lora_alpha", type=positive_float, help="scale of the adapter, over its rank (2 x rank)")
    add("--lora_dropout", type=fraction, default=0.0, help="dropout on the adapter's input")
    add("--lora_target", default="all", help="all, or module names separated by commas")
    switch("--use_rslora", "scale by alpha over the root of the rank")
    add("--modules_to_save", default="", help="train these in full: embed_tokens,lm_head")


def _add_preference_flags(add, switch):
    add(
        "--dpo_beta",
        type=positive_float,
        default=0.1,
        help="how much straying from the reference costs",
    )
    add(
        "--dpo_label_smoothing",
        type=fraction,
        default=0.0,
        help="the share of pairs that may be judged the wrong way round, below 0.5",
    )
    add(
        "--dpo_ftx",
        type=non_negative_float,
        default=0.0,
        help="add so many times the loss that --stage sft has on the best answers",
    )
    switch(
        "--precompute_reference",
        "compute what the reference says once, before training: "
        "faster steps, and with full training no second model in memory",
    )


def _add_optimisation_flags(add, switch):
    add("--num_train_epochs", type=positive_float, default=3.0, help="passes over the rows")
    add("--max_steps", type=positive_int, help="stop after this many optimizer steps instead")
    add("--per_device_train_batch_size", type=positive_int, default=8, help="rows of a micro-batch")
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="micro-batches of a step",
    )
    add(
        "--learning_rate",
        type=positive_float,
        help="peak (1e-4 for lora, 1e-5 for full; with --stage dpo 5e-6 and 5e-7)",
    )
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="course after warm-up")
    add(
        "--lr_end", type=non_negative_float, default=0.0, help="where the polynomial course arrives"
    )
    add("--warmup_ratio", type=fraction, default=0.03, help="share of the steps to warm up over")
    add("--warmup_steps", type=non_negative_int, help="number of steps to warm up over, instead")
    add("--weight_decay", type=non_negative_float, default=0.0, help="of matrices only")
    add("--adam_beta1", type=fraction, default=0.9, help="decay of AdamW's mean")
    add("--adam_beta2", type=fraction, default=0.999, help="decay of AdamW's square")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon")
    add(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        help="clip the gradient to it; 0: no",
    )
    switch("--packing", "lay the rows of a micro-batch one after another instead of padding them")
    add(
        "--parallel",
        choices=["ddp", "fsdp"],
        default="ddp",
        help="of the processes of torchrun, each holds the model (ddp) or a part of it (fsdp)",
    )
    switch("--gradient_checkpointing", "compute activations twice instead of keeping them")
    switch("--compile", "compile the layers: minutes at the start, faster steps on a GPU")
    add(
        "--seed",
        type=non_negative_int,
        default=42,
        help="of the order of rows, adapter start and dropout",
    )


def _add_output_flags(add, switch):
    add("--output_dir", required=True, help="folder for the adapter or model, log and options")
    switch("--overwrite_output_dir", "write into a folder that has something in it")
    add(
        "--logging_steps",
        type=positive_int,
        default=10,
        help="steps between lines of metrics.jsonl",
    )
    add(
        "--eval_steps",
        type=count_or_epoch,
        metavar="N|epoch",
        help="steps between evaluations, or epoch: after each (default: at the end)",
    )
    switch("--eval_exact_match", "also answer the held-out rows and count the right answers")
    add(
        "--per_device_eval_batch_size",
        type=positive_int,
        default=8,
        help="rows of an evaluation batch",
    )
    add(
        "--save_steps",
        type=count_or_epoch,
        default=500,
        metavar="N|epoch",
        help="steps between checkpoints, or epoch: after each",
    )
    add("--save_total_limit", type=positive_int, default=2, help="checkpoints kept, and the best")
    add(
        "--resume_from_checkpoint",
        metavar="auto|DIR",
        help="go on from a checkpoint; auto: from the newest complete one, if there is any",
    )
    switch("--load_best_model_at_end", "in the end take the weights with the lowest eval loss")
    add(
        "--early_stopping_patience",
        type=positive_int,
        help="stop after so many evaluations without gain",
    )
    switch("--plot_loss", "draw loss.png into the output folder (needs matplotlib)")


def _add_plan_flags(add, switch):
    switch(
        "--dry_run",
        "only say what the run would take: parameters, steps, memory, time; needs "
        "config.json alone, and nothing is downloaded, loaded or written",
    )
    add(
        "--num_processes",
        type=positive_int,
        help="plan for so many (default: this one, or torchrun's)",
    )
    add("--device_memory", metavar="SIZE", help="of each process, such as 80GB: does it fit?")
    add(
        "--tokens_per_second",
        type=positive_float,
        help="speed of all processes together, as metrics.jsonl of a short run has it",
    )
    add(
        "--device_tflops",
        type=positive_float,
        help="else the speed that a device reaches, in 10^12 operations a second: on a GPU about "
        "0.4 of what its data sheet says",
    )


OF_LORA = {
    "adapter",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_rslora",
    "modules_to_save",
}
OF_CONVERSATIONS = {"template", "default_system", "cutoff_len", "show_samples"}
OF_DPO = {"dpo_beta", "dpo_label_smoothing", "dpo_ftx", "precompute_reference"}
OF_PLANS = {"num_processes", "device_memory", "tokens_per_second", "device_tflops"}


def check_options(options, given):
    """Refuse what cannot work before anything is loaded; fill in defaults that depend.

    given: the names of the flags that were set to something else than their default.
    """
    full, pretraining = options.finetuning_type == "full", options.stage == "pt"
    held_out = [options.eval_dataset, options.valid_dir, options.validation_split]
    for names, wrong, way_out in (
        (OF_LORA, full, "belongs to --finetuning_type lora"),
        (OF_CONVERSATIONS, pretraining, "belongs to conversations, not to --stage pt"),
        (OF_DPO, options.stage != "dpo", "belongs to --stage dpo"),
        (
            {"dpo_label_smoothing"},
            options.dpo_label_smoothing >= 0.5,
            f"{options.dpo_label_smoothing}: must be below 0.5, or the worse answers are learned",
        ),
        ({"eval_exact_match"}, options.stage != "sft", "belongs to --stage sft"),
        (
            {"packing", "train_from_scratch"},
            options.stage in ("rm", "dpo"),
            f"contradicts --stage {options.stage}",
        ),
        ({"block_size"}, not pretraining, "belongs to --stage pt"),
        ({"quantization_bit"}, full, "belongs to --finetuning_type lora"),
        ({"quantization_bit"}, options.compile, "contradicts --compile"),
        (OF_PLANS, not options.dry_run, "belongs to --dry_run"),
        ({"device_tflops"}, options.tokens_per_second, "contradicts --tokens_per_second"),
        ({"train_from_scratch"}, not full, "needs --finetuning_type full"),
        (
            {"quantization_bit", "eval_exact_match"},
            options.parallel == "fsdp",
            "contradicts --parallel fsdp",
        ),
        ({"lr_end"}, options.lr_scheduler_type != "polynomial", "needs a polynomial schedule"),
        (
            {"load_best_model_at_end", "early_stopping_patience"},
            not options.eval_steps,
            "needs --eval_steps: evaluations along the way",
        ),
        (
            {"eval_steps", "load_best_model_at_end", "early_stopping_patience", "eval_exact_match"},
            not any(held_out),
            "needs --eval_dataset, --valid_dir or --validation_split",
        ),
        (
            {"validation_split"},
            options.eval_dataset or options.valid_dir,
            "contradicts --eval_dataset and --valid_dir",
        ),
        ({"valid_dir"}, options.eval_dataset, "contradicts --eval_dataset"),
        ({"train_dir"}, options.dataset, "contradicts --dataset"),
        (
            OF_LORA - {"adapter", "lora_dropout"},
            options.adapter,
            "is the adapter's own, which --adapter brings",
        ),
    ):
        if wrong and names & given:
            raise UserError(f"--{min(names & given)} {way_out}")
    if not (options.dataset or options.train_dir):
        raise UserError("give --dataset or --train_dir: what to train on (see --help)")
    _fill_in(options, full)
    return options


def _fill_in(options, full):
    """The defaults that depend on other options."""
    if options.learning_rate is None:
        options.learning_rate = (1e-5 if full else 1e-4) / (20 if options.stage == "dpo" else 1)
    if options.lora_alpha is None and not (full or options.adapter):
        options.lora_alpha = 2.0 * options.lora_rank


def count_steps(options, num_rows, rows_per_step):
    """(steps of an epoch, of which the last may have fewer rows; steps of the whole run)."""
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    return steps_per_epoch, options.max_steps or math.ceil(
        steps_per_epoch * options.num_train_epochs
    )


def can_go_on(output_dir):
    """Whether this is the folder of a run to go on with; UserError where going on would lose one.

    A short run has left its result and no checkpoint: it would begin anew and write over that.
    """
    written_last = ("tokenizer.json", "tokenizer.model")
    is_finished = any((output_dir / name).exists() for name in written_last)
    if is_finished and not any(output_dir.glob("checkpoint-*")):
        raise UserError(
            f"--output_dir {output_dir}: holds a finished run and no checkpoint to go "
            "on from; choose another, or give --overwrite_output_dir to begin anew"
        )
    return (output_dir / "options.toml").exists()
