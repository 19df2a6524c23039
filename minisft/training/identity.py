"""Which options make two runs the same, and whether such a run has finished already.

is_finished_run(options)        # True: --resume_from_checkpoint auto has nothing to do
result_record(options, step)    # the record that a finished run leaves for is_finished_run
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

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


def result_record(options: Namespace, step: int) -> dict[str, Any]:
    """The content of complete.json, besides the files."""
    return {"step": step, "options": _options_of_result(options)}


def _options_of_result(options: Namespace) -> dict[str, Any]:
    """The options that cannot change on resume, and those that decide where the run ends."""
    names = (*IDENTITY, "max_steps", "num_train_epochs")
    values = {name: getattr(options, name) for name in names}
    return json.loads(json.dumps(values))  # as it is read from the file
