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


def test_a_pipe_gets_a_line_now_and_then(tmp_path, capsys):
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    progress.start()
    for _ in range(3):
        progress.add({"loss": 8.0}, count=4, num_tokens=10)
        progress.record(epoch=0.1, learning_rate=1e-4)
    progress.close()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"metrics: {tmp_path / 'metrics.jsonl'}"
    assert len(lines) == 1 and lines[0].startswith("step 1 of 9: loss 2.0000, lr 1.00e-04, ")
    assert lines[0].endswith("seconds left")
