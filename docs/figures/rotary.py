"""Chapter 5: the rotary angles of SmolLM2, and what they do to the product of query and key."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures import smollm2
from docs.figures.style import Colors, save
from minisft.model.rotary import rotary_angles, rotate

NUM_POSITIONS = 128


def data() -> tuple[Tensor, Tensor]:
    """cos (T, d/2) of every position and pair, and the mean product by distance (T,)."""
    config = smollm2.load()[0].config
    d, positions = config.head_dim, torch.arange(NUM_POSITIONS)
    cos, sin = rotary_angles(config, positions, torch.float32)
    torch.manual_seed(0)
    query = torch.randn(2000, 1, 1, d)
    query = query / query.norm(dim=-1, keepdim=True)
    turned = rotate(query.expand(-1, 1, NUM_POSITIONS, d), cos, sin)
    products = (turned[:, :, :1] * turned).sum(-1).mean(dim=(0, 1))
    return cos[0, 0, :, : d // 2], products


def draw(colors: Colors, data: tuple[Tensor, Tensor]) -> Figure:
    """Left: cos of the angles. Right: the product of a vector and its turned copy, by distance."""
    cos, products = data
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(cos.T, aspect="auto", cmap=colors.map, origin="lower")
    left.set(xlabel="position t", ylabel="pair m", title="cos(t · f$_m$)")
    figure.colorbar(image, ax=left)
    right.plot(products, color=colors.quantity)
    right.axhline(0, color=colors.faint, lw=0.8)
    right.set(xlabel="distance of query and key", title="product of equal unit vectors")
    return figure


if __name__ == "__main__":
    save("rotary", draw, data())
