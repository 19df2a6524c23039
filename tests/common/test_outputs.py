"""outputs.py: files written completely or not at all."""

from pathlib import Path

import pytest
from full_disk import file_size_limit

from minisft.common.errors import UserError
from minisft.common.outputs import atomic_write, save_figure
from minisft.common.words import file_size


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


class Figure:
    """A picture of matplotlib's."""

    def savefig(self, path, format, **settings):
        assert format == "png"
        Path(path).write_bytes(b"picture" * 100)


def test_a_figure_on_a_full_disk(tmp_path):
    """The old picture stays."""
    figure = Figure()
    save_figure(figure, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with file_size_limit(100), pytest.raises(UserError, match="a.png: could not be written: File"):
        save_figure(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_file_size():
    sizes = (500, 123_456, 40 * 10**6, 2_512 * 10**9)
    assert [file_size(size) for size in sizes] == ["0.5 KB", "123.5 KB", "40.0 MB", "2,512.0 GB"]
