"""A disk that fills up at any point of the last save: the old result or the new one is whole, and
the advice is true."""

import errno
import os
import shutil

import pytest
import torch
from conftest import CONFIG
from run_builder import new_run, training_options

from minisft.checkpoints.folders import load_model
from minisft.common import reserved_space, tensor_files
from minisft.common.errors import UserError
from minisft.common.hashes import sha256
from minisft.common.reserved_space import ReservedSpace
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.lora import add_lora
from minisft.text.tokenizer import Tokenizer
from minisft.text.tokenizer_files import has_tokenizer
from minisft.training import checkpoint as checkpoints
from minisft.training import resume
from minisft.training.lora_options import lora_from_options
from minisft.training.new_result import read_record
from minisft.training.optimizer import build_optimizer
from minisft.training.result import save_result

# Everything that takes space, or can fail, while files are saved.
OPERATIONS = [
    (os, "replace"),
    (os, "rename"),
    (os, "fsync"),
    (shutil, "copyfile"),
    (tensor_files, "save_file"),
    (torch, "save"),
]


class FullDisk:
    """Fails the operation of this number, and all later ones if `for_good`."""

    def __init__(self, monkeypatch, number, for_good):
        self.number, self.for_good, self.count = number, for_good, 0
        for module, name in OPERATIONS:
            monkeypatch.setattr(module, name, self.failing(name, getattr(module, name)))

    def failing(self, name, operation):
        def run(*arguments, **more):
            self.count += 1
            is_full = self.count == self.number or self.for_good and self.count > self.number
            if not is_full:
                return operation(*arguments, **more)
            if name in ("copyfile", "save_file", "save"):
                with open(arguments[1], "wb") as file:  # a part of the file
                    file.write(b"{")
            if name == "save":
                raise RuntimeError("unexpected pos 64 vs 0")
            raise OSError(errno.ENOSPC, "No space left on device")

        return run


@pytest.fixture
def run(checkpoint, tmp_path):
    options = training_options(
        model_name_or_path=checkpoint, output_dir=tmp_path / "out", max_steps=4
    )
    model = load_model(checkpoint)
    config = lora_from_options(options)
    add_lora(model, config)
    run = new_run(options, model, config)
    run.progress.step = 4
    run.tokenizer = Tokenizer.load(checkpoint)
    (tmp_path / "out").mkdir()
    return run


@pytest.mark.parametrize("for_good", [True, False])
@pytest.mark.parametrize("has_old", [False, True])
def test_every_point_of_the_last_save(has_old, for_good, run, checkpoint, tmp_path):
    out, number, is_done, messages = tmp_path / "out", 0, False, set()
    if has_old:
        save_result(run, checkpoint, run.tokenizer, None)
        shutil.rmtree(out / "checkpoint-4")
    shutil.copytree(out, tmp_path / "old")
    run.progress.step = 5
    for parameter in run.model.parameters():
        parameter.data += 1
    while not is_done:
        number += 1
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        message = None
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, number, for_good)
            try:
                save_result(run, checkpoint, run.tokenizer, None)
            except UserError as error:
                message = str(error)
            is_done = disk.count < number
        names = {path.name for path in out.rglob("*")}
        assert not any("partial" in name for name in names), names
        assert (out / "checkpoint-5").is_dir() or "checkpoint-5" not in names
        record = read_record(out)
        for name, entry in record.get("files", {}).items():
            assert sha256(out / name) == entry["sha256"], (number, name)
        found = checkpoint_of(out)
        assert record or found or not has_tokenizer(out), number
        if message:
            messages.add(message.rpartition(". ")[2])
            assert ("continues from step 5" in message) == (found is not None), message
            assert ("start again with --overwrite_output_dir." in message) == (found is None), (
                message
            )
            resume.can_resume(options_to_resume(run)) if not has_old or found else None
        else:
            assert record["step"] == 5
    assert number > 15 and messages


@pytest.mark.parametrize("num_layers", [2, 40])
def test_the_reserved_space_is_enough(num_layers, run, checkpoint, tmp_path):
    """For the result and a checkpoint of few and of many tensors, in blocks of 4096 bytes."""
    config = {**CONFIG, "vocab_size": 300, "num_hidden_layers": num_layers}
    run.model = CausalLM(ModelConfig.from_dict(config))
    add_lora(run.model, run.lora_config)
    run.optimizer = build_optimizer(run.model, run.options)
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    run.optimizer.step()
    save_result(run, checkpoint, run.tokenizer, None)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    assert len(files) > 8 and used <= resume.output_bytes(run) < 2 * used + 2**18


@pytest.mark.parametrize("files", ["null", "7", '["a"]', '{"missing": {}}'])
def test_a_marker_without_its_files_marks_nothing(files, tmp_path):
    (tmp_path / "complete.json").write_text(f'{{"step": 4, "files": {files}}}')
    assert read_record(tmp_path) == {}


def checkpoint_of(folder):
    return checkpoints.find_checkpoint(folder, "auto", print)


def options_to_resume(run):
    run.options.resume_from_checkpoint = "auto"
    return run.options


def test_reserved_space(tmp_path, monkeypatch):
    """The file has no name; another program cannot take the space, and it comes back."""
    reserve = ReservedSpace(tmp_path, 10**6)
    reserve.take()
    assert list(tmp_path.iterdir()) == []
    held = os.fstat(reserve._file.fileno()).st_blocks * 512
    assert held >= 10**6 or held == 0  # 0: the file system cannot reserve
    with reserve.released():
        assert reserve._file is None
    assert reserve._file
    reserve.release()
    with pytest.raises(UserError, match="the files need"):
        ReservedSpace(tmp_path, 2**60).take()


def test_what_is_left_of_the_reserved_space_is_kept(tmp_path, monkeypatch):
    """A checkpoint has taken its part, and other programs the rest of the disk."""
    reserve, sizes = ReservedSpace(tmp_path, 1000), []

    def allocate(_, size):
        sizes.append(size)
        if size > 600:
            raise OSError(errno.ENOSPC, "No space left on device")

    reserve.take()
    with reserve.released():
        usage = shutil.disk_usage(tmp_path)._replace(free=600)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(reserved_space, "allocate", allocate)
    assert reserve._file and sizes == [1000, 600]
    reserve.release()
