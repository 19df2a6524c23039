"""Chapter 3: the token at the border of prompt and answer."""

from matplotlib.figure import Figure

from docs.figures.style import Colors, save
from docs.figures.token_boxes import draw_lines, spelled
from docs.tour.lab import BASE, Tokenizer

PROMPT, ANSWER = "Spell the word sheep.\nAnswer: ", "s h e e p"


def data() -> list[tuple[str, list[str], int]]:
    """(title, tokens, number of tokens before the answer)."""
    tokenizer = Tokenizer.load(BASE)

    def tokens(text: str) -> list[str]:
        return [spelled(tokenizer.token_text(id) or "") for id in tokenizer.encode(text)]

    prompt, whole = tokens(PROMPT), tokens(PROMPT + ANSWER)
    return [
        ("one text", whole, len(prompt) - 1),
        ("prompt in use", prompt, len(prompt)),
        ("two texts", prompt + tokens(ANSWER), len(prompt)),
    ]


def draw(colors: Colors, data: list[tuple[str, list[str], int]]) -> Figure:
    """The three lines, and the token that exists only in use in the colour of traps."""
    lines = []
    for title, tokens, border in data:
        fills = [colors.context] * border + [colors.supervised] * (len(tokens) - border)
        if title == "prompt in use":
            fills[-1] = colors.trap
        lines.append((title, list(zip(tokens, fills, strict=True))))
    legend = [
        (colors.context, "prompt"),
        (colors.supervised, "answer"),
        (colors.trap, "in use, but not in training on one text"),
    ]
    return draw_lines(colors, lines, legend)


if __name__ == "__main__":
    save("token_border", draw, data())
