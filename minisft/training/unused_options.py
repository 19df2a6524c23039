"""Flags of `train.py` without effect that people often pass: a line says so, and training goes on.

note_unused(options, given)       # --run_name has no effect: it needs --report_to

check_options in options.py refuses flags whose lack of effect is more likely a mistake.
"""

from argparse import Namespace

from minisft.common.command_line import report_without_effect


def note_unused(options: Namespace, given: set[str]) -> None:
    """Print the flags without effect on rank 0. given: names of the flags that were given."""
    has_eval_rows = options.eval_dataset or options.valid_dir or options.validation_split
    no_report = options.report_to == "none"
    plan = "--dry_run does not train"
    report_without_effect(
        given,
        [
            ({"num_train_epochs"}, options.max_steps, "--max_steps sets the end"),
            (
                {"warmup_ratio"},
                options.warmup_steps is not None and options.lr_scheduler_type != "constant",
                "--warmup_steps sets the warm-up",
            ),
            ({"run_name"}, no_report, "it needs --report_to"),
            (
                {"per_device_eval_batch_size"},
                not (has_eval_rows or options.precompute_reference),
                "no rows are held out",
            ),
            # The record of an earlier run with --stage pt may hold it.
            ({"template_date"}, options.stage == "pt", "--stage pt has no chat template"),
            ({"plot_loss"}, options.dry_run, plan),
            ({"report_to", "run_name"}, options.dry_run and not no_report, plan),
        ],
    )
