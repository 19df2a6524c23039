"""Chapter 7: NF4's code book on the weights of SmolLM2."""

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.figures import smollm2
from docs.figures.style import Colors, save
from minisft.model.quantized import BLOCK_SIZE, NF4_LEVELS, in_blocks

NAME = "model.layers.15.mlp.up_proj.weight"


def data() -> np.ndarray:
    """The weights of a matrix, each divided by the largest of its block."""
    model, _ = smollm2.load()
    blocks = in_blocks(model.get_parameter(NAME).detach().flatten(), BLOCK_SIZE)
    return (blocks / blocks.abs().amax(1, keepdim=True)).flatten().to(torch.float32).numpy()


def draw(colors: Colors, data: np.ndarray) -> Figure:
    """The histogram; lines at the 16 levels of NF4, and marks at 16 equal steps."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    heights, _, _ = axes.hist(data, bins=160, density=True, color=colors.context)
    top = float(np.sort(heights)[-3]) * 1.15
    axes.vlines(NF4_LEVELS, 0, top, color=colors.supervised, label="levels of NF4")
    even = np.linspace(-1, 1, 16)
    axes.plot(even, np.zeros(16), "^", color=colors.trap, label="16 equal steps", clip_on=False)
    axes.set(xlabel="weight / largest of its block", ylabel="density", ylim=(0, top))
    figure.legend(loc="outside upper right", ncols=2)
    return figure


if __name__ == "__main__":
    save("nf4", draw, data())
