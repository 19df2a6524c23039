"""Tables in docs/ that benchmarks write, between two marks.

    update("scaling.md", "peak", ["setting", "MiB"], [["LoRA", "120"]], order=["LoRA", "full"])
    print(markdown(["setting", "MiB"], [["LoRA", "120"]]))

The marks are comments, `<!-- peak -->` and `<!-- /peak -->`, which the rendered page does not show.
"""

from collections.abc import Iterable, Sequence

from bench.measure import ROOT

DOCS = ROOT / "docs"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def update(
    file_name: str,
    mark: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    order: Iterable[str] | None = None,
    note: str = "",
    title: str = "",
) -> None:
    """Write rows into the table between the marks of a file in docs/.

    A row replaces the row with the same first cell; other rows stay. order: the first cells of all
    rows; by default the old rows come first. note, title: lines below and above the table.
    """
    path = DOCS / file_name
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    old, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise SystemExit(f"{path}: there is no <!-- {mark} --> ... <!-- /{mark} -->")
    cells = [
        line.removeprefix("| ").removesuffix(" |").split(" | ")
        for line in old.splitlines()
        if line.startswith("|")
    ]
    by_name = {line[0]: line for line in cells[2:]} if cells[:1] == [list(head)] else {}
    by_name |= {str(row[0]): [str(cell) for cell in row] for row in rows}
    order = by_name if order is None else order
    table = f"{title}\n\n" if title else ""
    table += markdown(head, (by_name[name] for name in order if name in by_name))
    table += f"\n{note}\n" if note else ""
    path.write_text(before + begin + table + end + after, encoding="utf-8")
