"""The flags of `train.py`, and checks of their combinations.

options = parse_options(["--model_name_or_path", "examples/base", "--output_dir", "runs/demo",
                         "--dataset", "examples/data/train.json"])
options.learning_rate                        # None: defaults.py chooses it once the model is known
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from minisft.common.command_line import (
    Neighbour,
    OptionParser,
    check_rules,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from minisft.common.errors import UserError
from minisft.common.model_flags import (
    CUTOFF_LEN,
    TEMPLATE_FLAGS,
    add_dataset_flags,
    add_model_flags,
    add_replace_flag,
    add_template_flags,
    dtype_option,
)
from minisft.common.option_types import (
    checkpoint_name,
    iso_date,
    json_object,
    rows_or_fraction,
    share_of_warmup,
    split_names,
    steps_of_warmup,
    steps_or_none,
    token_list,
)
from minisft.common.recipes import record_to_resume
from minisft.training.reports import chosen_services, service_names
from minisft.training.schedule_settings import SETTINGS, check_settings
from minisft.training.unused_options import note_unused

EXAMPLES = """\
  python train.py --model_name_or_path M --dataset rows.json --dry_run --show_samples 3
  python train.py --model_name_or_path M --dataset rows.json --output_dir runs/a
  python train.py --config runs/a/options.toml --resume_from_checkpoint auto
"""
COMMON = (
    "config model_name_or_path dataset template cutoff_len show_samples dry_run finetuning_type "
    "lora_rank num_train_epochs learning_rate per_device_train_batch_size output_dir "
    "validation_split resume_from_checkpoint"
)
# Flags of LLaMA-Factory; a recipe may have them.
NEIGHBOURS: dict[str, Neighbour] = {
    "disable_gradient_checkpointing": ((True,), "use --gradient_checkpointing"),
    "use_swanlab": ((False,), "use --report_to swanlab"),
}
Add = Callable[..., Any]
# The name of an optimizer in transformers, or ours -> ours.
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
}


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of train.py, checked against each other. UserError names the wrong flag.

    arguments: the words of the command line; by default those of this process.
    """
    description = "Fine-tune (or pre-train) a Llama-family model."
    parser = OptionParser(EXAMPLES, COMMON, NEIGHBOURS, description=description)
    add, switch = add_model_flags(parser)
    add("--adapter", help="LoRA adapter to train further")
    switch(
        "--train_from_scratch", "ignore the weights of the checkpoint and start from random ones"
    )
    _add_data_flags(*parser.section("data"))
    _add_tuning_flags(*parser.section("what is trained"))
    _add_preference_flags(*parser.section("preferences (--stage dpo)"))
    _add_optimizer_flags(*parser.section("optimization"))
    _add_output_flags(*parser.section("output"))
    _add_plan_flags(*parser.section("plan"))
    options = parser.parse_options(arguments)
    check_options(options, parser.given(options))
    note_unused(options, parser.given(options))
    _set_dependent_defaults(options)
    return options


def _add_data_flags(add: Add, switch: Add) -> None:
    stages = "sft: answers of conversations; pt: plain text; rm: a reward model; dpo: preferences"
    add("--stage", choices=["sft", "pt", "rm", "dpo"], default="sft", help=stages)
    add_dataset_flags(add)
    add("--train_dir", help="folder of files, instead of --dataset")
    mix = "add general data as this share of all rows (0.15 to 0.3 is usual)"
    add("--mix", metavar="FILE:RATIO", help=mix)
    add("--eval_dataset", help="like --dataset, held out for evaluation")
    add("--valid_dir", help="folder of held-out files, instead of --eval_dataset")
    split = "hold out this fraction (below 1) or number of the rows of --dataset"
    add("--validation_split", type=rows_or_fraction, metavar="X|N", help=split)
    first = "use only the first N rows of each data set, for a quick try"
    add("--max_samples", type=positive_int, help=first)
    add_replace_flag(add)
    switch("--skip_bad_rows", "leave broken rows out and count them, instead of stopping")
    workers = "processes that read and encode rows ahead of training (0: none)"
    add("--dataloader_num_workers", type=non_negative_int, default=2, help=workers)
    add_template_flags(add, auto="the checkpoint's own")
    date = "date and time that the chat template sees (default: now; kept on resume)"
    add("--template_date", type=iso_date, metavar="DATE", help=date)
    switch("--mask_history", "learn only the last answer of a conversation")
    cutoff = "truncate longer rows to N tokens"
    add("--cutoff_len", type=positive_int, default=CUTOFF_LEN, help=cutoff)
    add("--block_size", type=positive_int, default=512, help="tokens of a block with --stage pt")
    samples = (
        "print the first N rows or blocks, supervised tokens in green; --dry_run ends after them"
    )
    add("--show_samples", type=non_negative_int, default=0, help=samples)
    switch("--show_ids", "print the token ids of these rows too")


def _add_tuning_flags(add: Add, switch: Add) -> None:
    add("--finetuning_type", choices=["lora", "full"], default="lora", help="what is trained")
    rank = "rank of the LoRA update; 8 to 64 is usual"
    add("--lora_rank", type=positive_int, default=8, help=rank)
    add("--lora_alpha", type=positive_float, help="scale of the LoRA update (default: 2 x rank)")
    add("--lora_dropout", type=fraction, default=0.0, help="dropout on the input of the adapter")
    target = "modules to adapt, separated by commas; all or all-linear: every linear layer"
    add("--lora_target", default="all", help=target)
    switch("--use_rslora", "divide alpha by the square root of the rank (rsLoRA)")
    add("--modules_to_save", default="", help="train these in full: embed_tokens,lm_head,norm")
    special = "tokens to add, with commas between; only a chat template writes them"
    add("--new_special_tokens", type=token_list, metavar="TOKENS", help=special)
    ordinary = "tokens to add that match wherever a text spells them"
    add("--add_tokens", type=token_list, metavar="TOKENS", help=ordinary)
    switch("--resize_vocab", "add rows if the tokenizer has more tokens than the model")


def _add_preference_flags(add: Add, switch: Add) -> None:
    beta = "strength of the pull towards the reference model"
    add("--dpo_beta", type=positive_float, default=0.1, help=beta)
    smoothing = "probability that a label is wrong, below 0.5"
    add("--dpo_label_smoothing", type=fraction, default=0.0, help=smoothing)
    ftx = "weight of an added SFT loss on the best answers"
    add("--dpo_ftx", type=non_negative_float, default=0.0, help=ftx)
    precompute = "run the reference model once, before training: faster steps, less memory"
    switch("--precompute_reference", precompute)


def _add_optimizer_flags(add: Add, switch: Add) -> None:
    add("--num_train_epochs", type=positive_float, default=3.0, help="passes over the rows")
    stop = "stop after N optimizer steps instead of epochs (-1: epochs)"
    add("--max_steps", type=steps_or_none, metavar="N", help=stop)
    batch_size = "rows of a micro-batch"
    add("--per_device_train_batch_size", type=positive_int, default=8, help=batch_size)
    accumulation = "micro-batches of an optimizer step"
    add("--gradient_accumulation_steps", type=positive_int, default=1, help=accumulation)
    rate = "peak (default: follows the method and the model's size, see docs/training.md)"
    add("--learning_rate", type=positive_float, help=rate)
    schedule = "learning-rate schedule after warm-up; constant has no warm-up"
    add("--lr_scheduler_type", choices=list(SETTINGS), default="cosine", help=schedule)
    settings = "settings of the schedule, as in transformers, such as '{\"min_lr_rate\": 0.1}'"
    add("--lr_scheduler_kwargs", type=json_object, metavar="JSON", help=settings)
    end = "final learning rate of the polynomial schedule"
    add("--lr_end", type=non_negative_float, default=0.0, help=end)
    add("--warmup_ratio", type=share_of_warmup, default=0.03, help="share of the steps for warm-up")
    add("--warmup_steps", type=steps_of_warmup, help="steps of warm-up, instead of a share")
    add(
        "--weight_decay",
        type=non_negative_float,
        default=0.0,
        help="weight decay of matrices; norms and biases have none",
    )
    memory = "adamw_8bit: moments in 8 bits, a quarter of their memory"
    add("--optim", type=optimizer_name, default="adamw", metavar="adamw|adamw_8bit", help=memory)
    bf16 = "full training: weights and gradients in bfloat16, with stochastic rounding"
    switch("--pure_bf16", bf16)
    add("--adam_beta1", type=fraction, default=0.9, help="decay of AdamW's mean")
    add("--adam_beta2", type=fraction, default=0.999, help="decay of AdamW's mean square")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon")
    clip = "clip the gradient to this norm (0: do not clip)"
    add("--max_grad_norm", type=non_negative_float, default=1.0, help=clip)
    switch("--packing", "put the rows of a micro-batch in one sequence instead of padding them")
    parallel = "with torchrun: every process holds the model (ddp) or a shard of it (fsdp)"
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help=parallel)
    switch("--gradient_checkpointing", "recompute activations instead of keeping them in memory")
    switch("--compile", "compile the layers: minutes at the start, faster steps on a GPU")
    seed = "seed of the row order, the initial adapter, and dropout"
    add("--seed", type=non_negative_int, default=42, help=seed)


def _add_output_flags(add: Add, switch: Add) -> None:
    output = "folder for the adapter or model, log and options"
    look = "to look at the data only, add --dry_run"
    add("--output_dir", required=True, unless="dry_run", remark=look, help=output)
    switch("--overwrite_output_dir", "write into a folder that is not empty")
    logging = "steps between lines of metrics.jsonl; step 1 has a line, too"
    add("--logging_steps", type=positive_int, default=10, help=logging)
    evaluation = "steps between evaluations (epoch: after each; default: at the end)"
    add("--eval_steps", type=count_or_epoch, metavar="N|epoch", help=evaluation)
    switch("--eval_exact_match", "also generate the held-out answers and count those that match")
    eval_size = "rows of an evaluation batch"
    add("--per_device_eval_batch_size", type=positive_int, default=8, help=eval_size)
    saving = "steps between checkpoints (epoch: after each)"
    add("--save_steps", type=count_or_epoch, default=500, metavar="N|epoch", help=saving)
    limit = "newest checkpoints to keep, besides the best (0: none after the end of the run)"
    add("--save_total_limit", type=non_negative_int, default=2, help=limit)
    resume = "continue from a checkpoint (auto: the newest complete one, if any)"
    resuming: dict[str, Any] = dict(nargs="?", const="auto", metavar="auto|DIR")
    add("--resume_from_checkpoint", type=checkpoint_name, help=resume, **resuming)
    switch("--load_best_model_at_end", "save the weights with the lowest evaluation loss")
    patience = "stop after N evaluations without improvement"
    add("--early_stopping_patience", type=positive_int, help=patience)
    services = "show metrics in tensorboard, wandb, swanlab or trackio; several with commas"
    add("--report_to", type=service_names, default="none", metavar="NAMES", help=services)
    add("--run_name", help="name of the run there (default: the output folder)")
    switch("--plot_loss", "draw loss.png into the output folder (needs matplotlib)")


def _add_plan_flags(add: Add, switch: Add) -> None:
    switch("--dry_run", "print rows, steps, memory and time, and end; needs config.json only")
    processes = "plan for N processes (default: this one, or those of torchrun)"
    add("--num_processes", type=positive_int, help=processes)
    add("--device_memory", metavar="SIZE", help="memory of each device, such as 80GB: does it fit?")
    tokens = "speed of all processes, as in metrics.jsonl of a short run"
    add("--tokens_per_second", type=positive_float, help=tokens)
    tflops = (
        "or speed of a device, in 10^12 operations per second; a GPU reaches about 0.4 of its peak"
    )
    add("--device_tflops", type=positive_float, help=tflops)


def optimizer_name(text: str) -> str:
    """An argparse type: adamw or adamw_8bit, also by the names of transformers."""
    if text not in OPTIMIZERS:
        raise ArgumentTypeError("minisft trains with AdamW: give adamw or adamw_8bit")
    return OPTIMIZERS[text]


def count_or_epoch(text: str) -> int | str:
    """An argparse type: a number of steps, or `epoch` for the steps of an epoch."""
    return text if text == "epoch" else positive_int(text)


def scheduler_settings(options: Namespace) -> dict[str, Any]:
    """The settings of the learning-rate schedule: --lr_scheduler_kwargs and --lr_end."""
    settings = json.loads(options.lr_scheduler_kwargs or "{}")
    return {"lr_end": options.lr_end, **settings} if options.lr_end else settings


ADAPTER_SHAPE = {"lora_rank", "lora_alpha", "lora_target", "use_rslora", "modules_to_save"}
LORA = ADAPTER_SHAPE | {"adapter", "lora_dropout", "quantization_bit"}
TOKENS = {"new_special_tokens", "add_tokens", "resize_vocab"}
CONVERSATIONS = {"cutoff_len", *TEMPLATE_FLAGS}
DPO = {"dpo_beta", "dpo_label_smoothing", "dpo_ftx", "precompute_reference"}
PLAN = {"num_processes", "device_memory", "tokens_per_second", "device_tflops"}
NEEDS_EVAL_ROWS = "needs --eval_dataset, --valid_dir or --validation_split"
ALONG_THE_WAY = {"load_best_model_at_end", "early_stopping_patience"}


def check_options(options: Namespace, given: set[str]) -> None:
    """Raise UserError for flags that have no effect or contradict each other.

    given: names of the flags that were given.
    """
    is_full, stage = options.finetuning_type == "full", options.stage
    special, ordinary = map(split_names, (options.new_special_tokens, options.add_tokens))
    # With --adapter, the adapter decides whether embedding and output matrix are trained.
    trains_matrices = is_full or options.modules_to_save or special or ordinary or options.adapter
    has_eval_rows = options.eval_dataset or options.valid_dir or options.validation_split
    rules: list[tuple[set[str], Any, str]] = [
        (LORA, is_full, "belongs to --finetuning_type lora"),
        ({"train_from_scratch"}, not is_full, "needs --finetuning_type full"),
        (ADAPTER_SHAPE, options.adapter, "is fixed by --adapter"),
        (
            {"lora_target"},
            (special or ordinary) and "lm_head" in split_names(options.lora_target),
            "names lm_head, which is trained in full with new tokens",
        ),
        (TOKENS, options.adapter, "contradicts --adapter: merge it first (export.py --format hf)"),
        (CONVERSATIONS, stage == "pt", "belongs to conversations, not to --stage pt"),
        ({"block_size"}, stage != "pt", "belongs to --stage pt"),
        ({"show_ids"}, not options.show_samples, "needs --show_samples"),
        ({"eval_exact_match", "mask_history"}, stage != "sft", "belongs to --stage sft"),
        (DPO, stage != "dpo", "belongs to --stage dpo"),
        ({"dpo_label_smoothing"}, options.dpo_label_smoothing >= 0.5, "must be below 0.5"),
        ({"packing", "train_from_scratch"}, stage in ("rm", "dpo"), f"contradicts --stage {stage}"),
        ({"quantization_bit"}, options.compile, "contradicts --compile"),
        (
            {"quantization_bit", "eval_exact_match"},
            options.parallel == "fsdp",
            "contradicts --parallel fsdp",
        ),
        (
            {"optim"},
            options.optim == "adamw_8bit" and not trains_matrices,
            "adamw_8bit saves nothing here, because an adapter is small. Use it with "
            "--finetuning_type full, or with LoRA and --modules_to_save or new tokens",
        ),
        (
            {"pure_bf16"},
            not is_full,
            "needs --finetuning_type full: an adapter is small in float32",
        ),
        (
            {"pure_bf16"},
            dtype_option(options) not in ("auto", "bfloat16"),
            f"contradicts --dtype {dtype_option(options)}",
        ),
        ({"lr_end"}, options.lr_scheduler_type != "polynomial", "needs a polynomial schedule"),
        (
            {name for name in ("warmup_ratio", "warmup_steps") if getattr(options, name)},
            options.lr_scheduler_type == "constant",
            "contradicts --lr_scheduler_type constant; constant_with_warmup has a warm-up",
        ),
        (ALONG_THE_WAY, not options.eval_steps, "needs --eval_steps: evaluations along the way"),
        ({"eval_steps"}, not has_eval_rows, f"(also by --eval_strategy) {NEEDS_EVAL_ROWS}"),
        ({"eval_exact_match"} | ALONG_THE_WAY, not has_eval_rows, NEEDS_EVAL_ROWS),
        (
            {"validation_split"},
            options.eval_dataset or options.valid_dir,
            "contradicts --eval_dataset and --valid_dir",
        ),
        ({"valid_dir"}, options.eval_dataset, "contradicts --eval_dataset"),
        ({"train_dir"}, options.dataset, "contradicts --dataset"),
        (PLAN, not options.dry_run, "belongs to --dry_run"),
        ({"device_tflops"}, options.tokens_per_second, "contradicts --tokens_per_second"),
    ]
    check_rules(rules, given)
    if twice := [token for token in special if token in ordinary]:
        raise UserError(f"{twice[0]} is in --new_special_tokens and in --add_tokens. Choose one.")
    chosen_services(options)
    check_settings(options.lr_scheduler_type, scheduler_settings(options))
    if not (options.dataset or options.train_dir):
        record = record_to_resume(options)
        remark = f"; --config {record} has the options of that run" if record else ""
        raise UserError(f"nothing to train on: give --dataset or --train_dir{remark} (see --help)")


def _set_dependent_defaults(options: Namespace) -> None:
    if options.pure_bf16:
        options.dtype = "bfloat16"
    if options.lora_alpha is None and options.finetuning_type == "lora" and not options.adapter:
        options.lora_alpha = 2.0 * options.lora_rank
