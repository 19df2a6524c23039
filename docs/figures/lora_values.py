"""Chapter 7: the singular values of a LoRA update, and of the update of full fine-tuning."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures.style import Colors, save
from docs.tour.lab import BASE, base_template, encoded, fine_tune, good_rows
from minisft import load_model
from minisft.model.decoder import CausalLM
from minisft.model.lora import LoraConfig, add_lora, merge_lora

NUM_STEPS, RANK = 120, 8
NAME = "model.layers.2.mlp.up_proj.weight"  # (256, 128)


def data() -> tuple[Tensor, Tensor]:
    """Of full fine-tuning and of LoRA: the singular values of the update, the largest first."""
    examples, base = encoded(good_rows(), base_template()), load_model(BASE, torch.float32)

    def lora(model: CausalLM) -> None:
        add_lora(model, LoraConfig(rank=RANK, alpha=2 * RANK))

    full, _ = fine_tune(examples, NUM_STEPS)
    adapted, _ = fine_tune(examples, NUM_STEPS, learning_rate=1e-2, prepare=lora)
    merge_lora(adapted)
    before = base.get_parameter(NAME)
    updates = [model.get_parameter(NAME).detach() - before.detach() for model in (full, adapted)]
    return torch.linalg.svdvals(updates[0]), torch.linalg.svdvals(updates[1])


def draw(colors: Colors, data: tuple[Tensor, Tensor]) -> Figure:
    """Number of the singular value against its size."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for values, color, label in zip(
        data,
        (colors.context, colors.supervised),
        ("full fine-tuning", f"LoRA, rank {RANK}"),
        strict=True,
    ):
        axes.plot(range(1, len(values) + 1), values, ".-", color=color, label=label)
    axes.axvline(RANK + 0.5, color=colors.faint, linestyle="--")
    axes.set(xlabel="number of the singular value", ylabel="singular value", ylim=(0, None))
    axes.legend()
    return figure


if __name__ == "__main__":
    save("lora_values", draw, data())
