"""Chapter 7: the singular values of a LoRA update, and of the update of full fine-tuning."""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures import smollm2
from docs.figures.style import Colors, save
from docs.tour.lab import (
    BASE,
    base_template,
    encoded,
    fine_tune,
    good_rows,
    train_all,
    train_steps,
)
from minisft import get_template, load_model
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora, merge_lora

RANK = 8
NUM_STEPS, NAME = 120, "model.layers.2.mlp.up_proj.weight"  # of the embedded model, (256, 128)
# Of SmolLM2, (1536, 576). Few rows in a step, because each takes a second.
REAL_STEPS, REAL_ROWS, REAL_NAME = 20, 4, "model.layers.20.mlp.up_proj.weight"
Values = dict[str, tuple[Tensor, Tensor]]


def lora(model: CausalLM) -> None:
    """Train an adapter."""
    add_lora(model, LoraConfig(rank=RANK, alpha=2 * RANK))


def singular_values(before: CausalLM, after: CausalLM, name: str) -> Tensor:
    """Those of the change of a matrix, the largest first."""
    merge_lora(after)
    return torch.linalg.svdvals((after.get_parameter(name) - before.get_parameter(name)).detach())


def real_update(prepare: Callable[[CausalLM], None], learning_rate: float) -> CausalLM:
    """SmolLM2 after a short run."""
    model, tokenizer = smollm2.load()
    prepare(model.train())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    examples = encoded(good_rows(), get_template("auto", tokenizer))
    optimizer = torch.optim.AdamW(trained, learning_rate)
    train_steps(model, optimizer, examples, 0, REAL_STEPS, REAL_ROWS)
    return model


def data() -> Values:
    """For each model: the singular values of full fine-tuning, and those of LoRA."""
    examples, base = encoded(good_rows(), base_template()), load_model(BASE, torch.float32)
    full, _ = fine_tune(examples, NUM_STEPS)
    adapted, _ = fine_tune(examples, NUM_STEPS, learning_rate=1e-2, prepare=lora)
    real, _ = smollm2.load()
    torch.manual_seed(0)
    real_full, real_lora = real_update(train_all, 1e-4), real_update(lora, 1e-3)
    return {
        f"embedded model, {NUM_STEPS} steps": (
            singular_values(base, full, NAME),
            singular_values(base, adapted, NAME),
        ),
        f"SmolLM2, {REAL_STEPS} steps": (
            singular_values(real, real_full, REAL_NAME),
            singular_values(real, real_lora, REAL_NAME),
        ),
    }


def draw(colors: Colors, data: Values) -> Figure:
    """Number of the singular value against its size."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (title, pair) in zip(figure.subplots(1, len(data)), data.items(), strict=True):
        for values, color, mark, label in zip(
            pair,
            (colors.text, colors.quantity),
            (".-", "s-"),
            ("full fine-tuning", f"LoRA, rank {RANK}"),
            strict=True,
        ):
            numbers = range(1, len(values) + 1)
            axes.plot(numbers, values, mark, color=color, label=label, markersize=4)
        axes.axvline(RANK + 0.5, color=colors.faint, linestyle="--")
        axes.set(title=title, xlabel="number of the singular value", ylim=(0, None), xscale="log")
        axes.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        axes.set_xlim(0.9, len(pair[0]) * 1.1)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("singular value")
    figure.axes[0].legend()
    return figure


if __name__ == "__main__":
    save("lora_values", draw, data())
