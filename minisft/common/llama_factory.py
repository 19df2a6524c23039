"""The keys of LLaMA-Factory's recipes, and the flags of transformers and trl, as minisft's flags.

    options, refused = translate({"val_size": 0.1, "deepspeed": "ds_z3.json"}, flags)
    options                                         # {"validation_split": 0.1}
    refused                                         # {"deepspeed": "use --parallel fsdp"}

Most keys have the name of our flag. The others are renamed, or request the default behaviour, or
are refused with a reason. Keys that the recipe leaves out keep the defaults of minisft.
"""

import re
from collections.abc import Collection
from typing import Any

from minisft.common.other_programs import NEVER_OFF, RENAMED, VALUES, WITHOUT_EFFECT
from minisft.common.refusals import REASONS, WRONG_VALUES

# Strategies of transformers, which say the same as our numbers of steps.
STRATEGIES = ("eval_strategy", "evaluation_strategy", "save_strategy")
# LLaMA-Factory's template -> ours, and the system prompt of theirs.
TEMPLATES = {
    "empty": ("plain", None),
    "qwen": ("chatml", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3_nothink": ("chatml", None),
    "zephyr": ("zephyr", "You are Zephyr, a helpful assistant."),
}


def translate(
    recipe: dict[str, Any], flags: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """({flag: value}, {key: why minisft does not have it}).

    flags: the names of the script's flags. Keys that are neither a flag nor LLaMA-Factory's stay.
    """
    options: dict[str, Any] = {}
    refused: dict[str, str] = {}
    key_of: dict[str, str] = {}  # {flag: the key that set it}
    recipe = dict(recipe)
    set_steps(recipe)
    for key, value in recipe.items():
        name = RENAMED.get(key, key)
        is_known_value = value in VALUES.get(key, ())
        reason = _reason(key, value, flags)
        if key in WITHOUT_EFFECT or is_known_value and key not in flags:
            continue
        is_off = key not in NEVER_OFF and value in (False, "", "none", 0)
        if (name != key or reason) and (is_off or value is None):
            continue  # a feature that is off changes nothing
        if reason and not is_known_value:
            shown = f"{key}: {value}" if key in VALUES else key
            refused[shown] = reason
        else:
            flag = name if name in flags else key
            if flag in options and options[flag] != value:
                refused[key] = f"{key_of[flag]} gives another value for the same option"
            options[flag], key_of[flag] = value, key
    _set_data(options)
    if "disable_gradient_checkpointing" in options:
        is_on = not options.pop("disable_gradient_checkpointing")
        if options.setdefault("gradient_checkpointing", is_on) != is_on:
            refused["disable_gradient_checkpointing"] = "gradient_checkpointing says the opposite"
    if options.pop("use_swanlab", False):
        others = options.get("report_to") or []
        others = others if isinstance(others, list) else [others]
        options["report_to"] = [name for name in others if name != "none"] + ["swanlab"]
    return options, refused


def read_value(text: str) -> Any:
    """The value of a flag on the command line, as YAML reads it; a flag without a value is on."""
    names = {"": True, "true": True, "false": False, "no": False, "none": None, "null": None}
    if text.lower() in names:
        return names[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _reason(key: str, value: Any, flags: Collection[str]) -> str | None:
    """Why minisft does not have this key, or this value of it; None if it may have it.

    flags: the names of the script's flags. Most reasons name flags of train.py.
    """
    prefixes = [name for name in REASONS if name.endswith("*") and key.startswith(name[:-1])]
    if "max_shard_size" in flags:  # export.py itself has export_*, under other names
        prefixes = [name for name in prefixes if name != "export_*"]
    reason = WRONG_VALUES.get(key, {}).get(str(value).lower())
    reason = reason or next((REASONS[name] for name in [key, *prefixes] if name in REASONS), None)
    named = set(re.findall(r"--(\w+)", reason or "")) - {"help", "nproc_per_node"}
    return reason if named <= set(flags) else f"in train.py: {reason}"


def set_steps(recipe: dict[str, Any]) -> None:
    """Translate strategies, and step counts that mean "none", to our flags. In place.

    A strategy that minisft does not have stays.
    """
    if "evaluation_strategy" in recipe:  # its name before transformers 4.46
        recipe.setdefault("eval_strategy", recipe.pop("evaluation_strategy"))
    if recipe.get("max_steps") == -1:
        del recipe["max_steps"]
    if recipe.get("warmup_steps") == 0 and "warmup_ratio" in recipe:
        del recipe["warmup_steps"]
    if recipe.get("save_strategy") == "epoch":
        recipe["save_steps"] = recipe.pop("save_strategy")
    strategy = recipe.get("eval_strategy")
    if strategy == "epoch":
        recipe["eval_steps"] = "epoch"
    elif strategy == "steps":
        recipe.setdefault("eval_steps", recipe.get("logging_steps", 500))
    elif strategy in (False, "no"):  # YAML reads `no` as False
        recipe.pop("eval_steps", None)
    if strategy in ("epoch", "steps", False, "no", None):
        recipe.pop("eval_strategy", None)


def _set_data(options: dict[str, Any]) -> None:
    """Templates get our names; plain text has blocks and no template. In place."""
    if options.get("stage") == "pt":
        options.pop("template", None)
        if "cutoff_len" in options and "block_size" not in options:
            options["block_size"] = options.pop("cutoff_len")
    template = options.get("template")
    if template in TEMPLATES:
        options["template"], system = TEMPLATES[template]
        if system:
            options.setdefault("default_system", system)
