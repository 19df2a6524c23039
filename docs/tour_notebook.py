"""Cells of a Jupyter notebook (nbformat 4), for tour_pages.py."""

import json
import re
from typing import Any

Cell = dict[str, Any]
START = """# Run this first.
import os
import sys

if not os.path.isdir("minisft"):
    os.chdir("..")
sys.path.insert(0, os.getcwd())
"""


def document(cells: list[Cell]) -> str:
    """The text of a notebook in docs/. Its first cell makes the snippets find the repository."""
    cells = [code(START), *cells]
    numbered = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"cells": numbered, "metadata": {"kernelspec": kernel}}
    content |= {"nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def code(text: str, output: str | None = None) -> Cell:
    """A snippet and what it printed."""
    outputs = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    source = {"source": text.rstrip("\n"), "metadata": {}}
    return {"cell_type": "code", "execution_count": None, "outputs": outputs, **source}


def markdown(text: str) -> Cell:
    """A part of a page of docs/tour/: links, answers and equations as a notebook shows them."""
    text = re.sub(r"</?details>\n", "", text).replace("<summary>Answer</summary>", "**Answer**")
    text = re.sub(r"```math\n(.*?)```", r"$$\n\1$$", text, flags=re.DOTALL)
    text = re.sub(r"\$`(.*?)`\$", r"$\1$", text)
    text = re.sub(r'(\]\(|srcset="|src=")(?![a-z]+:)([^)"#][^)"]*)', in_docs, text)
    return {"cell_type": "markdown", "metadata": {}, "source": text.strip("\n")}


def in_docs(link: re.Match[str]) -> str:
    """A link as seen from docs/ instead of docs/tour/."""
    return link[1] + (link[2][3:] if link[2].startswith("../") else f"tour/{link[2]}")
