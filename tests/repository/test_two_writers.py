"""Two commands with one output: the second is refused. A killed one is not in the way."""

import json
import multiprocessing
import os

import pytest
from conftest import ROOT, as_flags, command
from forks import Forked
from standing import lines_in, standing_still, wait_until

from minisft.common.single_writer import single_writer


def files_in(folder):
    """{path: content} of all files but locks."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def dead_process():
    """The number of a process that has ended."""
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()
    return process.pid


def write_questions(folder):
    """A benchmark in the form of MMLU."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / f"law_{split}.csv").write_text("Who?,the cat,the rat,a hat,it,B\n" * 2)
    return folder


MODEL = {"device": "cpu", "dtype": "float32", "template": "plain"}
# The words of each command, the name of its output, and True if that is a folder.
COMMANDS = {
    "train": (dict(max_steps=1, dataloader_num_workers=0, **MODEL), "out", True),
    "score": (dict(dataloader_num_workers=0, **MODEL), "out.jsonl", False),
    "select": (dict(strategy="random", sample_number=3), "out.json", False),
    "chat": (dict(max_new_tokens=2, max_samples=2, **MODEL), "out.jsonl.partial", False),
    "eval mmlu": (dict(num_fewshot=2, **MODEL), "out", True),
    "eval compare": (dict(max_new_tokens=2, max_samples=2, **MODEL), "out", True),
    "export hf": (dict(format="hf"), "out", True),
    "export gguf": (dict(format="gguf"), "out.gguf", False),
    "convert": ({}, "out.json", False),
}


def words_of(name, checkpoint, rows_file, output):
    """The command line of a command that writes `output`."""
    script, _, kind = name.partition(" ")
    flags, _, is_folder = COMMANDS[name]
    output = str(output).removesuffix(".partial")
    if name == "convert":
        return ["convert", str(rows_file), output]
    flags = {**flags, "output_dir" if is_folder else "output": output}
    if script in ("train", "score", "select") or kind == "compare":
        flags["dataset"] = rows_file
    if script == "chat":
        flags["file"] = rows_file
    if kind == "mmlu":
        flags["data_dir"] = write_questions(rows_file.parent / "mmlu")
    if kind == "compare":
        flags["models"] = f"base={checkpoint}"
    elif script != "select":
        flags["model_name_or_path"] = checkpoint
    return [*([kind] if script == "eval" else []), *as_flags(**flags)]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_is_refused(name, checkpoint, rows_file, dead_process, tmp_path):
    _, output_name, is_folder = COMMANDS[name]
    output = tmp_path / output_name
    words = words_of(name, checkpoint, rows_file, output)
    where = {"script": f"{name.split()[0]}.py"}
    if name == "convert":
        where = {"script": None, "before": ["-m", "minisft.data"]}
    before = files_in(tmp_path)
    with single_writer(output, is_folder):  # held by this process
        done = command(*words, **where)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        owner = f"process {os.getpid()} on {os.uname().nodename}"
        assert f"{output_name}: {owner} is writing to it. Wait until" in done.stderr
        assert files_in(tmp_path) == before
    lock = output / ".lock" if is_folder else tmp_path / f"{output_name}.lock"
    assert not lock.exists()
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(f"process {dead_process} on {os.uname().nodename}\n")
    done = command(*words, **where)
    assert done.returncode == 0, done.stderr
    assert not lock.exists() and len(files_in(tmp_path)) > len(before)


def test_a_run_is_not_resumed_while_it_runs(checkpoint, rows_file, tmp_path):
    words = words_of("train", checkpoint, rows_file, tmp_path / "out")
    words += as_flags(max_steps=3, save_steps=1)
    told = tmp_path / "told"
    standing = standing_still("train:train_step", [2], told)[1:]
    first = Forked("tests/standing.py", [*standing, ROOT / "train.py", *words])
    wait_until(lambda: lines_in(told), first)
    before = files_in(tmp_path / "out")
    for more in (["--resume_from_checkpoint", "auto"], ["--overwrite_output_dir"]):
        done = command(*words, *more)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "is writing to it. Wait until it has finished" in done.stderr
        assert files_in(tmp_path / "out") == before
    first.kill()
    first.communicate()
    done = command(*words, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0 and "checkpoint-1" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out/complete.json").read_text())["step"] == 3
