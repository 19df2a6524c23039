"""The output of a run while it trains."""

import io
import os
import re
from types import SimpleNamespace

import pytest
from full_disk import file_size_limit
from run_builder import training_options

from minisft.common.metric_lines import in_words, read_metrics
from minisft.common.processes import print_rank0
from minisft.training.metrics import Progress
from minisft.training.objective import perplexity
from minisft.training.summary import next_command


def test_lines_are_written_to_a_file_at_once(tmp_path, monkeypatch):
    """A cluster's log is read hours before the run ends."""
    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file, "utf-8"))
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    progress.record_evaluation({"loss": 0.5}, seconds=1.0)
    assert file.getvalue() == b"step 0: evaluation loss 0.5000\n"
    progress.close()


@pytest.mark.parametrize(
    "loss, said",
    [(1.0, "2.72"), (701.0, "inf"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_perplexity(loss, said):
    assert in_words({"perplexity": perplexity(loss)}) == f"perplexity {said}"


@pytest.mark.parametrize("seconds, num_lines", [(3600, 1), (0, 3)])
def test_a_pipe_gets_a_line_now_and_then(tmp_path, capsys, monkeypatch, seconds, num_lines):
    """Also between two records: slow steps would be silent for many minutes."""
    monkeypatch.setattr("minisft.training.metrics.SECONDS_BETWEEN_LINES", seconds)
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    progress.start()
    for step in range(3):
        progress.add({"loss": 8.0}, count=4, num_tokens=10)
        if step != 1:
            progress.record(epoch=0.1, learning_rate=1e-4)
        progress.print_line()
    progress.close()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"metrics: {tmp_path / 'metrics.jsonl'}"
    assert len(lines) == num_lines
    assert re.fullmatch(r"step 1 of 9: loss 2.0000, lr 1.00e-04, [\d,]+ tokens/s", lines[0])
    if num_lines > 1:
        assert re.fullmatch(r"step 2 of 9: \d+ seconds left", lines[1])
        assert re.fullmatch(r"step 3 of 9: loss 2.0000, lr 1.00e-04, .* seconds left", lines[2])


def test_the_time_left_does_not_count_the_first_step(tmp_path, capsys, monkeypatch):
    """It may take minutes: data is read, kernels are compiled. Here it takes 100 seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("minisft.training.metrics.time.monotonic", lambda: clock.now)
    progress = Progress(total_steps=30, path=tmp_path / "metrics.jsonl")
    progress.step = 7  # resumed: no line of metrics.jsonl is due at step 8
    progress.start()
    for seconds in (100, 40, 20):
        clock.now += seconds
        progress.add({"loss": 8.0}, count=4, num_tokens=10)
        progress.print_line()
    progress.close()
    lines = capsys.readouterr().out.splitlines()[1:]
    # 21 steps of 40 seconds. Step 10 comes too early for another line.
    assert lines == ["step 9 of 30: 14 minutes left"]


def test_the_first_speed_leaves_out_what_comes_before_the_first_step(tmp_path, monkeypatch):
    """A service of --report_to may take a minute to open its run."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("minisft.training.metrics.time.monotonic", lambda: clock.now)
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    clock.now = 60.0
    progress.start()
    clock.now = 62.0
    progress.add({"loss": 8.0}, count=4, num_tokens=10)
    for _ in range(2):  # the second time, there is nothing to record
        progress.record(epoch=0.1, learning_rate=1e-4)
    progress.close()
    assert [row["tokens_per_second"] for row in read_metrics(progress.path)] == [5.0]


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    """One message; the rows wait in memory, and are written when there is room."""
    path = tmp_path / "metrics.jsonl"
    progress = Progress(total_steps=9, path=path)
    progress.start()
    progress.record_evaluation({"loss": 0.5}, seconds=1.0)
    with file_size_limit(30):  # the second row does not fit
        for loss in (0.25, 0.125):
            progress.add({"loss": loss}, count=1, num_tokens=10)
            progress.record_evaluation({"loss": loss}, seconds=1.0)
    assert capsys.readouterr().out.count(f"{path}: File too large; training goes on") == 1
    assert len(read_metrics(path)) == 1
    expected = [{"step": step, "eval_loss": 0.5**step / 2} for step in range(3)]
    assert progress.rows() == expected
    progress.finish_log()
    assert read_metrics(path) == expected and capsys.readouterr().out == ""
    with file_size_limit(path.stat().st_size):
        progress.record_evaluation({"loss": 0.5}, seconds=1.0)
        progress.finish_log()
    assert f"{path} lacks its last rows: File too large" in capsys.readouterr().out
    progress.close()


def test_a_full_disk_behind_standard_output(tmp_path, monkeypatch):
    """As with `nohup train.py > log`. Other errors, of a pipe, still end the run."""
    progress = Progress(total_steps=9, path=tmp_path / "metrics.jsonl")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        progress.say("step 1")
        print_rank0("step 2")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(BrokenPipeError):
            progress.say("step 3")
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)
    progress.close()


@pytest.mark.parametrize(
    "words, command",
    [
        ([], "--dataset rows.json --output"),
        (["--dataset_dir", "my data"], "--dataset rows.json --dataset_dir 'my data' --output"),
        (["--skip_bad_rows", "--replace", "name=A B"], "--replace 'name=A B' --skip_bad_rows"),
    ],
)
def test_the_command_after_a_reward_model_finds_its_data(words, command):
    """score.py reads the same rows: all flags that say how are repeated."""
    options = training_options("--stage", "rm", "--dataset", "rows.json", *words)
    options.output_dir = "runs/rm"
    line = next_command(SimpleNamespace(options=options, lora_config=object()))
    assert line.startswith("python score.py --mode reward --adapter runs/rm ") and command in line


def test_the_command_after_qlora_quantises_the_base():
    """The full base may not fit into the memory of the training."""
    options = training_options("--dataset", "rows.json", "--quantization_bit", "4")
    options.output_dir = "runs/a"
    line = next_command(SimpleNamespace(options=options, lora_config=object()))
    assert line == "python chat.py --adapter runs/a --quantization_bit 4"
