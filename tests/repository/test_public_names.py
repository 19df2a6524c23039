"""`import minisft`: fast, with every public name of DESIGN.md."""

import re

import pytest
from conftest import ROOT, command
from setuptools.config.pyprojecttoml import read_configuration

import minisft

PUBLIC = {
    "Assistant",
    "ModelConfig",
    "Sampling",
    "Tokenizer",
    "generate",
    "get_template",
    "load_adapter",
    "load_model",
}


def test_import_loads_no_torch_and_a_name_is_imported_on_first_use():
    code = (
        "import sys, minisft; assert not {'torch', 'numpy'} & set(sys.modules); "
        "from minisft import Sampling; assert 'torch' in sys.modules; "
        "assert Sampling is minisft.Sampling"
    )
    done = command("-c", code, script=None)
    assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_package_and_the_changelog():
    settings = read_configuration(ROOT / "pyproject.toml")
    assert settings["project"]["version"] == minisft.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## ([\d.]+)", changelog, re.MULTILINE)[1] == minisft.__version__


def test_every_public_name_can_be_imported_and_has_a_docstring():
    assert set(dir(minisft)) == PUBLIC
    for name in PUBLIC:
        value = getattr(minisft, name)
        # A dataclass without a docstring gets its signature as one.
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name


def test_other_names_are_missing_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'minisft' has no attribute 'nothing'"):
        minisft.nothing  # noqa: B018
