"""Write the line counts of "Read the code in this order" into both READMEs: make format runs this.

A row of the table links to a file and states its number of lines: | [name](path) | 135 | ... |
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "docs" / "README.zh.md"]
ROW = re.compile(r"^(\| \[[^]]+\]\(([^)]+\.py)\) \| )\d+(?= \|)", re.MULTILINE)


def with_line_counts(readme: Path) -> str:
    """The text of a README with the number of lines of every file as it is now."""

    def counted(row: re.Match[str]) -> str:
        path = readme.parent / row[2]
        return row[1] + str(len(path.read_text(encoding="utf-8").splitlines()))

    return ROW.sub(counted, readme.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(with_line_counts(readme), encoding="utf-8")
