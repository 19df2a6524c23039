"""Chapter 8: learning-rate schedules, and the loss that each peak rate reaches."""

from matplotlib.figure import Figure

from docs.figures.style import Colors, save
from docs.tour.lab import base_template, encoded, fine_tune, good_rows, token_loss
from minisft.training.schedules import build_rate

NUM_STEPS = 60
PEAKS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def data() -> list[float]:
    """The held-out loss per token after training with each peak rate."""
    template = base_template()
    examples, held_out = (
        encoded(good_rows(name), template) for name in ("train.json", "heldout.json")
    )
    return [
        token_loss(fine_tune(examples, NUM_STEPS, learning_rate=peak)[0], held_out)
        for peak in PEAKS
    ]


def draw(colors: Colors, data: list[float]) -> Figure:
    """Left: three schedules. Right: peak rate against held-out loss."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in (("constant_with_warmup", ":"), ("linear", "--"), ("cosine", "-")):
        rate = build_rate(name, 1.0, total_steps=100, warmup_steps=10)
        left.plot([rate(step) for step in range(100)], style, color=colors.quantity, label=name)
    left.set(xlabel="step", ylabel="share of the peak rate", title="schedules, 10 warm-up steps")
    left.legend(loc="lower left")
    right.plot(PEAKS, data, "o-", color=colors.quantity)
    right.set(xscale="log", xlabel="peak learning rate", title=f"held-out loss, {NUM_STEPS} steps")
    return figure


if __name__ == "__main__":
    save("learning_rate", draw, data())
