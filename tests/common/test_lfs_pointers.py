"""Git LFS pointers in place of any file that minisft reads: the message says what to run."""

import shutil

import pytest
from conftest import command

from minisft.checkpoints.adapters import load_adapter, save_adapter
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.hub import resolve
from minisft.common.errors import UserError
from minisft.data.records import open_records
from minisft.data.sources import find_sources
from minisft.evaluation.benchmark_files import read_subjects
from minisft.evaluation.benchmarks import BENCHMARKS
from minisft.model.lora import LoraConfig, add_lora
from minisft.text.tokenizer import Tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4cac19be640463ac6f0b1a0dbba3d4a9b1cd4cbd6d5ae55c6ee19ae8a5c7a5a8\n"
    "size 988097824\n"
)


def raises_for_pointer(path):
    """Make a file a Git LFS pointer; expect the error that names it and says `git lfs pull`."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(POINTER)
    return pytest.raises(UserError, match=f"{path}: this is a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_checkpoint(name, checkpoint):
    with raises_for_pointer(checkpoint / name):
        load_model(checkpoint)


def test_pickled_weights(checkpoint):
    """A clone without its large files may have only these."""
    (checkpoint / "model.safetensors").unlink()
    with raises_for_pointer(checkpoint / "pytorch_model.bin"):
        load_model(checkpoint)


def test_pickled_adapter(checkpoint, tmp_path):
    model, config = load_model(checkpoint), LoraConfig()
    add_lora(model, config)
    save_adapter(model, tmp_path, config, checkpoint)
    (tmp_path / "adapter_model.safetensors").unlink()
    with raises_for_pointer(tmp_path / "adapter_model.bin"):
        load_adapter(load_model(checkpoint), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match="adapter_model.bin: pickled files are never opened"):
        load_adapter(load_model(checkpoint), tmp_path)


def test_index(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with raises_for_pointer(checkpoint / "model.safetensors.index.json"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer(name, checkpoint):
    with raises_for_pointer(checkpoint / name):
        Tokenizer.load(checkpoint)


def test_sentencepiece(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with raises_for_pointer(checkpoint / "tokenizer.model"):
        Tokenizer.load(checkpoint)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter(name, checkpoint, tmp_path):
    model, config = load_model(checkpoint), LoraConfig()
    add_lora(model, config)
    save_adapter(model, tmp_path / "adapter", config, checkpoint)
    with raises_for_pointer(tmp_path / "adapter" / name):
        load_adapter(load_model(checkpoint), tmp_path / "adapter")


def test_gguf(tmp_path):
    with raises_for_pointer(tmp_path / "model.gguf"):
        resolve(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "plain_text"), [("a.json", False), ("a.jsonl", False), ("a.txt", True)]
)
def test_data(name, plain_text, tmp_path):
    with raises_for_pointer(tmp_path / name):
        open_records(tmp_path / name, plain_text)


def test_dataset_info(tmp_path):
    with raises_for_pointer(tmp_path / "dataset_info.json"):
        find_sources("alpaca", tmp_path)


@pytest.mark.parametrize("name", ["mmlu.zip", "val/law_val.csv"])
def test_benchmarks(name, tmp_path):
    root = tmp_path / name if name.endswith(".zip") else tmp_path
    with raises_for_pointer(tmp_path / name):
        read_subjects(BENCHMARKS["mmlu"], root, split="val")


def test_command_line(checkpoint, rows_file, tmp_path):
    """One message and status 2, before anything is written."""
    data = tmp_path / "pointer.json"
    data.write_text(POINTER)
    shutil.copytree(checkpoint, tmp_path / "cloned")
    (tmp_path / "cloned/model.safetensors").write_text(POINTER)
    for model, dataset in ((checkpoint, data), (tmp_path / "cloned", rows_file)):
        done = command(
            *("--model_name_or_path", model, "--dataset", dataset, "--template", "alpaca"),
            *("--output_dir", tmp_path / "out"),
        )
        assert done.returncode == 2 and "git lfs pull" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
