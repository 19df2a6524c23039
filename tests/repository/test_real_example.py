"""examples/real.py: its rows, and commands that the scripts accept; training takes minutes."""

import json
import sys

import pytest
from conftest import ROOT, command

from examples import demo, orders, real
from minisft.common.errors import UserError


def test_held_out_orders_share_no_words_with_training():
    train, held_out = (orders.draw_rows(300, 0, held_out=part) for part in (False, True))
    assert train == orders.draw_rows(300, 0)
    assert len({row["input"] for row in train}) == 300
    for name in ("customer", "item", "city"):
        seen, new = (
            {json.loads(row["output"])[name] for row in part} for part in (train, held_out)
        )
        assert len(seen) > 15 and len(new) > 8 and not seen & new
    for row in train + held_out:
        order = json.loads(row["output"])
        for name in ("customer", "item", "city"):
            assert order[name] in row["input"]
        assert order["day"] is None or order["day"] in row["input"]
        assert "  " not in row["input"] and "{" not in row["input"]


@pytest.mark.parametrize(
    "answer, is_right",
    [
        ('{"customer": "Ada", "item": "lamp", "quantity": 2, "city": "Oslo", "day": null}', True),
        ('{"day":null,"customer":"Ada","item":"lamp","quantity":2,"city":"Oslo"}', True),
        (
            '{"customer": "Ada", "item": "lamp", "quantity": "2", "city": "Oslo", "day": null}',
            False,
        ),
        ('{"customer": "Ada", "item": "lamp", "quantity": 2, "city": "Oslo"}', False),
        ("Here it is: {}", False),
        ("", False),
    ],
)
def test_right_answers(answer, is_right):
    order = {"customer": "Ada", "item": "lamp", "quantity": 2, "city": "Oslo", "day": None}
    assert orders.is_right(answer, {"output": json.dumps(order)}) is is_right


def test_commands(monkeypatch, tmp_path, capsys):
    """Every flag of every command is one of its script's, and the steps come in this order."""

    class Asked(Exception):
        """The commands are done; the rest needs the exported model."""

    commands = []

    def record(script, *words):
        commands.append([script, *map(str, words)])
        if script == "chat.py":
            raise Asked

    monkeypatch.setattr(real, "run", record)
    monkeypatch.setattr(real, "find_model", lambda: tmp_path / "model.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["real.py", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(Asked):
        real.main()
    scripts = [words[0] for words in commands]
    assert scripts == [
        f"{name}.py" for name in "export score select train eval export chat".split()
    ]
    for script, *words in commands:
        part = ["compare"] if script == "eval.py" else []
        flags = set(command(*part, "--help", script=script).stdout.split())
        assert {word for word in words if word.startswith("--")} <= flags, script
    assert len(json.loads((tmp_path / "out" / "orders.json").read_text())) == real.NUM_ROWS


def test_a_relative_folder_is_the_users(monkeypatch, tmp_path):
    """The scripts run in the root of the repository, wherever the user is."""
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "run", lambda script, *words: commands.append(list(words)))
    monkeypatch.setattr(real, "unpack_model", lambda: tmp_path / "model")
    monkeypatch.setattr(real, "print_answers", lambda *words: None)
    monkeypatch.setattr(sys, "argv", ["real.py", "--output_dir", "out"])
    real.main()
    orders = tmp_path / "out" / "orders.json"
    assert orders.exists() and orders in commands[0]
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", "out"])
    assert demo.parse_options().output_dir == str(tmp_path / "out")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements/smollm2.txt"):
        real.find_model()
    assert (ROOT / "requirements" / "smollm2.txt").exists()
