"""outputs.py: files written completely or not at all."""

import pytest

from minisft.common.errors import UserError
from minisft.common.outputs import atomic_write


def test_a_name_that_is_not_utf_8(tmp_path):
    """Python turns other bytes of the command line into surrogates."""
    (tmp_path / "options.toml").write_text("old")
    message = (
        r"options.toml: could not be written: 'runs/\udcff' is not UTF-8 text. Rename the file."
    )
    with pytest.raises(UserError) as error, atomic_write(tmp_path / "options.toml") as file:
        file.write("runs/\udcff\n")
    assert message in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
