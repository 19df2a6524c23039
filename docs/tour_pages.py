"""Keep the pages of docs/tour/ true: docs/tour/README.md has the rules for authors.

python docs/tour_pages.py update             # code from the source into the pages, code and output
                                             # from English into Chinese pages; the notebook
python docs/tour_pages.py run [03 04]        # make tour: run the snippets, compare their output
python docs/tour_pages.py record [03 04]     # run them and write their output into the pages
python docs/tour_pages.py check              # compare code and languages; run nothing
"""

import argparse
import ast
import contextlib
import io
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from tour_notebook import code, document, markdown

ROOT = Path(__file__).resolve().parent.parent
TOUR, NOTEBOOK = ROOT / "docs" / "tour", ROOT / "docs" / "tour.ipynb"
# <!-- code: minisft/model/rotary.py::rotate from "words of a line" to "words of a line" -->
INCLUDE = re.compile(
    r'<!-- code: (\S+?)::([\w.]+)(?: from "(.*?)")?(?: to "(.*?)")? -->\n```python\n(.*?)```\n',
    re.DOTALL,
)
# A snippet, and the output that the page states: "```text within 10%" allows other numbers.
SNIPPET = re.compile(
    r"(?<!-->\n)```python\n(.*?)```\n(?:\n```text(?: within (\d+)%)?\n(.*?)```\n)?", re.DOTALL
)
FIGURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img [^>]*src="([^"]+)"')
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
EQUATION = re.compile(r"```math\n.*?```\n", re.DOTALL)


def pages(chinese: bool = False) -> list[Path]:
    """The chapters in order: 01_row.md in English, 01_row.zh.md in Chinese."""
    paths = sorted(TOUR.glob("[0-9][0-9]_*.md"))
    return [path for path in paths if path.name.endswith(".zh.md") == chinese]


def source_of(path: str, name: str, first: str | None, last: str | None) -> str:
    """The lines of a function or class, of `Class.method`, or a part of them.

    first, last: words in the first and last line of the part. Indentation is removed.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise SystemExit(f"{path} has no {name}. Correct the page that includes it.")
        [node] = found
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    for words, keep_after in ((first, True), (last, False)):
        if words is None:
            continue
        places = [place for place, line in enumerate(lines) if words in line]
        if not places:
            raise SystemExit(f"{path}::{name} has no line with {words!r}. Correct the page.")
        lines = lines[places[0] :] if keep_after else lines[: places[0] + 1]
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "".join(line[indent:] + "\n" for line in lines)


def with_code(text: str) -> str:
    """The page with the code that the source has now.

    The first line of each block says where the code is from, so that nobody takes it for a snippet.
    """

    def included(block: re.Match[str]) -> str:
        path, name, first, last, old = block.groups()
        code = f"# {path}: {name}\n" + source_of(path, name, first, last)
        return block[0].removesuffix(f"{old}```\n") + code + "```\n"

    return INCLUDE.sub(included, text)


def outline(page: Path) -> list[Any]:
    """What a page has in common with its translation: code, output, equations, figures, tests."""
    text = page.read_text(encoding="utf-8")
    parts = [block.groups() for pattern in (INCLUDE, SNIPPET) for block in pattern.finditer(text)]
    return [
        *parts,
        FIGURE.findall(text),
        EQUATION.findall(text),
        sorted(re.findall(r"`test_\w+\.py::\w+`", text)),
        len(re.findall("^#+ ", text, re.M)),
    ]


def with_parts_of(english: str, chinese: str) -> str:
    """The Chinese page with the code, output and equations of the English one."""
    for pattern in (INCLUDE, SNIPPET, EQUATION):
        parts = [block[0] for block in pattern.finditer(english)]
        places = [block.span() for block in pattern.finditer(chinese)]
        if len(parts) == len(places):
            for part, (start, end) in reversed(list(zip(parts, places, strict=True))):
                chinese = chinese[:start] + part + chinese[end:]
    return chinese


def agrees(printed: str, stated: str, percent: float) -> bool:
    """True if the words are equal and the numbers are.

    Another processor rounds differently: a number with decimals may differ by 1 %, or by two in its
    last digit; with `percent`, all numbers may differ by that much.
    """
    if NUMBER.sub("#", printed) != NUMBER.sub("#", stated):
        return False
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(stated), strict=True):
        unit = 10.0 ** -len(theirs.partition(".")[2])
        is_exact = "." not in theirs and not percent
        relative, absolute = (0.0, 0.0) if is_exact else (max(percent, 1) / 100, 2.01 * unit)
        values = float(ours.replace(",", "")), float(theirs.replace(",", ""))
        if not math.isclose(*values, rel_tol=relative, abs_tol=absolute):
            return False
    return True


def run(page: Path) -> tuple[str, list[str]]:
    """Run the snippets of a page in order: (the page with their output, the differences)."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    text, differences = page.read_text(encoding="utf-8"), []

    def ran(block: re.Match[str]) -> str:
        code, percent, stated = block.groups()
        line, output = text[: block.start(1)].count("\n"), io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        printed = output.getvalue()
        if not agrees(printed, stated or "", float(percent or 0)):
            differences.append(
                f"{page.name}, line {line + 1}: the page states\n{stated}but it prints\n{printed}"
            )
        fence = "```text" + (f" within {percent}%" if percent else "")
        return f"```python\n{code}```\n" + (f"\n{fence}\n{printed}```\n" if printed else "")

    return SNIPPET.sub(ran, text), differences


def notebook() -> str:
    """The English pages as a notebook: words, snippets and the output that the pages state."""
    cells = []
    for page in pages():
        text, place = page.read_text(encoding="utf-8"), 0
        for block in SNIPPET.finditer(text):
            cells += [markdown(text[place : block.start()]), code(block[1], block[3])]
            place = block.end()
        cells.append(markdown(text[place:]))
    return document(cells)


def problems() -> list[str]:
    """What `check` reports, one line each."""
    found = []
    for page in pages() + pages(chinese=True):
        text = page.read_text(encoding="utf-8")
        if text != with_code(text):
            found.append(f"{page.name}: its code is not that of the source. Run make tour-pages.")
        for figure in (figure for pair in FIGURE.findall(text) for figure in pair):
            if not (page.parent / figure).is_file():
                found.append(f"{page.name}: there is no {figure}. Run make figures.")
    for page in pages(chinese=True):
        english = page.with_name(page.name.replace(".zh", ""))
        if not english.exists() or outline(page) != outline(english):
            found.append(
                f"{page.name} and {english.name} differ in code, figures, equations or tests"
            )
    if NOTEBOOK.with_name("tour.zh.md").exists() and len(pages()) != len(pages(chinese=True)):
        found.append("docs/tour/: a chapter has no Chinese page, NN_name.zh.md")
    if not NOTEBOOK.exists() or NOTEBOOK.read_text(encoding="utf-8") != notebook():
        found.append("docs/tour.ipynb is older than the pages. Run make tour-pages.")
    return found


def main() -> None:
    """Do what the command line says; exit with 1 if a page is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["update", "run", "record", "check"])
    parser.add_argument("chapters", nargs="*", help="numbers, such as 03 (default: all)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found = []
    if options.action in ("run", "record"):
        for page in pages():
            if options.chapters and page.name[:2] not in options.chapters:
                continue
            began = time.monotonic()
            text, differences = run(page)
            print(f"{page.name}: {time.monotonic() - began:.0f} s", flush=True)
            if options.action == "record":
                page.write_text(text, encoding="utf-8")
            else:
                found += differences
    if options.action in ("update", "record"):
        for page in pages():
            page.write_text(with_code(page.read_text(encoding="utf-8")), encoding="utf-8")
        for page in pages(chinese=True):
            english = page.with_name(page.name.replace(".zh", "")).read_text(encoding="utf-8")
            text = with_parts_of(english, page.read_text(encoding="utf-8"))
            page.write_text(text, encoding="utf-8")
        NOTEBOOK.write_text(notebook(), encoding="utf-8")
    if options.action == "check":
        found = problems()
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
