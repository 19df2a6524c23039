"""bench/low_memory.py: a run that is kept has the options that were asked for."""

import sys

import pytest

from bench import low_memory
from minisft.common.outputs import save_options
from minisft.training.identity import finished_note
from minisft.training.options import parse_options


@pytest.mark.parametrize("rate", ["1e-4", "1e-3"])
def test_a_run_with_other_options_is_refused(rate, tmp_path, monkeypatch):
    """train.py leaves a finished run alone and says what differs, to nobody here."""

    def of_a_finished_run(script, child, *words):
        options = parse_options([str(word) for word in words])
        note = finished_note(options)
        (tmp_path / "float32-0/metrics.jsonl").write_text('{"step": 200, "eval_loss": 0.5}\n')
        return note

    words = ["low_memory.py", "--output_dir", str(tmp_path), "--learning_rate", rate]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(low_memory, "output_of", of_a_finished_run)
    options, seen = low_memory.parse_arguments(), []
    (tmp_path / "float32-0").mkdir()
    with monkeypatch.context() as patch:  # the run that is there has the rate 1e-4
        patch.setattr(low_memory, "output_of", lambda *given: seen.append(given) or "")
        options.learning_rate = "1e-4"
        with pytest.raises(IndexError):  # there are no metrics yet
            low_memory.run(options, "m", "float32", 0, [])
    options.learning_rate = rate
    recorded = parse_options([str(word) for word in seen[0][2:]])
    save_options(recorded, tmp_path / "float32-0/options.toml")
    if rate == "1e-4":
        assert low_memory.run(options, "m", "float32", 0, []) == 0.5
    else:
        with pytest.raises(SystemExit, match="--learning_rate: 0.0001 in that run, 0.001 now"):
            low_memory.run(options, "m", "float32", 0, [])
