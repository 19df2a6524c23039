"""Lines of tokens as coloured boxes."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs.figures.style import Colors

FONT_SIZE = 9
CHARACTER = 0.602 * FONT_SIZE / 72  # inches, in a monospaced font
MARGIN, LINE = 3, 0.3  # characters; inches

# A line: its title, then (text, fill colour) of each token.
Line = tuple[str, Sequence[tuple[str, str]]]


def draw_lines(colors: Colors, lines: Sequence[Line], legend: Sequence[tuple[str, str]]) -> Figure:
    """The lines one below the other, and a legend of (fill colour, meaning)."""
    head = max(len(title) for title, _ in lines) + 2 * bool(any(title for title, _ in lines))
    widths = [sum(len(text) + 1 for text, _ in tokens) for _, tokens in lines]
    width = max([head + max(widths), sum(len(words) + 4 for _, words in legend)]) + MARGIN
    height = (len(lines) + 1.5) * LINE
    figure = Figure(figsize=(width * CHARACTER, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, len(lines) + 1.5))
    axes.axis("off")
    font = {"family": "monospace", "fontsize": FONT_SIZE, "va": "center"}
    for number, (title, tokens) in enumerate(lines):
        middle, place = len(lines) + 0.9 - number, head + 0.5
        axes.text(0.5, middle, title, **font)
        for text, fill in tokens:
            box = (place, middle - 0.38), len(text) + 0.7, 0.76
            axes.add_patch(Rectangle(*box, facecolor=fill, alpha=0.55, edgecolor=colors.faint))
            axes.text(place + len(text) / 2 + 0.35, middle, text, ha="center", **font)
            place += len(text) + 1
    place = 0.5
    for fill, words in legend:
        axes.add_patch(Rectangle((place, 0.25), 1.6, 0.5, facecolor=fill, alpha=0.55))
        axes.text(place + 2.2, 0.5, words, **font)
        place += len(words) + 4
    return figure


def spelled(text: str) -> str:
    """A token as the figures show it: a space becomes ␣, a line feed ↵."""
    return text.replace("Ġ", "␣").replace("Ċ", "↵").replace(" ", "␣").replace("\n", "↵")
