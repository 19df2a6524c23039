"""The tour: its code is that of the source, its languages agree, and a wrong page is noticed."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "docs"))
import tour_pages  # noqa: E402

PAGES = tour_pages.pages()
HEADINGS = {
    "English": ["The equation", "The code", "The trap: ", "The test", "Exercises"],
    "Chinese": ["公式", "代码", "陷阱：", "测试", "练习"],
}
PAGE = """# 1. A page

<!-- code: minisft/model/rotary.py::rotate from "return" -->
```python
# minisft/model/rotary.py: rotate
return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
```

```python
print("two", 1 + 1, 1 / 3)
```

```text
two 2 0.333
```

`test_tour.py::test_one`
"""


@pytest.fixture
def tour(tmp_path, monkeypatch):
    """A tour of one page in both languages, and its notebook."""
    folder = tmp_path / "docs" / "tour"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tour_pages, "TOUR", folder)
    monkeypatch.setattr(tour_pages, "NOTEBOOK", tmp_path / "docs" / "tour.ipynb")
    (folder / "01_page.md").write_text(PAGE, encoding="utf-8")
    (folder / "01_page.zh.md").write_text(PAGE.replace("A page", "一页"), encoding="utf-8")
    tour_pages.NOTEBOOK.write_text(tour_pages.notebook(), encoding="utf-8")
    return folder


def test_the_pages_are_up_to_date():
    assert [page.name[:2] for page in PAGES] == [f"{number:02}" for number in range(1, 13)]
    assert tour_pages.problems() == []


def has_headings(text, headings):
    """True if the page has headings that begin with these words, in this order."""
    places = [text.index(f"\n## {heading}") for heading in headings]
    return places == sorted(places)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_chapter_has_its_parts(page):
    text = page.read_text(encoding="utf-8")
    assert has_headings(text, HEADINGS["English"])
    included = [block[5] for block in tour_pages.INCLUDE.finditer(text)]
    assert 10 <= sum(code.count("\n") - 1 for code in included) <= 30  # without the first line
    assert tour_pages.FIGURE.search(text) and tour_pages.EQUATION.search(text)
    trap = text[text.index("\n## The trap") : text.index("\n## The test")]
    assert any(re.search(r"\d", block[3] or "") for block in tour_pages.SNIPPET.finditer(trap))
    assert re.search(r"`test_\w+\.py::test_\w+`", text[text.index("\n## The test") :])
    answers = text[text.index("\n## Exercises") :].split("<details>")[1:]
    assert len(answers) >= 2 and all("```python" in answer for answer in answers)


@pytest.mark.parametrize("page", tour_pages.pages(chinese=True), ids=lambda page: page.stem)
def test_a_chinese_chapter_has_its_parts(page):
    """It also has Chinese words where the tool compares nothing: in figures and answers."""
    text = page.read_text(encoding="utf-8")
    assert has_headings(text, HEADINGS["Chinese"])
    shown = re.findall(r'alt="(.*?)"|<summary>(.*?)</summary>', text)
    assert shown and all(re.search("[\u4e00-\u9fff]", alt or summary) for alt, summary in shown)


@pytest.mark.parametrize(
    "page", [*PAGES, *tour_pages.pages(chinese=True)], ids=lambda page: page.stem
)
def test_formulas_are_written_as_github_reads_them(page):
    """Between $ and $ alone, Markdown would take _ and * for itself; GitHub refuses some macros."""
    text = page.read_text(encoding="utf-8")
    blocks = [block.removeprefix("```math") for block in tour_pages.EQUATION.findall(text)]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"\$`(.+?)`\$", prose)
    assert "$" not in re.sub(r"\$`.+?`\$", "", prose)
    for formula in [*(block.removesuffix("```\n") for block in blocks), *inline]:
        assert not re.search(r"[$`]|\\operatorname|\\(re)?newcommand|\\def\b", formula), formula
        assert not re.search(r"\\text\{[^}]*[\\_%#&]", formula), formula
        braces = formula.replace(r"\{", "").replace(r"\}", "")
        assert braces.count("{") == braces.count("}"), formula
        assert formula.count(r"\left") - formula.count(r"\leftarrow") == formula.count(r"\right")


def test_heart_files_name_their_chapter():
    """The docstring of each file of the README's reading list says where the tour explains it.

    The first of these chapters links the file, in both languages.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    heart = re.findall(r"^\| \[([\w/]+\.py)\]\(", readme, re.M)
    assert len(heart) >= 25
    for path in [*ROOT.glob("minisft/*/*.py"), *ROOT.glob("*.py")]:
        docstring = path.read_text(encoding="utf-8").split('"""')[1:2]
        chapters = re.findall(r"docs/(tour/[\w.]+\.md)", "".join(docstring))
        assert chapters or path.relative_to(ROOT).as_posix() not in heart, path
        assert all((ROOT / "docs" / page).is_file() for page in chapters), path
        if path.relative_to(ROOT).as_posix() in heart:
            for page in (chapters[0], chapters[0].replace(".md", ".zh.md")):
                link = f"](../../{path.relative_to(ROOT).as_posix()})"
                assert link in (ROOT / "docs" / page).read_text(encoding="utf-8"), (path, page)


def test_a_snippet_that_prints_something_else_is_reported(tour):
    page = tour / "01_page.md"
    assert tour_pages.run(page) == (PAGE.replace("0.333", "0.3333333333333333"), [])
    page.write_text(PAGE.replace("1 + 1", "1 + 2"), encoding="utf-8")
    recorded, [difference] = tour_pages.run(page)
    assert difference.startswith("01_page.md, line 10: ") and "two 3" in recorded


def test_code_that_has_changed_is_reported(tour):
    assert tour_pages.problems() == []
    changed = PAGE.replace("* sin", "* cos")
    for name in ("01_page.md", "01_page.zh.md"):
        (tour / name).write_text(changed, encoding="utf-8")
    assert [name for name in ("01_page.md", "01_page.zh.md", "tour.ipynb")] == [
        re.search(r"[\w.]+\.(md|ipynb)", line)[0].removeprefix("docs/")
        for line in tour_pages.problems()
    ]
    assert tour_pages.with_code(changed) == PAGE
    unnamed = PAGE.replace("# minisft/model/rotary.py: rotate\n", "")
    assert unnamed != PAGE and tour_pages.with_code(unnamed) == PAGE


@pytest.mark.parametrize(
    ("old", "new"),
    [("1 + 1", "2"), ("two 2", "二 2"), ("# 1", "## 0\n# 1"), ("sin\n", "cos\n"), ("one`", "two`")],
)
def test_a_translation_with_other_code_is_reported(tour, old, new):
    page = tour / "01_page.zh.md"
    page.write_text(page.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert any("01_page.zh.md and 01_page.md differ" in line for line in tour_pages.problems())


@pytest.mark.parametrize(
    ("old", "new"), [("1 + 1", "2"), ("two 2", "二 2"), ("sin\n", "cos\n"), ("a + b", "a")]
)
def test_a_translation_gets_the_code_output_and_equations_of_the_english_page(old, new):
    english = PAGE + "\n```math\na + b\n```\n"
    chinese = english.replace("A page", "一页")
    changed = chinese.replace(old, new)
    assert changed != chinese and tour_pages.with_parts_of(english, changed) == chinese


def test_a_chapter_without_translation_is_reported(tour):
    (tour / "01_page.zh.md").unlink()
    assert tour_pages.problems() == []
    (tour.parent / "tour.zh.md").touch()  # the Chinese tour is there now
    assert "no Chinese page" in tour_pages.problems()[0]


@pytest.mark.parametrize(
    ("printed", "stated", "percent", "expected"),
    [
        ("loss 0.512", "loss 0.514", 0, True),
        ("loss 0.512", "loss 0.530", 0, False),
        ("loss 123.4", "loss 124.4", 0, True),
        ("99 of 200", "98 of 200", 0, False),
        ("99 of 200", "90 of 200", 20, True),
        ("99 of 200", "60 of 200", 20, False),
        ("2,490 rows", "2,490 lines", 50, False),
    ],
)
def test_numbers_may_differ_by_rounding(printed, stated, percent, expected):
    assert tour_pages.agrees(printed, stated, percent) == expected


def test_a_name_that_is_gone_is_an_error():
    with pytest.raises(SystemExit, match="rotary.py has no spin"):
        tour_pages.source_of("minisft/model/rotary.py", "spin", None, None)
    with pytest.raises(SystemExit, match="has no line with 'spin'"):
        tour_pages.source_of("minisft/model/rotary.py", "rotate", "spin", None)
