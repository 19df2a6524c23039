"""Tables in docs/ that benchmarks write, between two marks.

    update("scaling.md", "peak", ["setting", "MiB"], [["LoRA", "120"]], order=["LoRA", "full"])

The marks are comments, `<!-- peak -->` and `<!-- /peak -->`, which the rendered page does not show.
"""

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def update(file_name, mark, heads, rows, order, note=""):
    """Write rows into the table between the marks of a file in docs/.

    A row is known by its first cell: others that are there stay, all stand in `order`. note: a line
    below the table.
    """
    path = DOCS / file_name
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    old, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise SystemExit(f"{path}: has no <!-- {mark} --> ... <!-- /{mark} -->")
    cells = [line.strip("| ").split(" | ") for line in old.splitlines() if line.startswith("|")]
    found = {line[0]: line for line in cells[2:]} if cells[:1] == [heads] else {}
    found |= {row[0]: row for row in rows}
    lines = [heads, ["---"] * len(heads), *(found[name] for name in order if name in found)]
    table = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    table += f"\n{note}\n" if note else ""
    path.write_text(before + begin + table + end + after, encoding="utf-8")
