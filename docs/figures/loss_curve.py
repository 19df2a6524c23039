"""Chapter 6: the loss of a run with the right mean, and with the mean of means."""

import numpy as np
from matplotlib.figure import Figure

from docs.figures.style import Colors, log_ticks, save
from docs.tour.lab import (
    StepLoss,
    base_template,
    encoded,
    fine_tune,
    good_rows,
    mean_of_means,
    step_of_tokens,
    token_loss,
)
from minisft.model.decoder import CausalLM

NUM_STEPS, EVERY = 120, 10
Curves = tuple[list[float], list[float]]


def data() -> tuple[Curves, Curves]:
    """With each mean: the loss of every step, and the held-out loss per token now and then."""
    template = base_template()
    examples, held_out = (
        encoded(good_rows(name), template) for name in ("train.json", "heldout.json")
    )

    def curves(step_loss: StepLoss) -> Curves:
        measured: list[float] = []
        steps = iter(range(NUM_STEPS))

        def watch(model: CausalLM) -> None:
            if next(steps) % EVERY == 0:
                measured.append(token_loss(model, held_out))

        model, losses = fine_tune(
            examples, NUM_STEPS, step_loss, batch_size=1, rows_per_step=8, watch=watch
        )
        return losses, [*measured, token_loss(model, held_out)]

    return curves(step_of_tokens), curves(mean_of_means)


def draw(colors: Colors, data: tuple[Curves, Curves]) -> Figure:
    """Left: the loss in the log. Right: the held-out loss, measured the same way for both."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (losses, held_out), color, label in zip(
        data, (colors.supervised, colors.trap), ("mean over tokens", "mean of means"), strict=True
    ):
        smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
        left.plot(range(3, 3 + len(smooth)), smooth, color=color, label=label)
        right.plot(range(0, NUM_STEPS + 1, EVERY), held_out, color=color, label=label)
    left.set(xlabel="step", ylabel="loss", title="what the log shows (mean of 5 steps)")
    log_ticks(left, [0.5, 1, 2, 5, 10])  # of both: they share the axis
    right.set(xlabel="step", title="held-out rows, loss per token")
    right.legend()
    return figure


if __name__ == "__main__":
    save("loss_curve", draw, data())
