"""Lines of progress where there is no terminal. In a terminal, tqdm draws a bar."""

import sys

import pytest

from minisft.common.progress import ProgressBar, time_left


@pytest.mark.parametrize("seconds, num_lines", [(3600, 0), (0, 2)])
def test_a_file_gets_a_line_now_and_then(monkeypatch, capsys, seconds, num_lines):
    """Short work prints nothing; the rows of an earlier run are done, but took no time."""
    monkeypatch.setattr("minisft.common.progress.SECONDS_BETWEEN_LINES", seconds)
    with ProgressBar(5200, "row", "scores", done=200) as bar:
        bar.update(8)
        bar.update(4992)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == num_lines
    if lines:
        assert lines[0].startswith("scores: 208 of 5,200 rows, ") and lines[0].endswith(" left")
        assert lines[1] == "scores: 5,200 of 5,200 rows, 0 seconds left"


@pytest.mark.parametrize("rank, is_terminal", [(1, False), (0, True)])
def test_no_lines_of_other_ranks_or_beside_the_bar(monkeypatch, capsys, rank, is_terminal):
    monkeypatch.setattr("minisft.common.progress.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr("minisft.common.processes.rank", lambda: rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with ProgressBar(4, "row") as bar:
        bar.update(4)
    output = capsys.readouterr()
    assert output.out == "" and ("4/4" in output.err) == is_terminal


def test_time_left_counts_the_units_of_this_run(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    assert time_left(began=40.0, num_done=6, num_left=12) == "2 minutes"
