"""Which options make two runs the same, and whether such a run has finished already.

is_finished_run(options)        # True: --resume_from_checkpoint auto has nothing to do
print(finished_note(options))   # says so, and which options have changed
result_record(options, step)    # the record that a finished run leaves for is_finished_run
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from minisft.common.outputs import UNRECORDED, recorded_options
from minisft.training.new_result import read_record

# Options that decide which rows are trained on and what is trained. They cannot change on resume.
IDENTITY = (
    "seed",
    "stage",
    "template",
    "default_system",
    "template_kwargs",
    "enable_thinking",
    "mask_history",
    "cutoff_len",
    "block_size",
    "max_samples",
    "validation_split",
    "finetuning_type",
    "lora_rank",
    "lora_alpha",
    "lora_target",
    "use_rslora",
    "modules_to_save",
    "new_special_tokens",
    "add_tokens",
    "resize_vocab",
    "quantization_bit",
    "optim",
    "pure_bf16",
)
# Options that decide what the evaluation loss measures. After a change, old losses do not count.
MEASURED = ("eval_dataset", "valid_dir", "dpo_beta", "dpo_label_smoothing", "dpo_ftx")
# Options that may change on resume without a warning.
SILENT = {
    "config",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "output_dir",
    "show_samples",
    "show_ids",
    "plot_loss",
    "report_to",
    "run_name",
    "template_date",
}


def is_finished_run(options: Namespace) -> bool:
    """True if --resume_from_checkpoint is auto and --output_dir holds the result of these steps."""
    record = read_record(Path(options.output_dir))
    is_same = record.get("options") == _options_of_result(options)
    return options.resume_from_checkpoint == "auto" and is_same


def finished_note(options: Namespace) -> str:
    """The message about a finished run: there is nothing to do, and which options have changed."""
    note = (
        f"{options.output_dir} holds the finished run. Nothing to do; raise --max_steps or "
        "--num_train_epochs to go on."
    )
    before, now = recorded_options(options.output_dir), _as_json(vars(options))
    names = sorted((before.keys() | now.keys()) - SILENT - set(UNRECORDED))
    changed = [name for name in names if before.get(name) != now.get(name)]
    if options.learning_rate is None and "learning_rate" in changed:
        changed.remove("learning_rate")  # the run chose it
    if changed:
        note += " For a new run with other options, choose another --output_dir:"
    for name in changed:
        values = (
            "not given" if value is None else value for value in (before.get(name), now[name])
        )
        note += "\n  --{}: {} in that run, {} now".format(name, *values)
    return note


def result_record(options: Namespace, step: int) -> dict[str, Any]:
    """The content of complete.json, besides the files."""
    return {"step": step, "options": _options_of_result(options)}


def _options_of_result(options: Namespace) -> dict[str, Any]:
    """The options that cannot change on resume, and those that decide where the run ends."""
    names = (*IDENTITY, "max_steps", "num_train_epochs")
    values = {name: getattr(options, name) for name in names}
    return _as_json(values)


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they are when they are read from a file."""
    return json.loads(json.dumps(values))
