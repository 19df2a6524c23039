"""The model card: README.md of an adapter or a model, with the front matter of the hub's pages.

write_model_card("runs/demo", recorded_options("runs/demo"), base="examples/base", metrics=[])

It says where the result comes from: base, data, template, settings and metrics. The licence is left
to the person who publishes the model.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisft.common.outputs import atomic_write

CARD = "README.md"
# Every card that minisft writes has this line; another README.md is never replaced.
MARK = "<!-- written by minisft -->"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
METHODS = {
    "sft": "supervised fine-tuning",
    "pt": "continued pre-training",
    "rm": "a reward model",
    "dpo": "direct preference optimization",
}
# The options that decide what was learned, in the order of the card.
SETTINGS = (
    "template_kwargs enable_thinking mix max_samples replace validation_split finetuning_type "
    "train_from_scratch adapter lora_rank lora_alpha lora_dropout "
    "lora_target use_rslora modules_to_save quantization_bit new_special_tokens add_tokens "
    "resize_vocab learning_rate lr_scheduler_type lr_scheduler_kwargs lr_end warmup_ratio "
    "warmup_steps num_train_epochs max_steps rows_per_step "
    "per_device_train_batch_size gradient_accumulation_steps packing cutoff_len block_size "
    "mask_history optim pure_bf16 adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm "
    "dpo_beta dpo_label_smoothing dpo_ftx seed dtype"
).split()
# Settings that only one stage reads.
ONE_STAGE = {"pt": "block_size", "dpo": "dpo_beta dpo_label_smoothing dpo_ftx"}
# Settings without effect at 0.
OFF_AT_ZERO = "lora_dropout lr_end weight_decay dpo_label_smoothing dpo_ftx".split()
LORA_SETTINGS = "lora_rank lora_alpha lora_target use_rslora modules_to_save".split()


def write_model_card(
    output_dir: str | Path,
    options: Mapping[str, Any],
    base: str | Path,
    metrics: Sequence[Mapping[str, Any]] = (),
    is_adapter: bool = False,
    written_to: str | Path | None = None,
    context_length: int | None = None,
    is_reward_model: bool = False,
) -> None:
    """Write README.md of the folder `output_dir`, unless somebody else has written one there.

    options: those of the training; empty if they are not known. base: the model it began with.
    metrics: the lines of metrics.jsonl. is_adapter: False for a complete model.
    written_to: the folder that holds the file until it moves to `output_dir`. context_length: that
    of the model, in tokens. is_reward_model: True if the model writes no text.
    """
    path = Path(output_dir) / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    stage = str(options.get("stage", "sft"))  # options.toml may come from anybody
    is_reward_model = is_reward_model or stage == "rm"
    used = used_settings(options, context_length) if options else {}
    front = front_matter(options, str(base), is_adapter, is_reward_model)
    lines = ["---", *front, "---", "", MARK, ""]
    lines += [f"# {Path(output_dir).resolve().name}", ""]
    kind = "A LoRA adapter for" if is_adapter else "Made from"
    lines += [
        f"{kind} {shown_name(base)}" + (f": {METHODS.get(stage, stage)}." if options else ".")
    ]
    if options:
        lines += ["", "## Training", "", *settings_table(used)]
    if rows := metrics_table(metrics):
        lines += ["", "## Metrics", "", *rows]
        limit = used.get("block_size" if stage == "pt" else "cutoff_len")
        if limit and any("eval_loss" in row for row in metrics):
            rows = "blocks of" if stage == "pt" else "at most the first"
            of_row = "" if stage == "pt" else " of a row"
            lines += ["", f"The evaluation covers {rows} {limit} tokens{of_row}."]
    flag = "--adapter" if is_adapter else "--model_name_or_path"
    bits = options.get("quantization_bit")
    more = f" --quantization_bit {bits}" if is_adapter and bits in (4, 8) else ""
    if not is_reward_model:
        lines += [
            "",
            "## Use",
            "",
            "```sh",
            f"python chat.py {flag} {shlex.quote(shown_path(output_dir))}{more}",
            "```",
        ]
    with atomic_write(Path(written_to or output_dir) / CARD) as file:
        file.write("\n".join(lines) + "\n")


def front_matter(
    options: Mapping[str, Any], base: str, is_adapter: bool, is_reward_model: bool
) -> list[str]:
    """The lines of YAML that the hub reads. A string in JSON is a string in YAML too."""
    lines = ["# license: your choice, within the licences of the base model and the data"]
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base)}")
    else:
        lines.append(f"# base_model: the hub's name of {shown_name(base)}")
    lines.append(f"library_name: {'peft' if is_adapter else 'transformers'}")
    task = "text-classification" if is_reward_model else "text-generation"
    tags = ["minisft", str(options.get("stage", "sft"))] if options else ["minisft"]
    lines += [f"pipeline_tag: {task}", f"tags: {json.dumps(tags)}"]
    if names := [name for name in data_names(options) if HUB_ID.fullmatch(name)]:
        if hub_names := [name for name in names if not Path(name).exists()]:
            lines.append(f"datasets: {json.dumps(hub_names)}")
    return lines


def data_names(options: Mapping[str, Any]) -> list[str]:
    """The data sets of the training."""
    names = str(options.get("dataset") or options.get("train_dir") or "").split(",")
    if mix := options.get("mix"):
        names.append(str(mix).rpartition(":")[0])
    return [name.strip() for name in names if name.strip()]


def used_settings(options: Mapping[str, Any], context_length: int | None) -> dict[str, Any]:
    """The options of a training without those that had no effect, with the values that had."""
    used, stage = dict(options), str(options.get("stage", "sft"))
    for flag, meaning in (("bf16", "bfloat16"), ("fp16", "float16")):
        if options.get(flag):
            used["dtype"] = meaning
    if used.get("template") == "auto":
        used["template"] = "the base's own"
    unused = ["dtype"] if used.get("dtype") == "auto" else []
    unused += [name for name in OFF_AT_ZERO if not options.get(name)]
    for other in ONE_STAGE.keys() - {stage}:
        unused += ONE_STAGE[other].split()
    if stage == "pt":
        unused += ["cutoff_len", "template", "default_system", "template_kwargs", "enable_thinking"]
    if options.get("finetuning_type") == "full":
        unused += [*LORA_SETTINGS, "lora_dropout"]
    elif options.get("adapter"):  # which decides them
        unused += LORA_SETTINGS
    if options.get("eval_dataset") or options.get("valid_dir"):
        unused.append("validation_split")
    if options.get("max_steps"):
        unused.append("num_train_epochs")
    if options.get("lr_scheduler_type") == "constant":
        unused += ["warmup_ratio", "warmup_steps"]
    elif options.get("warmup_steps") is not None:
        unused.append("warmup_ratio")
    for name in ("cutoff_len", "block_size"):
        if context_length and isinstance(used.get(name), int):
            used[name] = min(used[name], context_length)
    return {name: value for name, value in used.items() if name not in unused}


def settings_table(options: Mapping[str, Any]) -> list[str]:
    """Data, template and settings as a table."""
    values: dict[str, Any] = {"data": ", ".join(map(shown_name, data_names(options)))}
    values["template"] = shown_name(options.get("template") or "")
    values["system prompt"] = options.get("default_system")
    values |= {name: options.get(name) for name in SETTINGS}
    for name in ("adapter", "mix"):
        values[name] = shown_name(options.get(name) or "")
    if options.get("enable_thinking") is False:  # which is not a switch that is off
        values["enable_thinking"] = "false"
    rows = [
        f"| {name} | {_cell(value)} |"
        for name, value in values.items()
        if value is not None and value is not False and value != ""
    ]
    return ["| setting | value |", "|---|---|", *rows]


def metrics_table(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last loss, and the last evaluation, as a table; empty without metrics."""
    found: dict[str, tuple[Any, Any]] = {}
    for row in metrics:
        for name, value in row.items():
            if (name == "loss" or name.startswith("eval_")) and value is not None:
                found[name] = value, row["step"]
    if not found:
        return []
    rows = [f"| {name} | {value} | {step} |" for name, (value, step) in found.items()]
    return ["| metric | value | step |", "|---|---|---|", *rows]


def shown_name(path: str | Path) -> str:
    """The name of a model or a data set. An absolute path is reduced to its last part."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def shown_path(folder: str | Path) -> str:
    """A folder as a command names it. Of an absolute path, other people need the last part only."""
    return f"path/to/{Path(folder).name}" if Path(folder).is_absolute() else str(folder)


def _cell(value: Any) -> str:
    """A value in a table: on one line, without the character that ends a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
