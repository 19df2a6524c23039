"""bench/selection.py: its flags and settings, how it runs what is missing, a part of its figure."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from bench import selection
from bench.selection_checks import KINDS, make_prompts
from bench.selection_figure import Estimate, limit_to_selections
from bench.selection_options import MAX_PER_KIND, Budget, parse_options
from minisft.common.errors import UserError


def test_budgets_of_the_command_line():
    options = parse_options(["--data_dir", "d", "--budgets", "20t", "5"])
    assert [Budget.parse(text) for text in options.budgets] == [Budget(20, True), Budget(5)]
    for text in ("3x", "0", "t"):
        with pytest.raises(UserError, match="give a number of rows"):
            parse_options(["--data_dir", "d", "--budgets", text])


def test_there_are_enough_prompts():
    """make_prompts would look for more without an end."""
    assert len(make_prompts(MAX_PER_KIND)) == len(KINDS) * MAX_PER_KIND
    with pytest.raises(UserError, match="--per_kind: there are 26 prompts"):
        parse_options(["--data_dir", "d", "--per_kind", "27"])


def test_the_type_of_auto_is_a_setting(monkeypatch, tmp_path):
    """A study goes on only where auto means the same type."""
    options = parse_options(["--data_dir", str(tmp_path)])
    monkeypatch.setattr(selection, "resolve_dtype", lambda name, device: torch.float32)
    selection.check_settings(options, tmp_path)
    monkeypatch.setattr(selection, "resolve_dtype", lambda name, device: torch.bfloat16)
    with pytest.raises(UserError, match="has runs with dtype float32, not bfloat16"):
        selection.check_settings(options, tmp_path)


def test_no_run_begins_after_the_end():
    options = parse_options(["--data_dir", "d"])
    waiting = selection.wanted_runs(options)
    assert list(selection.run_all(options, waiting, end=0.0)) == []


def test_a_run_that_fails_leaves_the_result_of_the_other(monkeypatch):
    options = parse_options(["--data_dir", "d", "--jobs", "2"])
    has_failed = threading.Event()

    def run_one(options, name):
        if name == "fails":
            has_failed.set()
            raise UserError("no memory")
        has_failed.wait()
        return name

    monkeypatch.setattr(selection, "run_one", run_one)
    monkeypatch.setattr(selection, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    results = selection.run_all(options, ["fails", "works"], end=None)
    assert next(results) == "works"
    with pytest.raises(UserError, match="no memory"):
        next(results)


def test_a_difference_beyond_the_panel_is_named_in_its_line():
    """The lines are in the order of the labels, in which "all rows" need not be the last."""
    kinds = {"all": -3.0, "ifd": 0.1, "all_same_steps": 0.2}
    part = [
        SimpleNamespace(strategy=name, label=name, change=Estimate(mean, mean, mean))
        for name, mean in kinds.items()
    ]
    axes = Figure().subplots()
    limit_to_selections(axes, [part], list(kinds), "change", 1)
    [text] = axes.texts
    assert text.get_text() == "-3.00, beyond" and text.get_position()[1] == 0
