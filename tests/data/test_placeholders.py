"""Placeholders in rows: the warning, and --replace."""

import json
from argparse import ArgumentTypeError

import pytest

from minisft.common.option_types import parse_replacements, replacements
from minisft.data.dataset import open_rows
from minisft.data.placeholders import fill_in, find_placeholders

ANSWER = "I am {{name}} of {{ author }}, <your role>."


def write_rows(path, *answers):
    rows = [{"instruction": "Who are you? {{name}}", "output": answer} for answer in answers]
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_warning_names_the_first_row_and_the_placeholders(tmp_path):
    said = []
    path = write_rows(tmp_path / "rows.json", "Hi.", ANSWER, ANSWER)
    open_rows(path, say=said.append)
    (line,) = said
    assert f"{path}, row 2" in line and "(2 of 3 rows)" in line and "--replace" in line
    assert "{{name}}" in line and "<your role>" in line


def test_values_are_filled_in_everywhere(tmp_path):
    said, path = [], write_rows(tmp_path / "rows.json", ANSWER)
    text = "name=Pebble,author=the Riverside Lab, Inc.,your role=helper"
    (row,) = open_rows(path, say=said.append, replace=text)
    assert row.messages[0]["content"].endswith("Pebble")
    assert row.messages[1]["content"] == "I am Pebble of the Riverside Lab, Inc., helper."
    assert said == []


def test_other_text_is_left_alone():
    text = "<b>bold</b> {x} {{{{ {{a.b}} [1] <your>"
    assert find_placeholders(text) == set()
    assert fill_in({"a": [text, 3, None]}, {"b": "no", "name": "no"}) == {"a": [text, 3, None]}


def test_values_are_checked():
    assert parse_replacements(None) == {}
    assert replacements("name=A=B") == "name=A=B" and parse_replacements("name=A=B") == {
        "name": "A=B"
    }
    for wrong in ("name", "=Pebble", "name="):
        with pytest.raises(ArgumentTypeError, match="write name=Pebble"):
            replacements(wrong)
