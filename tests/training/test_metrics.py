"""The output of a run while it trains."""

import io

from minisft.training.metrics import Progress


def test_lines_are_written_to_a_file_at_once(tmp_path, monkeypatch):
    """A cluster's log is read hours before the run ends."""
    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file, "utf-8"))
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    progress.record_evaluation({"loss": 0.5}, seconds=1.0)
    assert file.getvalue() == b"step 0: evaluation loss 0.5000\n"
    progress.close()
