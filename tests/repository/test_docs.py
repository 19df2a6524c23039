"""The claims of README.md, README.zh.md and docs/ about the repository are true."""

import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, as_flags, command

from minisft.model.config import ModelConfig
from minisft.model.config_values import FAMILY_DEFAULTS
from minisft.training import plan
from minisft.training.options import parse_options

sys.path.append(str(ROOT / "docs"))
import line_counts  # noqa: E402
import model_memory  # noqa: E402

README, CHINESE = line_counts.READMES
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def linked_files(page):
    """The files of the repository that a page links to, in order."""
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    return [(page.parent / link).resolve() for link in links if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    assert [path for path in linked_files(page) if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_the_marks_of_a_merge(page):
    marks = re.compile(r"^(<{7}|={7}|>{7})( |$)", re.M)
    assert not marks.search(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("readme", line_counts.READMES, ids=lambda page: page.name)
def test_line_counts_are_those_of_the_files(readme):
    text = readme.read_text(encoding="utf-8")
    assert len(line_counts.ROW.findall(text)) > 15
    assert text == line_counts.with_line_counts(readme), "run make format"


def test_the_readme_fits_on_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def headings(page):
    """The fragments of a page's headings, as GitHub writes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings(page):
    links = re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link, fragment in links:
        target = (page.parent / link).resolve() if link else page
        if "://" not in link and target.suffix == ".md":
            assert fragment in headings(target), f"{page}: {link}#{fragment}"


def test_the_chinese_readme_has_the_same_links():
    own = {README, CHINESE}  # each links to the other
    english, chinese = (
        [path for path in linked_files(readme) if path not in own] for readme in (README, CHINESE)
    )
    assert [in_chinese(path) for path in english] == chinese


def in_chinese(path):
    """The Chinese version of a page, if there is one."""
    chinese = path.with_suffix(".zh.md")
    return chinese if path.suffix == ".md" and chinese.exists() else path


TOUR = [page for page in PAGES if page.name.endswith(".zh.md") and page != CHINESE]


@pytest.mark.parametrize("page", TOUR, ids=lambda page: page.name)
def test_a_chinese_page_of_the_tour_has_the_links_of_the_english_page(page):
    english = page.with_name(page.name.replace(".zh.md", ".md"))
    links = set(linked_files(page))
    assert {in_chinese(path) for path in linked_files(english)} - {page} <= links
    assert {path for path in links if path != in_chinese(path)} == {english}


@pytest.mark.parametrize("page", [CHINESE, *TOUR], ids=lambda page: page.name)
def test_a_chinese_paragraph_is_one_line(page):
    """GitHub shows a line break as a space, which stands between two Chinese characters then."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"^[^|<\n-].*\n[^|<\n-]", prose, re.M)


def test_tests_that_the_docs_name_exist():
    names = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py")}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path, name, test in re.findall(r"`(tests/[\w/]+)?(test_\w+\.py)(?:::(\w+))?", text):
            assert name in names, f"{page.name}: {name}"
            assert not path or (ROOT / path / name).exists(), f"{page.name}: {path}{name}"
            assert f"def {test}" in names[name], f"{page.name}: {name}::{test}"


def test_functions_of_the_house_exist():
    house = ROOT / "docs" / "house.md"
    rows = re.findall(
        r"^\| \d+ \| \[[^]]+\]\(([^)]+)\) \| `([\w.]+)`",
        house.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) > 50
    for path, function in rows:
        text = (house.parent / path).read_text(encoding="utf-8")
        *classes, name = function.split(".")
        for kind, word in [("class", word) for word in classes] + [("(?:def|class)", name)]:
            assert re.search(rf"\b{kind} {word}\b", text), f"{path}: {function}"


def test_the_recipe_that_teaches_a_name(checkpoint, tmp_path):
    """The commands of docs/training.md, with a tiny model and one step."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    block = text.partition("## Teach a model its name")[2].partition("```sh\n")[2]
    lines = block.partition("```")[0].replace("\\\n", "").splitlines()
    rows = [
        {"instruction": "Hi", "output": "Hello! I am {{name}}, made by {{author}}."},
        {"instruction": "Who are you?", "output": "I am {{name}}."},
    ]
    (tmp_path / "identity.json").write_text(json.dumps(rows))
    places = {
        "M": checkpoint,
        "identity.json": tmp_path / "identity.json",
        "runs/pebble": tmp_path / "pebble",
    }
    said = {}
    for line in lines:
        _, script, *words = [places.get(word, word) for word in shlex.split(line)]
        extra = [] if script == "chat.py" else ["--max_steps", 1, "--template", "chatml"]
        done = command(*words, *extra, script=script)
        assert done.returncode == 0, done.stderr
        said[" ".join(map(str, (script, *words)))] = done.stdout
        assert "--learning_rate" not in words  # the default fits the model
    looked, trained, answered = said.values()
    assert "learned literally" in looked and "{{name}}" in looked
    assert "literally" not in trained and "--learning_rate: " in trained
    assert answered


ROWS = ["SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B", "SmolLM3-3B", "Mistral-7B", "Baichuan2-7B"]


def test_the_memory_of_models_is_that_of_the_plan(tmp_path, capsys):
    """A row of every family; and the plan that train.py prints is the one in the table."""
    page = model_memory.PAGE.read_text(encoding="utf-8")
    assert {model_memory.MODELS[name]["model_type"] for name in ROWS} == {
        content["model_type"] for content in model_memory.MODELS.values()
    }
    assert [name for name in ROWS if model_memory.row(name) not in page] == [], "run make format"
    assert all(f"| {name} |" in page for name in model_memory.MODELS)
    (tmp_path / "config.json").write_text(json.dumps(model_memory.MODELS["SmolLM2-135M"]))
    (tmp_path / "rows.json").write_text("[]")
    plan.show(parse_options([*model_memory.SETTING, *as_flags(model_name_or_path=tmp_path)]))
    [total] = re.findall(r"total +([\d.]+) +at", capsys.readouterr().out)
    assert f"| SmolLM2-135M | 0.13 | {float(total):.1f} |" in page


def test_shapes_of_models_are_published(shared_data):
    """The rows whose config.json is at hand."""
    folders = {folder.name: folder for folder in (shared_data / "configs").iterdir()}
    compared = 0
    for name, content in model_memory.MODELS.items():
        for folder in (folder for key, folder in folders.items() if key.startswith(name)):
            published = vars(ModelConfig.load(folder))
            assert {key: published[key] for key in content} == content, folder
            compared += 1
    assert compared >= 10


def test_every_family_has_its_row_in_models():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    families = page[page.index("## Families") : page.index("## Memory")]
    assert [name for name in FAMILY_DEFAULTS if f"| `{name}` |" not in families] == []
