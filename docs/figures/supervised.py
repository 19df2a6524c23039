"""Chapter 2: which tokens of a row are supervised."""

from matplotlib.figure import Figure

from docs.figures.style import Colors, save
from docs.figures.token_boxes import draw_lines, spelled
from docs.tour.lab import base_template

MESSAGES = [
    {"role": "user", "content": "Spell the word sheep."},
    {"role": "assistant", "content": "s h e e p"},
    {"role": "user", "content": "And backwards?"},
    {"role": "assistant", "content": "p e e h s"},
]


def data() -> list[list[tuple[str, bool]]]:
    """(text, supervised) of every token, a list for each line that the template writes."""
    template = base_template("chatml")
    [example] = template.encode(MESSAGES)
    lines: list[list[tuple[str, bool]]] = [[]]
    for id, supervised in zip(example.ids, example.supervised, strict=True):
        text = spelled(template.tokenizer.token_text(id) or "")
        lines[-1].append((text, supervised))
        if text.endswith("↵"):
            lines.append([])
    return [line for line in lines if line]


def draw(colors: Colors, data: list[list[tuple[str, bool]]]) -> Figure:
    """The row as the model reads it."""
    lines = [
        ("", [(text, colors.supervised if learned else colors.context) for text, learned in line])
        for line in data
    ]
    legend = [(colors.context, "read only"), (colors.supervised, "supervised: learned")]
    return draw_lines(colors, lines, legend)


if __name__ == "__main__":
    save("supervised", draw, data())
