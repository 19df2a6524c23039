"""Names that cannot exist are an error before torch is loaded."""

import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT

from minisft.common.errors import UserError
from minisft.data.early_checks import check_places


def options_for(**values):
    return Namespace(dataset_dir="data", **values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_name_or_path": "nowhere"}, "nowhere: no such folder, and models on the hub are"),
        ({"model_name_or_path": "a/b/c"}, "a/b/c: no such folder$"),
        ({"adapter": "./runs"}, "./runs: no such folder$"),
        ({"dataset": "nowhere.json"}, "nowhere.json: there is no such file"),
        ({"dataset": "nowhere.txt", "stage": "pt"}, "nowhere.txt: there is no such file"),
    ],
)
def test_names_that_cannot_exist(values, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_places(options_for(**values))


def test_what_may_be_on_the_hub_or_is_here_passes(rows_file, tmp_path, monkeypatch):
    """A dry run plans without the rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for values in (
        {"model_name_or_path": "owner/name", "adapter": None},
        {"model_name_or_path": str(tmp_path), "dataset": str(rows_file)},
        {"dataset": "owner/name"},
        {"dataset": "nowhere.json", "dry_run": True},
    ):
        options = options_for(**values)
        assert check_places(options) is options


def test_the_checks_load_no_torch():
    code = "import sys; import minisft.data.early_checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
