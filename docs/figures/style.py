"""The look of the tour's figures: the same colour for the same thing, in light and in dark mode.

    if __name__ == "__main__":
        save("padding", draw, data())           # docs/figures/padding.light.svg, padding.dark.svg

`draw(colors, data)` returns a Figure. `colors` has the names below. make figures draws all figures
again: `python -m docs.figures.padding` draws one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Colors:
    """Colours by meaning; colour-blind people can distinguish them.

    text: words, axes, and a second quantity. faint: grid and frames. supervised: tokens that the
    model learns to write, and everything that is right. context: tokens that it only reads.
    padding: tokens that nothing reads. trap: what goes wrong. quantity: what is none of these.
    outside: what is left out. map: for values from small to large.
    """

    text: str
    faint: str
    supervised: str
    context: str
    padding: str
    trap: str
    quantity: str
    outside: str
    map: str


LIGHT = Colors(
    "#1f2328", "#c8ced6", "#2a9d6f", "#8fb4dc", "#e4e7eb", "#d1571b", "#7a5cc0", "#7d8792", "YlGnBu"
)
DARK = Colors(
    "#e6edf3",
    "#4a525c",
    "#37b883",
    "#4e7fb5",
    "#2c333c",
    "#f0883e",
    "#a78bfa",
    "#8b949e",
    "viridis",
)


def log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis with labels at these values only."""
    axes.set_yscale("log")
    axes.set_yticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def save(name: str, draw: Callable[[Colors, Any], Figure], data: Any) -> None:
    """Draw a figure for light and for dark pages, on a transparent background."""
    for mode, colors in (("light", LIGHT), ("dark", DARK)):
        settings = {
            "svg.hashsalt": name,  # the same bytes in every run
            "font.size": 10,
            "text.color": colors.text,
            "axes.labelcolor": colors.text,
            "axes.edgecolor": colors.faint,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": colors.text,
            "ytick.color": colors.text,
            "grid.color": colors.faint,
            "legend.frameon": False,
        }
        with rc_context(settings):
            figure = draw(colors, data)
            path = FOLDER / f"{name}.{mode}.svg"
            figure.savefig(
                path, dpi=150, transparent=True, metadata={"Date": None, "Creator": None}
            )
            print(path.name)
