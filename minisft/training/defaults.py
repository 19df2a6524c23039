"""The learning rate, if --learning_rate is not given: it depends on the model and the method.

    choose_learning_rate(options, config.hidden_size, say)

    rate = 2e-4 (4096 / D)^0.8      LoRA, QLoRA, and training from random weights; D: hidden size
    rate / 10                       all weights
    rate / 20                       DPO, with either

Wide models need small steps. 2e-4 is usual for LoRA on a model of 7 billion parameters (D = 4096);
bench/defaults.py measures the small ones. docs/training.md has the table.
"""

from argparse import Namespace
from collections.abc import Callable


def choose_learning_rate(
    options: Namespace, hidden_size: int, say: Callable[[str], object]
) -> None:
    """Set options.learning_rate if it is None, and say which rate was chosen and why."""
    if options.learning_rate is None:
        method = "from_scratch" if options.train_from_scratch else options.finetuning_type
        options.learning_rate = default_learning_rate(method, options.stage, hidden_size)
        say(
            f"--learning_rate: {options.learning_rate:g}, the default for {describe(options)} and "
            f"hidden size {hidden_size}. It matters most: docs/training.md says how to find yours."
        )


def default_learning_rate(method: str, stage: str, hidden_size: int) -> float:
    """The peak learning rate, one significant digit. method: lora, full or from_scratch."""
    rate = 2e-4 * (4096 / hidden_size) ** 0.8
    if method == "full":
        rate /= 10
    if stage == "dpo":
        rate /= 20
    return float(f"{rate:.0e}")


def describe(options: Namespace) -> str:
    """The method in words."""
    if options.train_from_scratch:
        return "training from random weights"
    kind = "all weights" if options.finetuning_type == "full" else "LoRA"
    return f"DPO of {kind}" if options.stage == "dpo" else kind
