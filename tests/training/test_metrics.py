"""What a run says while it goes on."""

import io

from minisft.training.metrics import Progress


def test_a_line_is_there_at_once_where_it_goes_into_a_file(tmp_path, monkeypatch):
    """As in the log of a cluster, which is read hours before the run ends."""
    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file, "utf-8"))
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    progress.record_evaluation({"loss": 0.5}, seconds=1.0)
    assert file.getvalue() == b"step 0: evaluation loss 0.5000\n"
    progress.close()
