"""Chapter 10: the next token of SmolLM2 at three temperatures, and the nucleus of 0.9."""

import torch
from matplotlib.figure import Figure

from docs.figures import smollm2
from docs.figures.style import Colors, save
from docs.figures.token_boxes import spelled
from minisft import Sampling
from minisft.generation.sampling import distribution

TEXT, TOP = "I would like a cup of", 12
TEMPERATURES = (0.5, 1.0, 1.5)
Bars = list[tuple[list[float], list[bool]]]


@torch.inference_mode()
def data() -> tuple[list[str], Bars]:
    """The most probable tokens; for each temperature their probabilities, True in the nucleus."""
    model, tokenizer = smollm2.load()
    hidden = model(torch.tensor([tokenizer.encode(TEXT)]))
    logits = model.logits(hidden[:, -1])
    ids = logits[0].topk(TOP).indices
    bars: Bars = []
    for temperature in TEMPERATURES:
        probabilities = (logits[0] / temperature).softmax(-1)[ids]
        sampling = Sampling(temperature=temperature, top_k=0, top_p=0.9)
        nucleus, candidates = distribution(logits, sampling)
        kept = set(candidates[nucleus > 0].tolist())
        bars.append((probabilities.tolist(), [int(id) in kept for id in ids]))
    return [spelled(tokenizer.token_text(int(id)) or "") for id in ids], bars


def draw(colors: Colors, data: tuple[list[str], Bars]) -> Figure:
    """A row of bars for each temperature."""
    tokens, bars = data
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, temperature, (values, kept) in zip(
        figure.subplots(1, len(bars), sharey=True), TEMPERATURES, bars, strict=True
    ):
        chosen = [colors.quantity if inside else colors.outside for inside in kept]
        axes.bar(tokens, values, color=chosen)
        axes.tick_params(axis="x", rotation=90, labelsize=8)
        for label, color in zip(axes.get_xticklabels(), chosen, strict=True):
            label.set_color(color)  # a bar may be too small to show its own
        axes.set_title(f"temperature {temperature}")
    figure.axes[0].set_ylabel("probability")
    return figure


if __name__ == "__main__":
    save("temperature", draw, data())
