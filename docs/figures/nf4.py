"""Chapter 7: NF4's code book on the weights of SmolLM2 and of the embedded model.

The package of SmolLM2 has weights that are rounded to 16 values in each block of 32. Each block has
values of its own, so the histogram of all keeps its shape, but for small ripples.
"""

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.figures import smollm2
from docs.figures.style import Colors, save
from docs.tour.lab import BASE
from minisft import load_model
from minisft.model.decoder import CausalLM
from minisft.model.quantized import BLOCK_SIZE, NF4_LEVELS, in_blocks

EDGES = np.linspace(-1, 1, 62)


def histogram(model: CausalLM) -> np.ndarray:
    """The density of the weights of all layers, each divided by the largest of its block."""
    counts = np.zeros(len(EDGES) - 1)
    for weight in model.model.layers.parameters():
        if weight.ndim == 2:
            blocks = in_blocks(weight.detach().flatten(), BLOCK_SIZE)
            scaled = blocks / blocks.abs().amax(1, keepdim=True)
            counts += np.histogram(scaled.numpy(), EDGES)[0]
    return counts / counts.sum() / np.diff(EDGES)


def data() -> tuple[np.ndarray, np.ndarray]:
    """The histograms of SmolLM2 and of the embedded model."""
    return histogram(smollm2.load()[0]), histogram(load_model(BASE, torch.float32))


def draw(colors: Colors, data: tuple[np.ndarray, np.ndarray]) -> Figure:
    """The histograms; lines at the 16 levels of NF4, and marks at 16 equal steps."""
    real, embedded = data
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    top = float(np.sort(real)[-3]) * 1.15
    axes.stairs(real, EDGES, fill=True, color=colors.quantity, alpha=0.4, label="SmolLM2")
    axes.stairs(embedded, EDGES, color=colors.quantity, label="embedded model")
    axes.vlines(NF4_LEVELS, 0, top, color=colors.text, lw=1, label="levels of NF4")
    even = np.linspace(-1, 1, 16)
    axes.plot(even, np.zeros(16), "^", color=colors.trap, label="16 equal steps", clip_on=False)
    axes.set(xlabel="weight / largest of its block", ylabel="density", ylim=(0, top))
    figure.legend(loc="outside upper right", ncols=4)
    return figure


if __name__ == "__main__":
    save("nf4", draw, data())
