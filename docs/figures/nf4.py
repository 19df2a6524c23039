"""Chapter 7: NF4's code book on the weights of the embedded model."""

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.figures.style import Colors, save
from docs.tour.lab import BASE
from minisft import load_model
from minisft.model.quantized import BLOCK_SIZE, NF4_LEVELS, in_blocks


def data() -> np.ndarray:
    """The weights of all linear layers, each divided by the largest of its block."""
    layers = load_model(BASE, torch.float32).model.layers
    matrices = [weight.detach().flatten() for weight in layers.parameters() if weight.ndim == 2]
    blocks = in_blocks(torch.cat(matrices), BLOCK_SIZE)
    return (blocks / blocks.abs().amax(1, keepdim=True)).flatten().numpy()


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
