"""Chapter 9: the loss of a run that was resumed completely, and of one with a fresh optimizer."""

import copy

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.figures.style import Colors, log_ticks, save
from docs.tour.lab import BASE, base_template, encoded, good_rows, train_steps
from minisft import load_model
from minisft.model.decoder import CausalLM

STOP, END = 100, 140


def adamw(model: CausalLM) -> torch.optim.AdamW:
    """A new optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def data() -> tuple[list[float], list[float], list[float]]:
    """The losses until the stop, after it with the saved moments, and after it without them."""
    examples = encoded(good_rows(), base_template())
    model = load_model(BASE, torch.float32).requires_grad_(True)
    optimizer = adamw(model)
    before = train_steps(model, optimizer, examples, 0, STOP)
    forgetful = copy.deepcopy(model)
    complete = train_steps(model, optimizer, examples, STOP, END)
    return before, complete, train_steps(forgetful, adamw(forgetful), examples, STOP, END)


def draw(colors: Colors, data: tuple[list[float], list[float], list[float]]) -> Figure:
    """Step against loss, around the stop."""
    before, complete, fresh = data
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = range(STOP - 40, STOP)
    axes.plot(shown, before[-40:], color=colors.text, label="before the stop")
    steps = np.arange(STOP, END)
    axes.plot(steps, complete, color=colors.supervised, label="with the saved moments")
    axes.plot(steps, fresh, color=colors.trap, label="with a fresh optimizer")
    axes.axvline(STOP - 0.5, color=colors.faint, linestyle="--")
    axes.set(xlabel="step", ylabel="loss")
    log_ticks(axes, [0.1, 0.2, 0.5, 1, 2])
    figure.legend(loc="outside upper right", ncols=3)
    return figure


if __name__ == "__main__":
    save("resumed", draw, data())
