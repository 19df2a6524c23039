"""A GGUF file is written completely or not at all."""

import resource
import shutil

import pytest
import torch
from conftest import command
from gguf import GGMLQuantizationType

from minisft.checkpoints import folders
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.gguf import writer

INTERRUPTED = """
import os, runpy, signal, sys
from minisft.gguf.writer import Tensor
convert = Tensor.convert

def interrupt(self, begin, end):
    if self.name == "output_norm.weight":
        os.kill(os.getpid(), signal.SIGINT)
    return convert(self, begin, end)

Tensor.convert = interrupt
sys.argv = sys.argv[1:]
runpy.run_path("export.py", run_name="__main__")
"""


def test_an_interrupt_leaves_no_file(checkpoint, tmp_path):
    output = tmp_path / "out" / "model.gguf"
    done = command(
        "export.py",
        "--model_name_or_path",
        checkpoint,
        "--format",
        "gguf",
        "--output",
        output,
        script=None,
        before=["-c", INTERRUPTED],
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/no/such", "/sys"])
def test_a_folder_that_cannot_be_written(folder, checkpoint):
    with pytest.raises(UserError, match=f"{folder}.*"):
        export_model(checkpoint, f"{folder}/model.gguf", "f16")


@pytest.mark.parametrize(
    "value, quantization, message",
    [
        (float("nan"), "f32", "holds NaN"),
        (float("inf"), "bf16", "holds inf"),
        (7e4, "f16", "7e+04"),
        (-7e4, "q4_k_m", "--quantization bf16 or f32"),
    ],
)
def test_numbers_that_do_not_fit(value, quantization, message, checkpoint, tmp_path):
    model = folders.load_model(checkpoint)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    folders.save_model(model, checkpoint)
    with pytest.raises(UserError, match=f"blk.1.ffn_up.weight.*{message.replace('+', '.')}"):
        export_model(checkpoint, tmp_path / "out" / "model.gguf", quantization)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("size", [100, 5000])  # within the metadata, within the tensors
def test_a_disk_that_fills_while_writing(size, tmp_path):
    numbers = torch.zeros(64, 32)
    tensor = writer.Tensor(
        "zeros", (64, 32), GGMLQuantizationType.F32, lambda begin, end: numbers[begin:end]
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match="model.gguf: could not be written"):
            writer.write_gguf(tmp_path / "model.gguf", "llama", {"x": "y" * 1000}, [tensor])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_an_error_before_writing(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the disk has"):
        export_model(checkpoint, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("model.gguf*"))
