"""The adapter that the flags of train.py describe."""

from argparse import Namespace

from minisft.common.errors import UserError
from minisft.common.option_types import split_names
from minisft.model.lora import ALL, LoraConfig, linear_names, target_names
from minisft.model.modules_to_save import short_names
from minisft.model.reward import Model


def lora_from_options(options: Namespace) -> LoraConfig:
    """--lora_rank, --lora_alpha, --lora_dropout, --lora_target, --use_rslora, --modules_to_save."""
    targets, saved = (
        tuple(name for name in split_names(text) if name)
        for text in (options.lora_target, options.modules_to_save)
    )
    return LoraConfig(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        target_modules=ALL if targets == ("all-linear",) else targets,
        use_rslora=options.use_rslora,
        modules_to_save=short_names(saved),
    )


def check_targets(model: Model, config: LoraConfig) -> None:
    """UserError if a target is not a linear layer of the model, or is also trained in full."""
    targets, names = target_names(model, config), linear_names(model)
    wanted = names if config.target_modules == ALL else config.target_modules
    unknown = set(wanted) - {name.split(".")[-1] for name in targets}
    if unknown or not targets:
        called = f"is called {', '.join(sorted(unknown))}" if unknown else "is named"
        raise UserError(
            f"--lora_target: no linear layer {called}. Choose from all, {', '.join(names)}."
        )
    if both := set(targets) & set(config.modules_to_save):
        raise UserError(f"{min(both)} is in --lora_target and in --modules_to_save. Choose one.")
