"""Resuming is exact after any interruption; damaged checkpoints are named and skipped."""

import json
import re
import shlex
import signal
from itertools import count

import pytest
import torch
from conftest import ROOT, TORCHRUN, as_flags, command
from forks import Forked, run_script
from full_disk import file_size_limit
from safetensors.torch import load_file
from standing import lines_in, standing_still, wait_until

import train
from minisft.common.errors import UserError
from minisft.common.metric_lines import read_metrics
from minisft.training import checkpoint
from minisft.training.options import parse_options

# Dropout, accumulation, an epoch that does not divide into steps, and steps that do not divide
# into saves: an inexact resume would fail here.
RUN = as_flags(
    template="plain",
    lora_dropout=0.2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=5e-3,
    logging_steps=2,
)


@pytest.fixture
def flags(checkpoint, rows_file):
    return ["--model_name_or_path", checkpoint, "--dataset", rows_file, "--max_samples", 23, *RUN]


def final(run_dir):
    name = "adapter_model.safetensors"
    return load_file(run_dir / (name if (run_dir / name).exists() else "model.safetensors"))


def assert_equal_runs(first, second):
    """Compare weights bit for bit, and every logged figure except the speed."""
    weights, others = final(first), final(second)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    logs = [
        [
            {name: value for name, value in row.items() if name != "tokens_per_second"}
            for row in read_metrics(run / "metrics.jsonl")
        ]
        for run in (first, second)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_resumed_equals_undisturbed(finetuning_type, flags, tmp_path):
    flags = [*flags, "--finetuning_type", finetuning_type, "--max_steps", 15]
    if finetuning_type == "full":  # which has no dropout
        flags = [word for word in flags if word not in ("--lora_dropout", "0.2")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*flags, "--output_dir", whole).returncode == 0
    flags += ["--output_dir", parts, "--save_steps", 5, "--save_total_limit", 5]
    assert command(*flags).returncode == 0
    for step in (10, 5):
        (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
        from_step = ["--resume_from_checkpoint", parts / f"checkpoint-{step}"]
        done = command(*flags, *from_step, "--overwrite_output_dir")
        assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
        assert_equal_runs(whole, parts)


def test_killed_four_times(flags, tmp_path):
    """After 4 SIGKILLs at random moments, also while saving, the result is the same."""
    flags = [*flags, "--max_steps", 80, "--save_steps", 2]
    assert command(*flags, "--output_dir", tmp_path / "whole").returncode == 0
    done = run_script("tests/kill_and_resume.py", [4, 1, tmp_path / "killed", *flags])
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith("4 killed")
    assert int(done.stdout.split()[2]) >= 1, "no kill fell into saving"
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_signals_save_and_print_how_to_continue(flags, tmp_path):
    flags = [*flags, "--max_steps", 9]
    assert command(*flags, "--output_dir", tmp_path / "whole").returncode == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        told, stopped = tmp_path / f"told {number}", tmp_path / f"stopped by {number}"
        words = [*standing_still("train:train_step", [4], told)[1:], ROOT / "train.py", *flags]
        process = Forked("tests/standing.py", [*words, "--output_dir", stopped])
        wait_until(lambda told=told: lines_in(told), process)
        process.send_signal(number)
        output, errors = process.communicate()
        assert process.returncode == 128 + number and "Traceback" not in errors, errors
        continue_as_told(output, ["python"], 1)
        assert_equal_runs(tmp_path / "whole", stopped)


def test_a_signal_to_torchrun(flags, tmp_path):
    flags, told = [*flags, "--max_steps", 9], tmp_path / "told"
    assert command(*flags, "--output_dir", tmp_path / "whole", processes=2).returncode == 0
    torchrun = ["--nproc_per_node", "2"]
    words = [*torchrun, *standing_still("train:train_step", [4], told), ROOT / "train.py", *flags]
    process = Forked(TORCHRUN, [*words, "--output_dir", tmp_path / "it was stopped"])
    wait_until(lambda: lines_in(told) == 2, process)  # both of them in the fourth step
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    continue_as_told(output, ["torchrun", *torchrun], 2)
    assert_equal_runs(tmp_path / "whole", tmp_path / "it was stopped")


def continue_as_told(output, expected, processes):
    """Run the command that a stopped run has printed."""
    assert "stopped and saved at step 4; continue with" in output
    start, advice = output.strip().splitlines()[-1].split("train.py")
    assert start.split() == expected
    assert command(*shlex.split(advice), processes=processes).returncode == 0


def test_another_number_of_processes(flags, tmp_path):
    """One process, then two from its checkpoint: the same rows in every step, so the same run."""
    flags = [word for word in flags if word not in ("--lora_dropout", "0.2")] + ["--max_steps", 12]
    assert command(*flags, "--output_dir", tmp_path / "one").returncode == 0
    flags += ["--output_dir", tmp_path / "two"]
    assert command(*flags, "--save_steps", 7).returncode == 0
    middle = tmp_path / "two/checkpoint-7"
    flags += ["--resume_from_checkpoint", middle, "--overwrite_output_dir"]
    done = command(*flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes instead of 1" in done.stdout
    assert "every step still has" in done.stdout
    first, second = final(tmp_path / "one"), final(tmp_path / "two")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


def out_of_memory_after(number, function):
    """`function`, which runs out of memory after so many calls."""
    calls = count()

    def limited(*arguments):
        if next(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return function(*arguments)

    return limited


def test_out_of_memory_loses_no_step(flags, tmp_path, monkeypatch):
    flags = [str(word) for word in [*flags, "--max_steps", 6]]
    assert command(*flags, "--output_dir", tmp_path / "whole").returncode == 0
    flags += ["--output_dir", str(tmp_path / "parts")]
    monkeypatch.setattr(train, "train_step", out_of_memory_after(3, train.train_step))
    with pytest.raises(UserError, match="out of memory .CUDA .*Saved at step 3: continue"):
        train.main(parse_options(flags))
    assert command(*flags, "--resume_from_checkpoint").returncode == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_out_of_memory_within_an_update(flags, tmp_path, monkeypatch):
    """Some weights may be new and others old: nothing is saved."""
    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory_after(3, torch.optim.AdamW.step))
    flags = [*flags, "--max_steps", 6, "--output_dir", tmp_path / "out"]
    with pytest.raises(torch.OutOfMemoryError):
        train.main(parse_options([str(word) for word in flags]))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_best_and_early_stopping(flags, tmp_path):
    """The run saves the weights of the best evaluation, and ends when there is no improvement."""
    done = command(
        *flags,
        validation_split=6,
        eval_steps=1,
        learning_rate=0.2,
        max_steps=40,
        load_best_model_at_end=True,
        early_stopping_patience=3,
        logging_steps=50,
        save_steps=1,
        save_total_limit=1,
        output_dir=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 3 < 40
    # The last record covers the steps after the first.
    assert [row["step"] for row in rows if "loss" in row] == [1, best + 3]
    assert f"checkpoint-{best}," in done.stdout
    kept = load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in final(tmp_path / "out").items())
    card = (tmp_path / "out/README.md").read_text()  # of these weights, not of the last
    assert f"| eval_loss | {min(losses)} | {best} |" in card and "| rows_per_step | 4 |" in card


def test_evaluations_and_checkpoints_after_each_epoch(flags, tmp_path):
    """Of 17 rows in steps of four: five steps an epoch."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('eval_steps = "epoch"\nsave_steps = "epoch"\nsave_total_limit = 9\n')
    done = command(
        "--config",
        recipe,
        *flags,
        "--validation_split",
        6,
        "--num_train_epochs",
        3,
        "--output_dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert [
        row["step"] for row in read_metrics(tmp_path / "out/metrics.jsonl") if "eval_loss" in row
    ] == [5, 10, 15]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-15",
        "checkpoint-5",
    ]
    done = command(*flags, "--save_steps", "often", "--output_dir", tmp_path / "other")
    assert done.returncode == 2 and "'often' is not a whole number" in done.stderr


# checkpoint.py alone


def test_overwriting_forgets_the_old_run(flags, tmp_path):
    """A new run in the same folder does not continue from the checkpoints of the old one."""
    flags = [*flags, "--output_dir", tmp_path / "out", "--save_steps", 2]
    assert command(*flags, "--max_steps", 9).returncode == 0
    done = command(*flags, "--max_steps", 5, "--overwrite_output_dir", "--lora_alpha", 3)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-5",
    ]


def test_best_of_another_folder(flags, tmp_path):
    """A run that continues in a new folder takes the best weights from its own evaluations."""
    flags = [
        *flags,
        *as_flags(
            learning_rate=0.3,
            lr_scheduler_type="constant",
            eval_steps=1,
            save_steps=2,
            save_total_limit=9,
            validation_split=6,
            load_best_model_at_end=True,
            max_steps=5,
        ),
    ]
    assert command(*flags, "--output_dir", tmp_path / "a").returncode == 0
    done = command(
        *flags,
        "--output_dir",
        tmp_path / "b",
        "--resume_from_checkpoint",
        tmp_path / "a/checkpoint-4",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b/adapter_model.safetensors").exists()


@pytest.mark.parametrize("flag", ["--eval_dataset", "--validation_split"])
def test_best_of_other_held_out_rows(flag, flags, rows_file, tmp_path):
    """A loss on other held-out rows cannot be compared: the best step so far does not count."""
    hard = tmp_path / "hard.json"
    row = {"instruction": "?", "output": "zqxj kvwz " * 9}
    hard.write_text(json.dumps([{**row, "instruction": str(number)} for number in range(23)]))
    flags = [*flags, "--output_dir", tmp_path / "out", "--load_best_model_at_end"]
    flags += ["--eval_steps", 1, "--save_steps", 1]
    rows = [rows_file, hard] if flag == "--eval_dataset" else [6, 6]
    assert command(*flags, "--max_steps", 4, flag, rows[0]).returncode == 0
    if flag == "--validation_split":
        flags += ["--dataset", hard]
    flags += ["--max_steps", 6, flag, rows[1], "--resume_from_checkpoint"]
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"loaded the weights of \S+checkpoint-[56],", done.stdout)
    assert re.search(r", best evaluation \S+ at step [56], ", done.stdout)
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    easy, hard = (
        [row["eval_loss"] for row in rows if row.get("step") in steps and "eval_loss" in row]
        for steps in ((1, 2, 3, 4), (5, 6))
    )
    assert max(easy) < min(hard)  # with the old best, no new evaluation would be better


def test_the_log_of_an_overwritten_run_is_not_continued(flags, tmp_path):
    """A run goes on in a folder that held another run. The log begins after the checkpoint."""
    flags = [*flags, "--max_steps", 3, "--logging_steps", 1]
    assert command(*flags, "--output_dir", tmp_path / "a", "--save_steps", 2).returncode == 0
    assert command(*flags, "--output_dir", tmp_path / "b", "--seed", 7).returncode == 0
    (tmp_path / "b/reports.json").write_text('{"wandb": "the id of the other run"}')
    onto = ["--output_dir", tmp_path / "b", "--overwrite_output_dir"]
    done = command(*flags, *onto, "--resume_from_checkpoint", tmp_path / "a/checkpoint-2")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "b/metrics.jsonl")] == [3]
    assert not (tmp_path / "b/reports.json").exists()


def save(folder, step, state, **keeping):
    """A checkpoint that holds only this state."""
    with checkpoint.new_checkpoint(folder, step, **keeping) as path:
        checkpoint.save_state(state, path)


def write(folder, value):
    with checkpoint.new_checkpoint(folder, int(value), keep=2, best=1) as path:
        (path / "weights").write_bytes(value * 1000)
        checkpoint.save_state({"value": value}, path)


def test_rotation_keeps_the_best_and_the_newest(tmp_path):
    for value in (b"1", b"2", b"3", b"4"):
        write(tmp_path, value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert checkpoint.load_state(tmp_path / "checkpoint-4") == {"value": b"4"}


def flip_a_byte(path):
    content = bytearray((path / "weights").read_bytes())
    content[500] ^= 1
    (path / "weights").write_bytes(content)


DAMAGES = {
    "has changed": flip_a_byte,
    "weights is missing": lambda path: (path / "weights").unlink(),
    "trainer_state.pt is missing": lambda path: (path / "trainer_state.pt").unlink(),
    "complete.json is missing": lambda path: (path / "complete.json").unlink(),
    "cannot be read": lambda path: (path / "complete.json").write_text('{"files"'),
    "cannot be read: maximum recursion": lambda path: (path / "complete.json").write_text(
        100_000 * "[" + 100_000 * "]"
    ),
    "no file list": lambda path: (path / "complete.json").write_text("[]"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoints_are_named_and_skipped(message, tmp_path):
    for value in (b"2", b"3"):
        write(tmp_path, value)
    DAMAGES[message](tmp_path / "checkpoint-3")
    said = []
    assert checkpoint.find_checkpoint(tmp_path, "auto", said.append) == tmp_path / "checkpoint-2"
    assert len(said) == 1 and "checkpoint-3" in said[0]
    assert message in said[0] or message == "no file list"
    with pytest.raises(UserError, match="checkpoint-3"):
        checkpoint.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"), said.append)


def test_full_disk_leaves_what_was_there(tmp_path):
    """On a full disk there is one line of error, and the previous checkpoint is intact."""
    write(tmp_path, b"2")
    with file_size_limit(500), pytest.raises(UserError, match="checkpoint-3 is not saved: "):
        write(tmp_path, b"3")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoint.damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("save_steps", [1, 99])
def test_full_disk_in_a_run(save_steps, flags, tmp_path):
    """On a full disk, in a checkpoint or at the end: one line, and the run can be resumed."""
    flags = [*flags, "--max_steps", 12, "--save_steps", 4, "--output_dir", tmp_path / "out"]
    assert command(*flags).returncode == 0
    newest = checkpoint.find_checkpoint(tmp_path / "out", "auto", print)
    flags += as_flags(save_steps=save_steps, resume_from_checkpoint="auto", max_steps=20)
    done = run_script("tests/full_disk.py", ["train.py", *flags])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.count("could not be written") == 1, done.stderr
    assert " is not saved: " in done.stderr and "--resume_from_checkpoint" in done.stderr
    assert checkpoint.find_checkpoint(tmp_path / "out", "auto", print) == newest
    assert not list((tmp_path / "out").glob("*.partial"))


def test_full_disk_in_a_checkpoint(flags, tmp_path):
    """A run goes on without a checkpoint. Its result is smaller, and does fit."""
    flags = [*flags, "--max_steps", 3, "--save_steps", 1, "--output_dir"]
    done = run_script("tests/full_disk.py", [60_000, "train.py", *flags, tmp_path / "full"])
    assert done.returncode == 0, done.stderr
    for step in (1, 2, 3):
        assert f"no checkpoint of step {step}: " in done.stdout
    assert done.stdout.count("trainer_state.pt: the disk is full or failing; ") == 3
    assert not list((tmp_path / "full").glob("checkpoint-*"))
    assert command(*flags, tmp_path / "whole").returncode == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "full")


def test_full_disk_in_the_log(flags, tmp_path):
    """The run goes on without its last rows of metrics.jsonl. The model card has them."""
    flags = [*flags, "--output_dir", tmp_path / "out", "--max_steps"]
    assert command(*flags, 4).returncode == 0
    limit, log = 300_000, tmp_path / "out/metrics.jsonl"
    rest = limit - log.stat().st_size - len('{"step": 4, "": ""}\n') - 10
    log.write_text(f'{log.read_text()}{{"step": 4, "": "{rest * "x"}"}}\n')  # of an earlier part
    flags += [12, "--resume_from_checkpoint", "auto"]
    done = run_script("tests/full_disk.py", [limit, "train.py", *flags])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics.jsonl: File too large; training goes on without") == 1
    assert "metrics.jsonl lacks its last rows: File too large" in done.stdout
    assert [row["step"] for row in read_metrics(log)] == [1, 2, 4, 4]
    assert re.search(r"\| loss \| .* \| 12 \|", (tmp_path / "out/README.md").read_text())
    assert json.loads((tmp_path / "out/complete.json").read_text())["step"] == 12


def test_state_is_plain_data(tmp_path):
    """A pickle that would run code is refused."""

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    (tmp_path / "checkpoint-1").mkdir()
    torch.save(Evil(), tmp_path / "checkpoint-1" / checkpoint.STATE)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        checkpoint.load_state(tmp_path / "checkpoint-1")


def test_other_run_is_refused(flags, tmp_path):
    flags = [*flags, "--max_steps", 3, "--save_steps", 2, "--output_dir", tmp_path / "out"]
    assert command(*flags).returncode == 0
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done = command(*flags, "--seed", 7, "--resume_from_checkpoint", "auto")
    assert done.returncode == 2 and "seed 42, not 7" in done.stderr
    assert written == {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }  # the record, the log and the checkpoints too


def test_changed_options_are_reported_and_used(flags, tmp_path):
    """The flags of the command line win over the checkpoint, except for the rows of a step."""
    flags = [*flags, "--max_steps", 3, "--save_steps", 2, "--output_dir", tmp_path / "out"]
    assert command(*flags).returncode == 0
    done = command(
        *flags,
        resume_from_checkpoint="auto",
        weight_decay=0.5,
        gradient_accumulation_steps=3,
        save_steps=1,
        max_steps=4,
    )
    assert done.returncode == 0, done.stderr
    assert "--weight_decay is 0.5 from here on; it was 0.0" in done.stdout
    assert "--gradient_accumulation_steps is 3" in done.stdout
    assert "every step still has 4 rows" in done.stdout
    assert "--dataset" not in done.stdout
    state = checkpoint.load_state(tmp_path / "out/checkpoint-4")
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_changed_rows_are_reported(flags, tmp_path, rows_file):
    flags = [*flags, "--save_steps", 2, "--output_dir", tmp_path / "out"]
    assert command(*flags, "--max_steps", 3).returncode == 0
    again = [*flags, "--resume_from_checkpoint", "auto", "--max_steps"]
    done = command(*again, 4)
    assert done.returncode == 0 and "rows have changed" not in done.stdout
    rows = json.loads(rows_file.read_text())
    rows[0]["output"] += " And more than that."
    rows_file.write_text(json.dumps(rows))
    done = command(*again, 5)
    assert (
        done.returncode == 0
        and "the training rows have changed since the checkpoint" in done.stdout
    )


def test_a_broken_row_found_during_training(flags, tmp_path, rows_file):
    """The steps before the broken row are saved. After a repair the run ends like an undisturbed
    one."""
    rows = json.loads(rows_file.read_text())
    good = [{**row, "history": []} for row in rows for _ in range(-(-200 // len(rows)))]
    broken = [dict(row) for row in good]
    broken[200]["history"] = [["one alone"]]  # its turn comes after step 128
    flags = [word for word in flags if word not in ("--max_samples", 23)]
    flags = [
        *flags,
        *as_flags(gradient_accumulation_steps=1, num_train_epochs=1, per_device_train_batch_size=1),
    ]
    rows_file.write_text(json.dumps(good))
    assert command(*flags, "--output_dir", tmp_path / "whole").returncode == 0
    rows_file.write_text(json.dumps(broken))
    few = {f"minisft.data.dataset:CHECKED_{unit}": 1 for unit in ("BYTES", "ROWS")}
    words = standing_still("train:train_step", [], tmp_path / "told", **few)[1:]
    words += [ROOT / "train.py", *flags, "--output_dir", tmp_path / "late"]
    done = run_script("tests/standing.py", words)
    assert done.returncode == 2 and "row 201" in done.stderr, done.stderr
    assert "Saved at step" in done.stderr and done.stderr.count("\n") == 1
    rows_file.write_text(json.dumps(good))
    done = command(*flags, "--output_dir", tmp_path / "late", "--resume_from_checkpoint", "auto")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert_equal_runs(tmp_path / "whole", tmp_path / "late")


def test_all_checkpoints_are_damaged(flags, tmp_path):
    """The error says so, and the files stay, because their weights may still be useful."""
    flags = [*flags, "--max_steps", 3, "--save_steps", 2, "--output_dir", tmp_path / "out"]
    assert command(*flags).returncode == 0
    for state in (tmp_path / "out").glob("checkpoint-*/trainer_state.pt"):
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    done = command(*flags, "--max_steps", 4, "--resume_from_checkpoint", "auto")
    assert done.returncode == 2 and "all checkpoints are damaged" in done.stderr
    assert state.exists()


def test_a_finished_run_goes_on_only_with_more_steps(flags, tmp_path):
    """After an interruption, too: the result is newer than the checkpoints before it."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(*flags, "--output_dir", whole, "--max_steps", 7).returncode == 0
    flags = [*flags, "--output_dir", out, "--max_steps"]
    assert command(*flags, 7, "--save_steps", 2).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = command(*flags, 7, "--save_steps", 2, "--resume_from_checkpoint", "auto")
    nothing = "holds the finished run. Nothing to do; raise --max_steps or --num_train_epochs to go"
    assert done.returncode == 0 and nothing in done.stdout and "other options" not in done.stdout
    rows = tmp_path / "a.json"
    rows.write_text("[]")
    more = as_flags(resume_from_checkpoint="auto", learning_rate=1e-3, eval_dataset=rows)
    done = command(*flags, 7, *more)
    assert done.returncode == 0 and nothing in done.stdout, done.stderr
    assert done.stdout.endswith(
        f"choose another --output_dir:\n  --eval_dataset: not given in that run, {rows} now\n"
        "  --learning_rate: 0.005 in that run, 0.001 now\n"
        "  --save_steps: 2 in that run, 500 now\n"
    )
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-6",
        "checkpoint-7",
    ]
    done = command(*flags, 9, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0 and f"resuming from {out / 'checkpoint-7'}" in done.stdout
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == 9


def test_a_finished_run_without_checkpoints_is_not_restarted(flags, tmp_path):
    flags = [*flags, "--output_dir", tmp_path / "out", "--save_total_limit", 0, "--max_steps"]
    assert command(*flags, 2).returncode == 0
    before = final(tmp_path / "out")
    done = command(*flags, 4, "--resume_from_checkpoint", "auto")
    assert done.returncode == 2 and "holds a finished run" in done.stderr, done.stderr
    assert all(torch.equal(before[name], one) for name, one in final(tmp_path / "out").items())
    done = command(*flags, 4, "--resume_from_checkpoint", "auto", "--overwrite_output_dir")
    assert done.returncode == 0 and read_metrics(tmp_path / "out/metrics.jsonl")[-1]["step"] == 4


def test_a_checkpoint_of_another_run_does_not_overwrite(flags, tmp_path):
    """A finished run, or an unfinished one, in --output_dir."""
    flags = [*flags, "--save_steps", 2, "--max_steps"]
    for name in ("one", "two"):
        assert command(*flags, 4, "--output_dir", tmp_path / name).returncode == 0
    flags = [*flags, 5, "--output_dir", tmp_path / "one", "--resume_from_checkpoint"]
    before = final(tmp_path / "one")
    for name in ("one", "two"):
        done = command(*flags, tmp_path / name / "checkpoint-2")
        assert done.returncode == 2 and "one is not empty. Choose another folder" in done.stderr
    assert all(torch.equal(before[name], one) for name, one in final(tmp_path / "one").items())
    (tmp_path / "one/complete.json").unlink()  # unfinished
    assert command(*flags, tmp_path / "two/checkpoint-2").returncode == 2
    done = command(*flags, tmp_path / "one/checkpoint-2")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr


def test_a_checkpoint_beyond_the_end_of_the_run(flags, tmp_path):
    """That checkpoint would be saved as the result and replace a later one."""
    flags = [*flags, "--output_dir", tmp_path / "out", "--save_steps", 4, "--max_steps"]
    assert command(*flags, 6).returncode == 0
    before = final(tmp_path / "out")
    done = command(*flags, 3, "--resume_from_checkpoint", "auto")
    assert done.returncode == 2 and "is at step 6, but this run ends at step 3" in done.stderr, (
        done.stderr
    )
    assert all(torch.equal(before[name], one) for name, one in final(tmp_path / "out").items())
    flags += [4, "--resume_from_checkpoint", tmp_path / "out/checkpoint-4"]
    done = command(*flags, "--overwrite_output_dir")
    assert done.returncode == 0, done.stderr  # only the result is left to write


def test_checkpoints_of_an_abandoned_branch_are_removed(tmp_path):
    """After resuming at step 5, `auto` must not take the old checkpoints at 10 and 15."""
    for step in (5, 10, 15):
        save(tmp_path, step, {"step": step})
    (tmp_path / "checkpoint-4.partial/optimizer").mkdir(parents=True)  # killed while saving
    checkpoint.remove_others(tmp_path, tmp_path / "checkpoint-5", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    save(tmp_path, 5, {"step": "again"})
    assert checkpoint.load_state(tmp_path / "checkpoint-5") == {"step": "again"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    checkpoint.remove_others(tmp_path, tmp_path / "elsewhere/checkpoint-9", 9)
    assert not list(tmp_path.iterdir())


def test_the_adapter_that_is_read_is_not_removed(flags, tmp_path):
    flags = [*flags, "--max_steps", 3, "--save_steps", 2, "--output_dir", tmp_path / "out"]
    assert command(*flags).returncode == 0
    flags = [word for word in flags if word not in ("--lora_dropout", "0.2")]
    done = command(*flags, "--adapter", tmp_path / "out/checkpoint-2", "--overwrite_output_dir")
    assert done.returncode == 2 and "is an input" in done.stderr
    assert (tmp_path / "out/checkpoint-2/adapter_model.safetensors").exists()
