"""Placeholders in rows: the warning, and --replace."""

import json
from argparse import ArgumentTypeError

import numpy as np
import pytest

import eval as evaluate
import score
from minisft.common.errors import UserError
from minisft.common.option_types import parse_replacements, replacements
from minisft.data import dataset
from minisft.data.dataset import open_rows, unused_values
from minisft.data.placeholders import fill_in, find_placeholders
from minisft.selection.rows import open_every_row, placeholder_note

ANSWER = "I am {{name}} of {{ author }}, <your role>."


def write_rows(path, *answers):
    rows = [{"instruction": "Who are you? {{name}}", "output": answer} for answer in answers]
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_warning_names_the_first_row_and_the_placeholders(tmp_path):
    said = []
    path = tmp_path / "rows.json"
    rows = [{"instruction": "Hi?", "output": answer} for answer in ("Hi.", ANSWER, ANSWER)]
    path.write_text(json.dumps(rows))
    open_rows(path, say=said.append)
    (line,) = said
    assert f"{path}, row 2" in line and "(2 of 3 rows)" in line and "learned literally" in line
    assert "{{name}}" in line and "<your role>" in line
    assert line.count("=...") == 3 and ". --replace '" in line


def test_prompts_are_looked_at_too(tmp_path):
    """A system prompt or question with a placeholder is not learned, but read."""
    for row in (
        {"instruction": "Write to [NAME].", "output": "Dear friend"},
        {"system": "You are {{name}}.", "instruction": "Hi", "output": "Hi."},
    ):
        said = []
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        open_rows(tmp_path / "rows.json", say=said.append)
        assert "read literally (1 of 1 rows). --replace 'name=...'" in said[0]


def test_every_form():
    forms = [
        *("{{name}}", "{{  name  }}", "{{user-name}}", "{{user_name}}", "<NAME>", "<AUTHOR>"),
        *("<COMPANY NAME>", "<FIRST_NAME>", "<your name>", "<Your-Name>", "[NAME]", "[Name]"),
        *("[Company Name]", "[your_name]", "[Insert date]"),
    ]
    for form in forms:
        assert find_placeholders(f"I am {form}.") == {form}
    values = parse_replacements("Name=A,user-name=B,AUTHOR=C,company_name=D,first name=E")
    values |= parse_replacements("your-name=F,insert_date=G")
    assert fill_in(" ".join(forms), values) == "A A B B A C D E F F A A D F G"


def test_values_are_filled_in_everywhere(tmp_path):
    said, path = [], write_rows(tmp_path / "rows.json", ANSWER)
    text = "name=Pebble,author=the Riverside Lab, Inc.,your role=helper"
    (row,) = open_rows(path, say=said.append, replace=text)
    assert row.messages[0]["content"].endswith("Pebble")
    assert row.messages[1]["content"] == "I am Pebble of the Riverside Lab, Inc., helper."
    assert said == []


def test_other_text_is_left_alone():
    text = "<b>bold</b> {x} {{{{ {{a.b}} [1] <your> <NAMES> <name> x[NAME] [name] [Chorus] <BR> "
    text += "[Company Name](https://example.org) [MASK] <TABLE> {{-name}}"
    assert find_placeholders(text) == set()
    values = {"b": "no", "name": "no", "company name": "no"}
    assert fill_in({"a": [text, 3, None]}, values) == {"a": [text, 3, None]}


def test_values_are_checked():
    assert parse_replacements(None) == {}
    assert replacements("name=A=B") == "name=A=B" and parse_replacements("name=A=B") == {
        "name": "A=B"
    }
    for wrong in ("name", "=Pebble", "name=", "-=Pebble"):
        with pytest.raises(ArgumentTypeError, match="write name=Pebble"):
            replacements(wrong)


def test_a_value_that_no_row_needs_is_named(tmp_path, monkeypatch):
    path, other = write_rows(tmp_path / "a.json", ANSWER), tmp_path / "b.json"
    other.write_text(json.dumps([{"instruction": "[TEAM]?", "output": "Yes."}]))

    def note(text, *paths):
        rows = open_rows(",".join(map(str, paths)), say=lambda line: None, replace=text)
        return unused_values(rows.files)

    assert note("name=Pebble", path) == note("team=T,author=A", path, other) == ""
    assert note(None, path) == ""
    line = note("nme=Pebble,author=A", path)
    assert "no row has a placeholder called nme." in line
    assert "The data has these: author, name, your role." in line
    (tmp_path / "c.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    assert note("name=Pebble", tmp_path / "c.json").endswith("The data has none.")
    monkeypatch.setattr(dataset, "CHECKED_BYTES", 1)
    assert "none of the first 1,000 rows of a file has" in note("nme=Pebble", path)


def test_the_advice_is_what_the_script_has(tmp_path):
    """select.py copies rows as they are, so train.py fills them in."""
    said, path = [], write_rows(tmp_path / "rows.json", ANSWER)
    open_every_row(path, ".", False, False, say=said.append, replace_flag="train.py --replace")
    assert ". train.py --replace '" in said[0]
    said.clear()
    rows, _ = open_every_row(
        path, ".", False, False, say=said.append, replace="name=Pebble,author=A,role=B"
    )
    assert "I am Pebble of A" in rows[0].messages[1]["content"]
    assert "placeholder called role" in said[-1]


def test_a_selection_warns_about_the_chosen_rows(tmp_path):
    said, path = [], write_rows(tmp_path / "rows.json", "Hi.", ANSWER, ANSWER)
    rows, _ = open_every_row(path, ".", False, False, say=said.append, replace_flag=None)
    assert said == []
    line = placeholder_note(rows, np.array([0, 2]))
    assert line.startswith(f"warning: {path}, row 1: ") and "(2 of 2 chosen rows)" in line
    assert "train.py --replace 'name=..." in line
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    rows, _ = open_every_row(str(plain), ".", False, False, say=said.append, replace_flag=None)
    assert placeholder_note(rows, np.array([0])) == ""


def test_scores_have_the_flag(tiny_chat_model_dir, tmp_path, here):
    path, output = write_rows(tmp_path / "rows.json", "I am {{name}}."), tmp_path / "s.jsonl"
    words = ["--model_name_or_path", tiny_chat_model_dir, "--dataset", path, "--output", output]
    words += ["--dataloader_num_workers", 0]
    losses = []
    for more in ([], ["--replace", "name=Pebble the wise"], ["--replace", "nme=P"]):
        said = here(score, *words, *more, "--overwrite")
        assert ("learned literally" in said) == (more[1:] != ["name=Pebble the wise"])
        losses.append(json.loads(output.read_text())["num_answer_tokens"])
    assert losses[0] == losses[2] < losses[1] and "called nme" in said
    with pytest.raises(UserError, match="computed with another replace"):
        here(score, *words)


def test_comparisons_have_the_flag(tiny_chat_model_dir, tmp_path, here):
    pytest.importorskip("sacrebleu", reason="the extra eval is missing")
    path = write_rows(tmp_path / "rows.json", "I am {{name}}.")
    said = here(
        evaluate,
        *("compare", "--models", f"a={tiny_chat_model_dir}"),
        dataset=path,
        device="cpu",
        max_new_tokens=2,
        output_dir=tmp_path / "o",
        replace="name=Pebble",
    )
    assert "literally" not in said
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["questions"] == [
        {"question": "Who are you? Pebble", "reference": "I am Pebble."}
    ]
